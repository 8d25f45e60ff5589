"""A cell of a finished run, opened: asked one prompt at a time, by itself and turned."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mnemoscope.behaviour import (
    Batch,
    check_known,
    decode,
    kept_bytes,
    log_probabilities,
    score,
    without_prefix,
)
from mnemoscope.bench.neurons import Neurons
from mnemoscope.bench.turns import Turns
from mnemoscope.bench.vectors import Turning, Vectors
from mnemoscope.cells import Cell, cells_of
from mnemoscope.config import load_study
from mnemoscope.contrast import Contrast
from mnemoscope.detect import Detector, Reading, read_prompts
from mnemoscope.directions import with_prefixes
from mnemoscope.errors import InputError
from mnemoscope.models import blocks_of
from mnemoscope.stages import Records, cell_model
from mnemoscope.steering import SteeringVector, complete, reading
from mnemoscope.tasks import Example

REMEMBERED = 256  # questions whose unsteered answers are kept
READ = 2**25  # bytes of prompts that need not be read again: somebody moves a slider
LONGEST = 2048  # tokens of a prompt, at most: one request is not to keep a model for minutes
WATCHED = 100  # tune pairs whose states are shown of a neuron
REPHRASINGS = 20  # draws in which other words must be found


@dataclass(frozen=True)
class Answered:
    """What a model makes of a prompt.

    Attributes:
        behaviour: ``memorized``, ``generalized`` or ``other``; None where the prompt came without its two answers.
        said: what it answers.
        p_memorized, p_generalized: probabilities of the whole answers, without what closes them; NaN without answers.
        reading: what the cell's detector says of the state at the decision position, or None without a detector.
    """

    behaviour: str | None
    said: str
    p_memorized: float
    p_generalized: float
    reading: Reading | None


class Bench:
    """An opened cell. Whoever asks waits for whoever asked before, so that no answer sees another's shift."""

    def __init__(self, cell: Cell) -> None:
        """Open a cell.

        Raises:
            InputError: it has not come to its end, or its model is missing or damaged.
        """
        if not (cell.records / "chosen.json").is_file():
            raise InputError(f"cell: {cell.name} has no steering vectors yet; let its study run to its end first")
        self.cell = cell
        self._turns = Turns()
        with reading("cell", cell.folder):
            self._asking = replace(cell_model(cell), batch_size=16)
            self._records = Records.of(cell)
            self.contrast = Contrast.load(cell.folder / "contrast.safetensors")
            detector = cell.folder / "detector.safetensors"
            self._detector = Detector.load(detector) if detector.is_file() else None
            self.vectors = Vectors(cell, self.contrast)
            tuned = self._records.both_sides("tune", WATCHED)
            self.neurons = Neurons(self._asking, self.contrast, tuned, self._turns)
            self._items = {pair[1].item: pair[1] for pair in self._records.both_sides("test", len(self._records.pairs))}
        self._plain: OrderedDict[Example, Answered] = OrderedDict()
        self._read: OrderedDict[Example, list[Batch]] = OrderedDict()

    @classmethod
    def of(cls, run: Path, name: str) -> Bench:
        """The cell of that name in a run.

        Raises:
            InputError: the run has no such cell, or it cannot be opened.
        """
        cells = {cell.name: cell for cell in cells_of(load_study(str(run / "study.yaml")), run) if cell.config.analysed}
        if name not in cells:
            raise InputError(f"cell: {name!r} is not one of {', '.join(cells)}")
        return cls(cells[name])

    @property
    def layers(self) -> int:
        """How many blocks the model has."""
        return len(blocks_of(self._asking.model))

    @property
    def model_source(self) -> str:
        """What ``load_model`` opens the model with."""
        shape = self.cell.config.model
        return shape.folder if shape.folder and not shape.is_trained else str(self.cell.model_folder)

    @property
    def opened_plainly(self) -> bool:
        """Whether that is all that must be said of the model: no chat template, layout or other precision."""
        shape = self.cell.config.model
        return not (shape.chat or shape.layout or shape.device_map) and shape.dtype == "float32"

    @property
    def detects(self) -> bool:
        """Whether the run has fitted a detector."""
        return self._detector is not None

    def questions(self, n: int) -> list[tuple[Example, Example]]:
        """Test pairs of as many groups as there are, as (answered from memory, answered by the rule)."""
        pairs = self._records.both_sides("test", 20 * n)
        seen: dict[str, int] = {}
        turns = []
        for generalized, memorized in pairs:
            turns.append((seen.setdefault(memorized.group, 0), memorized, generalized))
            seen[memorized.group] += 1
        return [(memorized, generalized) for _, memorized, generalized in sorted(turns, key=lambda turn: turn[0])[:n]]

    def rephrased(self, item: str, prompt: str, seed: int) -> Example:
        """An item of the test pairs in other words than a prompt's.

        Raises:
            InputError: it is none of theirs, or there are no other words for it.
        """
        if item not in self._items:
            raise InputError(f"item: {item!r} is none of the run's test pairs, so its other words are not known")
        rng = np.random.default_rng(seed)
        for _ in range(REPHRASINGS):
            other = self._records.task.rephrase(self._items[item], rng)
            if other.prompt != prompt and other.kind == "conflict":
                return other
        raise InputError(f"item: no other words were found for {item!r}")

    def ask(self, example: Example, turning: Turning | None = None) -> Answered:
        """What the model makes of a prompt whose two revealing answers are known.

        Raises:
            InputError: the tokenizer cannot read it, or there is no such vector.
        """
        vector = self.vectors.meant(turning) if turning else None
        with self._turns.ahead():
            self._check_length(example.prompt)
            if vector is not None and turning is not None and turning.alpha:
                return self._ask(example, vector, turning.alpha)
            if example not in self._plain:
                self._plain[example] = self._ask(example)
                while len(self._plain) > REMEMBERED:
                    self._plain.popitem(last=False)
            return self._plain[example]

    def go_on(self, prompt: str, turning: Turning | None = None, tokens: int = 20) -> Answered:
        """What follows a prompt whose answers nobody has said.

        Raises:
            InputError: it has no token, or more than the model reads together with what follows.
        """
        vector = self.vectors.meant(turning) if turning else None
        with self._turns.ahead():
            applied = partial(vector.apply, self._asking.model, turning.alpha) if vector and turning else nullcontext
            self._check_length(prompt)
            check_known(self._asking, [prompt])
            inputs = self._asking.padded([self._asking.text(prompt)])
            with applied():
                said = complete(self._asking.model, self._asking.tokenizer, inputs, tokens)[0]
            reading = None
            if self._detector is not None:
                with applied():
                    reading = read_prompts(self._detector, self._asking, [prompt])
        return Answered(None, said, math.nan, math.nan, reading)

    def _check_length(self, prompt: str) -> None:
        (tokens,) = self._asking.tokens([self._asking.text(prompt)])
        if len(tokens) > LONGEST:
            raise InputError(f"prompt: {len(tokens)} tokens; at most {LONGEST} are read here")

    def _prompt(self, example: Example) -> list[Batch]:
        """The question as a batch of one, its prompt read up to the decision position; the latest ones are kept."""
        if example not in self._read:
            self._read[example] = with_prefixes(self._asking, [example])
            while len(self._read) > 1 and (len(self._read) > REMEMBERED or self._kept() > READ):
                self._read.popitem(last=False)
        self._read.move_to_end(example)
        return self._read[example]

    def _kept(self) -> int:
        """Bytes of the prompts that are kept."""
        return sum(kept_bytes(batch) for several in self._read.values() for batch in several)

    def _ask(self, example: Example, vector: SteeringVector | None = None, alpha: float = 1.0) -> Answered:
        applied = partial(vector.apply, self._asking.model, alpha) if vector else nullcontext
        batches = self._prompt(example)
        if vector and vector.positions == "all":
            batches = [without_prefix(batch) for batch in batches]
        site = self._detector.site if self._detector else None
        scores = score(self._asking, batches, margins=False, capture=site, applied=applied)
        with torch.no_grad(), applied():
            memorized, generalized = log_probabilities(self._asking, batches[0])[0].double().exp().tolist()
        behaviour = str(scores.behaviour_N[0])
        named = {"memorized": example.memorized, "generalized": example.generalized}
        said = named[behaviour] if behaviour in named else decode(self._asking, [example], applied)[0]
        reading = self._detector.read(scores.states_NLD) if self._detector and scores.states_NLD is not None else None
        return Answered(behaviour, str(said), memorized, generalized, reading)
