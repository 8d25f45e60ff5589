"""A cell of a finished run, opened: one prompt answered at a time, with and without steering."""

from __future__ import annotations

import shlex
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

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
from mnemoscope.config import load_study
from mnemoscope.interventions import Binding, readable
from mnemoscope.interventions.detect import Detector
from mnemoscope.interventions.sources import with_prefixes
from mnemoscope.models import blocks_of
from mnemoscope.runs.digests import check_closed, check_stage, intact, is_there
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.study.cells import Cell, cells_of
from mnemoscope.study.stages import Records, cell_model, with_kept_data
from mnemoscope.tasks import Example, allowed_code
from mnemoscope.web.parts import Neurons, Vectors
from mnemoscope.web.shapes import Answer, Asked, CellFacts, DetectorReading, Pair, Question, Steering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PREFIXES = 2**25  # bytes of prompt caches kept: while a slider moves, the prompt stays
LONGEST = 2048  # tokens of a prompt, at most: one request is not to keep a model for minutes
WATCHED = 100  # tune pairs on which a neuron is shown
REPHRASINGS = 20  # draws in which another phrasing must be found
NEW_TOKENS = 20  # of a prompt without answers

# Python that gives, without the page, the answer that the page shows.
WHOLE = """\
from mnemoscope import SteeringVector, load_model

model, tokenizer = load_model({model!r})
vector = SteeringVector.load({vector!r}, model, tokenizer)
with vector.apply(model, alpha={alpha:g}):
    answer = model.generate(**tokenizer({prompt!r}, return_tensors="pt"), max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0]))
"""
PART = """\
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import Question, Steering

cell = OpenedCell({run!r}, {cell!r}{given})
steering = Steering({steering})
print(cell.answer(Question(prompt={prompt!r}), steering).said)
"""
Applied = Callable[[], AbstractContextManager[None]]


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
        self.model, self.cell = model, _closed(cells[name], model)
        cell = self.cell
        _check_stages(cell)
        with readable("cell", cell.folder):
            self._asking = replace(cell_model(cell), batch_size=16)
            self._records = Records.of(cell)
            contrast = Contrast.load(cell.folder / "contrast.safetensors")
            detector, binding = cell.folder / "detector.safetensors", Binding.of(*self._opened())
            self._detector = Detector.load(intact(detector)) if is_there(detector) else None
            if self._detector:
                self._detector.check(*self._opened(), found=binding)
            self.vectors = Vectors(cell, contrast, self._asking, binding)
            self.neurons = Neurons(self._asking, contrast, self._records.both_sides("tune", WATCHED))
            self._items = {pair[1].item: pair[1] for pair in self._records.both_sides("test", len(self._records.pairs))}
        self._prefixes: OrderedDict[Example, list[Batch]] = OrderedDict()

    def _opened(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        return self._asking.model, self._asking.tokenizer

    def facts(self) -> CellFacts:
        """Its layers, vectors and whether it has a detector."""
        layers = len(blocks_of(self._asking.model))
        return CellFacts(layers=layers, detects=self._detector is not None, methods=self.vectors.methods())

    def pairs(self, n: int) -> list[Pair]:
        """Up to ``n`` test pairs, one of every group before a second of any."""
        seen: Counter[str] = Counter()
        ranked: list[tuple[int, Pair]] = []
        for generalized, memorized in self._records.both_sides("test", 20 * n):
            pair: Pair = {"memorized": Question.of(memorized), "generalized": Question.of(generalized)}
            ranked.append((seen[memorized.group], pair))
            seen[memorized.group] += 1
        return [pair for _, pair in sorted(ranked, key=itemgetter(0))[:n]]

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
        vector = steering.alpha * self.vectors.part(steering) if steering else None
        applied = partial(vector.apply, self._asking.model) if vector else nullcontext
        (tokens,) = self._asking.tokens([self._asking.text(question.prompt)])
        if len(tokens) > LONGEST:
            raise InputError(f"prompt: {len(tokens)} tokens; at most {LONGEST} are read here")
        example = question.example()
        if example is None:
            return self._continue(question.prompt, applied)
        batches = self._prefix(example)
        if vector and vector.layers and vector.positions == "all":
            batches = [without_prefix(batch) for batch in batches]
        return self._choose(example, batches, applied)

    def _continue(self, prompt: str, applied: Applied) -> Answer:
        """What follows a prompt whose revealing answers are not known."""
        check_known(self._asking, [prompt])
        model, inputs = self._asking.model, self._asking.padded([self._asking.text(prompt)])
        with applied():
            said = complete(model, self._asking.tokenizer, inputs, NEW_TOKENS)[0]
        if self._detector is None:
            return Answer(said=said)
        with applied():
            states_NLD = states_at_the_end(model, inputs.input_ids, inputs.attention_mask, self._detector.site)
        return Answer(said=said, reading=DetectorReading.first_of(self._detector.read(states_NLD)))

    def _choose(self, example: Example, batches: list[Batch], applied: Applied) -> Answer:
        """Which of two revealing answers follows, and the probabilities of both."""
        site = self._detector.site if self._detector else None
        scores = score(self._asking, batches, margins=False, capture=site, applied=applied)
        with torch.no_grad(), applied():
            memorized, generalized = log_probabilities(self._asking, batches[0])[0].double().exp().tolist()
        behaviour, read = str(scores.behaviour_N[0]), None
        if self._detector and scores.states_NLD is not None:
            read = DetectorReading.first_of(self._detector.read(scores.states_NLD))
        named = {"memorized": example.memorized, "generalized": example.generalized}
        said = named[behaviour] if behaviour in named else decode(self._asking, [example], applied)[0]
        return Answer(behaviour=behaviour, said=said, p_memorized=memorized, p_generalized=generalized, reading=read)

    def snippets(self, asked: Asked) -> dict[str, str]:
        """Lines that give the answer without the page; both empty without steering.

        ``python``, and ``command`` where the command line can do it.
        """
        steering, prompt, shape = asked.steering, asked.question.prompt, self.cell.config.model
        if steering is None:
            return {"python": "", "command": ""}
        self.vectors.part(steering)  # refuses what there is none of
        # A chat template, a layout or another precision has no place in these lines.
        is_plain = not (shape.chat or shape.layout or shape.device_map) and shape.dtype == "float32"
        if steering.layers is not None or steering.neurons is not None or not is_plain:
            arguments = ", ".join(f"{name}={value!r}" for name, value in steering if value is not None)
            run = str(self.cell.folder.parents[1].resolve())
            given = f", model={str(self.model)!r}" if self.model else ""
            python = PART.format(run=run, cell=self.cell.name, given=given, prompt=prompt, steering=arguments)
            return {"python": python, "command": ""}
        model = shape.folder if shape.folder and not shape.is_trained else str(self.cell.model_folder)
        if Path(model).is_dir():  # from wherever it is pasted
            model = str(Path(model).resolve())
        vector = str(self.vectors.path(steering.toward, steering.method).resolve())
        words = ["mnemoscope", "steer", model, "--from", vector, "--toward", steering.toward]
        return {
            "python": WHOLE.format(model=model, vector=vector, alpha=steering.alpha, prompt=prompt),
            "command": shlex.join([*words, "--alpha", f"{steering.alpha:g}", "--", prompt]),
        }

    def _prefix(self, example: Example) -> list[Batch]:
        """The question as a batch of one, its prompt read up to the decision position; the latest ones are kept."""
        if example not in self._prefixes:
            self._prefixes[example] = with_prefixes(self._asking, [example])
        self._prefixes.move_to_end(example)
        while len(self._prefixes) > 1 and sum(kept_bytes(b) for bs in self._prefixes.values() for b in bs) > PREFIXES:
            self._prefixes.popitem(last=False)
        return self._prefixes[example]
