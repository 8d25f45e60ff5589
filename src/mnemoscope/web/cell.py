"""A cell of a finished run, opened: one prompt answered at a time, with and without steering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from mnemoscope.auditing.origins import Reader, Text
from mnemoscope.behaviour import (
    Applied,
    Batch,
    check_known,
    decode,
    log_probabilities,
    phrase_of,
    score,
    states_at_the_end,
    without_prefix,
)
from mnemoscope.bench.answers import NOTHING, answered, scores
from mnemoscope.bench.prompts import Prompts, bare_of
from mnemoscope.config import load_study
from mnemoscope.interventions import Binding, Intervention, Toward
from mnemoscope.interventions.detect import Detector
from mnemoscope.interventions.sources import spread_groups, with_prefixes
from mnemoscope.models import blocks_of
from mnemoscope.runs.digests import check_closed, check_stage, intact, is_there
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.study.cells import Cell, cells_of
from mnemoscope.study.stages import Records, cell_model, with_kept_data
from mnemoscope.tasks import Example, allowed_code
from mnemoscope.web.parts import Neurons, Vectors
from mnemoscope.web.shapes import About, Answer, DetectorReading, OpenedFacts, Pair, Question, ReadSoFar, Steering

READER = "reader.safetensors"  # in the folder of a run
PREFIXES = 2  # prompts whose caches are kept: while a slider moves, the prompt stays
LONGEST = 2048  # tokens of a prompt, at most: one request is not to keep a model for minutes
WATCHED = 100  # tune pairs on which a neuron is shown
REPHRASINGS = 20  # draws in which another phrasing must be found


def _check_stages(cell: Cell) -> None:
    """Raises InputError where a stage that is read here has not finished, or its files have changed since."""
    own, shape = cell.folder, cell.config.model
    stages = [(own, name) for name in ("train", "behaviour", "pairs", "steering")]
    stages += [(cell.model_folder.parent, "train")] if shape.is_trained or shape.cell else []
    try:
        for folder, stage in stages:
            check_stage(folder, stage)
    except InputError as error:
        raise InputError(f"cell: {error}") from error


def _closed(cell: Cell, model: str | Path | None) -> Cell:
    """The cell with what its configuration names outside of the run replaced by copies in it, and by a model given."""
    shape = cell.config.model
    if not (shape.is_trained or shape.cell):
        if model is None and shape.folder and Path(shape.folder).exists():
            what = f"model.folder: {shape.folder} is no model that the study trained"
            raise InputError(f"{what}; if you trust it, give it: --model {shape.folder}")
        if model is not None:
            shape = shape.model_copy(update={"folder": str(model), "opened": None})
    cell = with_kept_data(cell)
    return replace(cell, config=cell.config.model_copy(update={"model": shape}), code=allowed_code())


class OpenedCell:
    """The model, vectors, neurons and detector of a cell. For one thread at a time: steering hooks into the model."""

    def __init__(self, run: str | Path, name: str, model: str | Path | None = None) -> None:
        """Open a cell of a run.

        Args:
            model: folder or hub id of the model, where the study did not train it.

        Raises:
            InputError: there is no such cell, it is not finished or is damaged, or its model cannot be opened, is
                another one, or lies outside of the run and is not given.
        """
        run = Path(run)
        check_closed(run)
        cells = {cell.name: cell for cell in cells_of(load_study(str(intact(run / "study.yaml"))), run)}
        finished = [name for name, cell in cells.items() if (cell.records / "chosen.json").is_file()]
        if name not in finished:
            raise InputError(f"cell: {name!r} is not one of {', '.join(finished) or 'none'}, which have vectors")
        self.cell = cell = _closed(cells[name], model)
        _check_stages(cell)
        with refusing(f"cell: {cell.folder} cannot be read"):
            self._asking = asking = replace(cell_model(cell), batch_size=16)
            self._records = Records.of(cell)
            contrast = Contrast.load(cell.folder / "contrast.safetensors")
            detector, binding = cell.folder / "detector.safetensors", Binding.of(asking.model, asking.tokenizer)
            self._detector = Detector.load(intact(detector)) if is_there(detector) else None
            if self._detector:
                self._detector.check(asking.model, asking.tokenizer, found=binding)
            reader = run / READER
            self._reader = Reader.load(reader) if is_there(reader) else None
            if self._reader:
                self._reader.check(asking.model, asking.tokenizer, found=binding)
            self.vectors = Vectors(cell, contrast, asking, binding)
            self.neurons = Neurons(asking, contrast, self._records.both_sides("tune", WATCHED))
            self._items = {pair[1].item: pair[1] for pair in self._records.both_sides("test", len(self._records.pairs))}
        # A question as a batch of one, its prompt read up to the decision position.
        self._prefix = lru_cache(PREFIXES)(lambda example: with_prefixes(asking, [example]))

    def facts(self) -> OpenedFacts:
        """Its layers, vectors and whether it has a detector."""
        card = self._detector.card if self._detector else None
        return OpenedFacts(
            layers=len(blocks_of(self._asking.model)),
            documents=self._records.task.documents,
            detects=self._detector is not None,
            reads=self._reader is not None,
            auroc=card.auroc if card else None,
            methods=self.vectors.facts(),
        )

    def pairs(self, n: int) -> list[Pair]:
        """Up to ``n`` test pairs, one of every group before a second of any."""
        both = spread_groups(self._records.both_sides("test", 20 * n), lambda pair: pair[0].group)
        return [{toward: Question.of(one) for toward, one in zip(Toward, pair, strict=True)} for pair in both[:n]]

    def rephrase(self, question: Question, seed: int) -> Question:
        """Another phrasing of a question of the test pairs; InputError where it is not theirs, or none was drawn."""
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

        Raises InputError where the prompt is too long or cannot be encoded, or there is no such vector.
        """
        one = self.vectors.part(steering).scaled(steering.alpha) if steering else NOTHING
        self._check_length(question.prompt)
        example = question.example()
        if example is None:
            return self._continue(question.prompt, one)
        if one is not NOTHING and type(one).apply is Intervention.apply:
            return self._by_prompt(example, one)
        batches = self._prefix(example)
        if one.everywhere and steering and steering.alpha:
            batches = [without_prefix(batch) for batch in batches]
        return self._choose(example, batches, partial(one.apply, self._asking.model))

    def read(self, about: About) -> Iterator[ReadSoFar]:
        """Answer a question about a document, and tell where each part comes from, while it is written.

        Raises InputError without a reader, or as ``answer``.
        """
        if self._reader is None:
            raise InputError("reader: this run has none; fit one into its folder (mnemoscope fit-reader)")
        asked = self._reader.asks(Text(about.ask, about.document))
        self._check_length(asked.prompt)
        found = self._reader.stream(self._asking, asked, about.tokens)
        return (ReadSoFar(**one.told()) for one in found)

    def _check_length(self, prompt: str) -> None:
        (tokens,) = self._asking.tokens([self._asking.text(prompt)])
        if len(tokens) > LONGEST:
            raise InputError(f"prompt: {len(tokens)} tokens; at most {LONGEST} are read here")
        check_known(self._asking, [prompt])

    def _continue(self, prompt: str, one: Intervention) -> Answer:
        """What follows a prompt whose revealing answers are not known."""
        (said,) = answered(one, Prompts.free(self._asking, [prompt]))
        return Answer(said=said, reading=self._reading(prompt, one))

    def _by_prompt(self, example: Example, one: Intervention) -> Answer:
        """The same question by a lever that acts on prompts."""
        prompts = Prompts(self._asking, [example], [bare_of(example)])
        (said,) = answered(one, prompts)
        behaviour = str(scores(one, prompts).behaviour_N[0])
        return Answer(behaviour=behaviour, said=phrase_of(said), reading=self._reading(example.prompt, one))

    def _reading(self, prompt: str, one: Intervention) -> DetectorReading | None:
        """What the detector reads at the end of a prompt."""
        if self._detector is None:
            return None
        inputs = self._asking.padded([self._asking.text(prompt)])
        with one.apply(self._asking.model):
            ids_NT, mask_NT = inputs.input_ids, inputs.attention_mask
            states_NLD = states_at_the_end(self._asking.model, ids_NT, mask_NT, self._detector.site)
        return DetectorReading.first_of(self._detector.read(states_NLD))

    def _choose(self, example: Example, batches: list[Batch], applied: Applied) -> Answer:
        """Which of two revealing answers follows, and the probabilities of both."""
        site = self._detector.site if self._detector else None
        found = score(self._asking, batches, margins=False, capture=site, applied=applied)
        with torch.no_grad(), applied():
            memorized, generalized = log_probabilities(self._asking, batches[0])[0].double().exp().tolist()
        behaviour, read = str(found.behaviour_N[0]), None
        if self._detector and found.states_NLD is not None:
            read = DetectorReading.first_of(self._detector.read(found.states_NLD))
        named = {"memorized": example.memorized, "generalized": example.generalized}
        said = named[behaviour] if behaviour in named else decode(self._asking, [example], applied)[0]
        return Answer(behaviour=behaviour, said=said, p_memorized=memorized, p_generalized=generalized, reading=read)
