"""A cell of a finished run, opened: one prompt answered at a time, with and without steering."""

from __future__ import annotations

from collections import Counter, OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mnemoscope.behaviour import (
    Batch,
    check_known,
    complete,
    decode,
    kept_bytes,
    log_probabilities,
    score,
    states_at_the_end,
    without_prefix,
)
from mnemoscope.cells import cells_of
from mnemoscope.config import load_study
from mnemoscope.contrast import Contrast
from mnemoscope.detect import Detector, Reading
from mnemoscope.directions import with_prefixes
from mnemoscope.errors import InputError
from mnemoscope.models import blocks_of
from mnemoscope.stages import Records, cell_model
from mnemoscope.steering import SteeringVector, readable
from mnemoscope.tasks import Example
from mnemoscope.web.neurons import Neurons
from mnemoscope.web.shapes import Answer, CellFacts, DetectorReading, Pair, Question, Steering
from mnemoscope.web.vectors import Vectors

PREFIXES = 2**25  # bytes of prompt caches kept: while a slider moves, the prompt stays
LONGEST = 2048  # tokens of a prompt, at most: one request is not to keep a model for minutes
WATCHED = 100  # tune pairs on which a neuron is shown
REPHRASINGS = 20  # draws in which another phrasing must be found
NEW_TOKENS = 20  # of a prompt without answers


class OpenedCell:
    """The model, vectors, contrast and detector of a cell. For one thread at a time: steering hooks into the model.

    Attributes:
        cell: its configuration and folders.
        vectors, neurons: the run's vectors and their parts; neurons one by one.
    """

    def __init__(self, run: str | Path, name: str) -> None:
        """Open the cell of that name in a run folder.

        Raises:
            InputError: the run has no such cell, it is not finished, or its model is missing or damaged.
        """
        run = Path(run)
        cells = {cell.name: cell for cell in cells_of(load_study(str(run / "study.yaml")), run) if cell.config.analysed}
        if name not in cells:
            raise InputError(f"cell: {name!r} is not one of {', '.join(cells)}")
        self.cell = cell = cells[name]
        if not (cell.records / "chosen.json").is_file():
            raise InputError(f"cell: {name} has no steering vectors yet; let its study run to its end first")
        with readable("cell", cell.folder):
            self._asking = replace(cell_model(cell), batch_size=16)
            self._records = Records.of(cell)
            contrast = Contrast.load(cell.folder / "contrast.safetensors")
            detector = cell.folder / "detector.safetensors"
            self._detector = Detector.load(detector) if detector.is_file() else None
            self.vectors = Vectors(cell, contrast)
            self.neurons = Neurons(self._asking, contrast, self._records.both_sides("tune", WATCHED))
            self._items = {pair[1].item: pair[1] for pair in self._records.both_sides("test", len(self._records.pairs))}
        self._prefixes: OrderedDict[Example, list[Batch]] = OrderedDict()

    def facts(self) -> CellFacts:
        """Its layers, vectors and whether it has a detector."""
        layers = len(blocks_of(self._asking.model))
        return CellFacts(layers=layers, detects=self._detector is not None, methods=self.vectors.methods())

    def pairs(self, n: int) -> list[Pair]:
        """Up to ``n`` test pairs, one of every group before a second of any."""
        seen: Counter[str] = Counter()
        ranked = []
        for generalized, memorized in self._records.both_sides("test", 20 * n):
            pair: Pair = {"memorized": Question.of(memorized), "generalized": Question.of(generalized)}
            ranked.append((seen[memorized.group], pair))
            seen[memorized.group] += 1
        return [pair for _, pair in sorted(ranked, key=lambda both: both[0])[:n]]

    def rephrase(self, question: Question, seed: int) -> Question:
        """Another phrasing of a question of the test pairs.

        Raises:
            InputError: its item is not one of theirs, or no other phrasing was drawn.
        """
        item = question.item
        if item not in self._items:
            raise InputError(f"item: {item!r} is not in the run's test pairs, so other phrasings of it are not known")
        rng = np.random.default_rng(seed)
        for _ in range(REPHRASINGS):
            other = self._records.task.rephrase(self._items[item], rng)
            if other.prompt != question.prompt and other.kind == "conflict":
                return Question.of(other)
        raise InputError(f"item: no other phrasing of {item!r} was found")

    def answer(self, question: Question, steering: Steering | None = None) -> Answer:
        """Answer a prompt, steered or not; without its two answers, the model's continuation of it.

        Raises:
            InputError: the prompt is too long, the tokenizer cannot encode it, or there is no such vector.
        """
        vector = self.vectors.part(steering) if steering else None
        if steering and vector:
            vector = steering.alpha * vector if steering.alpha else None
        (tokens,) = self._asking.tokens([self._asking.text(question.prompt)])
        if len(tokens) > LONGEST:
            raise InputError(f"prompt: {len(tokens)} tokens; at most {LONGEST} are read here")
        example = question.example()
        return self._continue(question.prompt, vector) if example is None else self._choose(example, vector)

    def _continue(self, prompt: str, vector: SteeringVector | None) -> Answer:
        """What follows a prompt whose revealing answers are not known."""
        applied = partial(vector.apply, self._asking.model) if vector else nullcontext
        check_known(self._asking, [prompt])
        inputs = self._asking.padded([self._asking.text(prompt)])
        with applied():
            said = complete(self._asking.model, self._asking.tokenizer, inputs, NEW_TOKENS)[0]
        if self._detector is None:
            return Answer(said=said)
        with applied():
            states_NLD = states_at_the_end(
                self._asking.model, inputs.input_ids, inputs.attention_mask, self._detector.site
            )
        return Answer(said=said, reading=_first(self._detector.read(states_NLD)))

    def _choose(self, example: Example, vector: SteeringVector | None) -> Answer:
        """Which of two revealing answers follows, and the probabilities of both."""
        applied = partial(vector.apply, self._asking.model) if vector else nullcontext
        batches = self._prefix(example)
        if vector and vector.positions == "all":
            batches = [without_prefix(batch) for batch in batches]
        site = self._detector.site if self._detector else None
        scores = score(self._asking, batches, margins=False, capture=site, applied=applied)
        with torch.no_grad(), applied():
            memorized, generalized = log_probabilities(self._asking, batches[0])[0].double().exp().tolist()
        behaviour = str(scores.behaviour_N[0])
        named = {"memorized": example.memorized, "generalized": example.generalized}
        found = self._detector.read(scores.states_NLD) if self._detector and scores.states_NLD is not None else None
        return Answer(
            behaviour=behaviour,
            said=named[behaviour] if behaviour in named else decode(self._asking, [example], applied)[0],
            p_memorized=memorized,
            p_generalized=generalized,
            reading=_first(found) if found else None,
        )

    def _prefix(self, example: Example) -> list[Batch]:
        """The question as a batch of one, its prompt read up to the decision position; the latest ones are kept."""
        if example not in self._prefixes:
            self._prefixes[example] = with_prefixes(self._asking, [example])
        self._prefixes.move_to_end(example)
        while len(self._prefixes) > 1 and sum(kept_bytes(b) for bs in self._prefixes.values() for b in bs) > PREFIXES:
            self._prefixes.popitem(last=False)
        return self._prefixes[example]


def _first(found: Reading) -> DetectorReading:
    """The reading of the first prompt."""
    return DetectorReading(
        p_memorized=found.p_memorized[0],
        p_memorized_by_layer=found.p_memorized_by_layer[0].tolist(),
        p_conflict=found.p_conflict[0],
        unlike=bool(found.unlike[0]),
        layer=found.layer,
    )
