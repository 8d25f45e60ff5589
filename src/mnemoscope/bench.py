"""A cell of a finished run, opened: asked one prompt at a time, by itself and turned, and looked into neuron by neuron.

Shapes: P pairs, L layers, D neurons.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from mnemoscope.behaviour import (
    Batch,
    cache_prefixes,
    check_known,
    decode,
    kept_bytes,
    log_probabilities,
    prepare,
    score,
    without_prefix,
)
from mnemoscope.cells import Cell, cells_of
from mnemoscope.config import load_study
from mnemoscope.contrast import Contrast
from mnemoscope.detect import Detector, Reading, read_prompts
from mnemoscope.directions import TOWARD, steered, with_prefixes
from mnemoscope.errors import InputError
from mnemoscope.models import blocks_of
from mnemoscope.stages import Records, cell_model
from mnemoscope.statistics import top_by_magnitude
from mnemoscope.steering import OPPOSITE, SteeringVector, Toward, complete, reading
from mnemoscope.tasks import Example

REMEMBERED = 256  # questions whose unsteered answers are kept
READ = 2**25  # bytes of prompts that need not be read again: somebody moves a slider
LONGEST = 2048  # tokens of a prompt, at most: one request is not to keep a model for minutes
SIDES = 2**28  # bytes of tune pairs that need not be read again: somebody looks at one neuron after the other
WATCHED = 100  # tune pairs whose states are shown of a neuron
REPHRASINGS = 20  # draws in which other words must be found
TIMES = (1.0, 4.0, 16.0)  # multiples of its mean difference by which a neuron alone is shifted


class CancelledError(Exception):
    """Whoever asked does not want to know any more."""


@dataclass(frozen=True)
class Turning:
    """How a model is turned while it answers.

    Attributes:
        toward: the behaviour wanted.
        method: one that the run has a vector of.
        alpha: factor on that vector, at least 0.
        layers: those of its layers that are shifted; None: all of them.
        neurons: how many are shifted, the highest ranked first; None: as many as the vector shifts.
    """

    toward: Toward
    method: str
    alpha: float = 1.0
    layers: tuple[int, ...] | None = None
    neurons: int | None = None


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


@dataclass(frozen=True)
class Watched:
    """A neuron on tune pairs.

    Attributes:
        generalized_P, memorized_P: its activation where the pair's phrasing was answered so.
        rank_nmd, rank_rho: from 1, among all neurons of its site, by magnitude.
        alone: by multiple of its mean difference, the share of the pairs' phrasings that the shift of this neuron alone
            turns to ``generalized`` and to ``memorized``.
    """

    generalized_P: np.ndarray
    memorized_P: np.ndarray
    rank_nmd: int
    rank_rho: int
    alone: dict[float, dict[Toward, float]]


class Bench:
    """An opened cell. Whoever asks waits for whoever asked before, so that no answer sees another's shift."""

    def __init__(self, cell: Cell) -> None:
        """Open a cell.

        Raises:
            InputError: it has not come to its end, or its model is missing or damaged.
        """
        chosen = cell.records / "chosen.json"
        if not chosen.is_file():
            raise InputError(f"cell: {cell.name} has no steering vectors yet; let its study run to its end first")
        self.cell = cell
        self._lock = Lock()
        self._counting = Lock()
        self._waiting = self._answered = 0  # requests that are waiting or being answered; those that have been
        with reading("cell", cell.folder):
            self.chosen: dict[str, Any] = json.loads(chosen.read_text())["pairs"]
            self._asking = replace(cell_model(cell), batch_size=16)
            self._records = Records.of(cell)
            self.contrast = Contrast.load(cell.folder / "contrast.safetensors")
            detector = cell.folder / "detector.safetensors"
            self._detector = Detector.load(detector) if detector.is_file() else None
            self._vectors = {
                (toward, method): SteeringVector.load(cell.folder / "vectors" / f"{direction}-{method}.safetensors")
                for direction, toward in TOWARD.items()
                for method in self.chosen["methods"]
            }
            self._items = {pair[1].item: pair[1] for pair in self._records.both_sides("test", len(self._records.pairs))}
        self._plain: OrderedDict[Example, Answered] = OrderedDict()
        self._read: OrderedDict[Example, list[Batch]] = OrderedDict()
        self._sides: dict[tuple[str, int], tuple[list[Batch], np.ndarray]] = {}

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

    def methods(self) -> list[dict[str, Any]]:
        """Each method of the run with its vectors: site, layers, neurons, strength, and whether it is the best."""
        rows = []
        for method in self.chosen["methods"]:
            row: dict[str, Any] = {"method": method}
            for direction, toward in TOWARD.items():
                vector = self._vectors[toward, method]
                row[toward] = {
                    "site": vector.site,
                    "layers": vector.layers,
                    "neurons": _shifted(vector),
                    "strength": vector.strength,
                    "free": self._free(vector),
                    "best": self.chosen["best"][direction] == method,
                }
            rows.append(row)
        return rows

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
        vector = self.vector(turning) if turning else None
        with self._ahead():
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
        vector = self.vector(turning) if turning else None
        with self._ahead():
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

    @contextmanager
    def _ahead(self) -> Iterator[None]:
        """The model, for one answer: long work lets it go first."""
        with self._counting:
            self._waiting += 1
        try:
            with self._lock:
                yield
        finally:
            with self._counting:
                self._waiting -= 1
                self._answered += 1

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

    def vector(self, turning: Turning) -> SteeringVector:
        """The vector that a turning means, before its factor.

        Of ``nmd`` any layers and any number of neurons can be taken, as the run has the whole mean difference; of other
        methods those that the run's vector shifts.

        Raises:
            InputError: method, layers or number are none that there are.
        """
        vector = self._vectors.get((turning.toward, turning.method))
        if vector is None:
            raise InputError(f"method: {turning.method!r} is not one of {', '.join(self.chosen['methods'])}")
        if turning.layers is None and turning.neurons is None:
            return vector
        whole_LD, rank_LD = self._whole(vector)
        allowed = [layer for layer in range(self.layers) if rank_LD[layer].any()]
        chosen = list(turning.layers if turning.layers is not None else vector.layers)
        if not chosen or not set(chosen) <= set(allowed):
            raise InputError(f"layers: {chosen} are not among {allowed}, which {turning.method} shifts")
        width = rank_LD.shape[1]
        most = int(np.count_nonzero(rank_LD[chosen]))
        number = turning.neurons if turning.neurons is not None else _shifted(vector)
        if turning.neurons is not None and not 1 <= number <= most:
            raise InputError(f"neurons: {number} is not in 1 .. {most}, which {turning.method} shifts in these layers")
        kept_LD = np.zeros(rank_LD.shape, bool)
        kept_LD[chosen] = top_by_magnitude(rank_LD[chosen], min(number, most) / (len(chosen) * width))
        return vector.with_dense(np.where(kept_LD, whole_LD, 0.0))

    def _free(self, vector: SteeringVector) -> bool:
        return vector.method == "nmd" and vector.site == self.contrast.site

    def _whole(self, vector: SteeringVector) -> tuple[np.ndarray, np.ndarray]:
        """A vector before its neurons were chosen, as far as it is known, and what they are ranked by; (L, D) each.

        The vector's own neurons come first: it was made of fewer pairs than the contrast, which fills up the others.
        """
        dense_LD = vector.dense(self.layers, len(next(iter(vector.shifts.values()))))
        if not self._free(vector):
            return dense_LD, np.abs(dense_LD)
        nmd_LD = np.nan_to_num(self.contrast.nmd_LD)
        own_LD = dense_LD != 0
        times = float(np.linalg.norm(dense_LD) / np.linalg.norm(nmd_LD[own_LD]))
        sign = 1.0 if vector.toward == "generalized" else -1.0
        rank_LD = np.abs(np.nan_to_num(self.contrast.rho_LD)) + own_LD  # |rho| is at most 1
        return np.where(own_LD, dense_LD, sign * times * nmd_LD), rank_LD

    def watch(
        self,
        layer: int,
        neuron: int,
        tell: Callable[[float], None] = lambda share: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Watched:
        """Look at a neuron of the contrast's site, on tune pairs; the first look reads all of them.

        Args:
            tell: hears which share of the work is done.
            wanted: asked now and then whether to go on.

        Raises:
            InputError: there is no such neuron, or no tune pair.
            CancelledError: it is not wanted any more.
        """
        self.check_neuron(layer, neuron)
        alone: dict[float, dict[Toward, float]] = {}
        states = {}
        for number, behaviour in enumerate(TOWARD.values()):
            sides = self._sides_of(behaviour, lambda share, number=number: tell(0.4 * (number + share)), wanted)  # type: ignore[misc]
            states[behaviour] = np.concatenate([part for _, part in sides])
        for done, times in enumerate(TIMES):
            tell(0.8 + 0.2 * done / len(TIMES))
            alone[times] = {
                toward: self._turned_alone(layer, neuron, times, toward, wanted) for toward in TOWARD.values()
            }
        tell(1.0)
        nmd_LD, rho_LD = (np.abs(np.nan_to_num(a)) for a in (self.contrast.nmd_LD, self.contrast.rho_LD))
        return Watched(
            states["generalized"][:, layer, neuron],
            states["memorized"][:, layer, neuron],
            1 + int((nmd_LD > nmd_LD[layer, neuron]).sum()),
            1 + int((rho_LD > rho_LD[layer, neuron]).sum()),
            alone,
        )

    def check_neuron(self, layer: int, neuron: int) -> None:
        """Raises InputError where the contrast has no such neuron."""
        layers, neurons = self.contrast.nmd_LD.shape
        for field, value, most in (("layer", layer, layers), ("neuron", neuron, neurons)):
            if not 0 <= value < most:
                raise InputError(f"{field}: {value} is not in 0 .. {most - 1}")

    @contextmanager
    def _turn(self, wanted: Callable[[], bool]) -> Iterator[None]:
        """The model, for one step of long work: of those who wait, one at least is answered before."""
        answered = self._answered
        while (self._waiting and self._answered == answered) or not self._lock.acquire(timeout=0.1):
            _check(wanted)
            time.sleep(0.001)
        try:
            _check(wanted)
            yield
        finally:
            self._lock.release()

    def _sides_of(
        self, behaviour: str, tell: Callable[[float], None], wanted: Callable[[], bool]
    ) -> list[tuple[list[Batch], np.ndarray]]:
        """Tune phrasings that are answered so, prepared with prefixes, and their states (P, L, D); read once."""
        number = list(TOWARD.values()).index(behaviour)  # type: ignore[arg-type]
        examples = [pair[number] for pair in self._records.both_sides("tune", WATCHED)]
        if not examples:
            raise InputError(f"cell: {self.cell.name} has no tune pair")
        found = []
        for start in range(0, len(examples), self._asking.batch_size):
            tell(start / len(examples))
            with self._turn(wanted):
                if (behaviour, start) not in self._sides:
                    batches = prepare(self._asking, examples[start : start + self._asking.batch_size])
                    kept = sum(kept_bytes(batch) for several, _ in self._sides.values() for batch in several)
                    if kept < SIDES:
                        cache_prefixes(self._asking, batches, SIDES - kept)
                    scores = score(self._asking, batches, margins=False, capture=self.contrast.site)  # type: ignore[arg-type]
                    assert scores.states_NLD is not None
                    self._sides[behaviour, start] = batches, scores.states_NLD
                found.append(self._sides[behaviour, start])
        return found

    def _turned_alone(self, layer: int, neuron: int, times: float, toward: Toward, wanted: Callable[[], bool]) -> float:
        """Of the phrasings that are answered the other way, the share that the neuron's shift turns."""
        shift_LD = np.zeros(self.contrast.nmd_LD.shape)
        sign = 1.0 if toward == "generalized" else -1.0
        shift_LD[layer, neuron] = sign * times * np.nan_to_num(self.contrast.nmd_LD[layer, neuron])
        vector = SteeringVector(toward, {}, self.contrast.site).with_dense(shift_LD)  # type: ignore[arg-type]
        turned = []
        for batches, _ in self._sides_of(OPPOSITE[toward], lambda share: None, wanted):
            with self._turn(wanted):
                turned += list(steered(self._asking, batches, vector, margins=False).behaviour_N == toward)
        return float(np.mean(turned))


def _shifted(vector: SteeringVector) -> int:
    """How many neurons it shifts."""
    return sum(int((shift != 0).sum()) for shift in vector.shifts.values())


def _check(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise CancelledError
