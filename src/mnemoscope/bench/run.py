"""An arena: every method on one frozen set, method by method, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mnemoscope.behaviour import PLAIN, Asking, Prompting
from mnemoscope.bench.judge import UNSTEERED
from mnemoscope.bench.lists import told_by_answers
from mnemoscope.bench.trial import LEVERS, Found, Trial, carried
from mnemoscope.config import parse_arena
from mnemoscope.interventions import Binding, Toward
from mnemoscope.interventions.methods import method_module, method_names, name_of
from mnemoscope.models import load_model
from mnemoscope.report import build_arena
from mnemoscope.report.stories.arena import SCHEMA
from mnemoscope.runs.digests import STAGES, intact, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import plain, write_atomically
from mnemoscope.runs.locks import locked
from mnemoscope.runs.processes import in_processes
from mnemoscope.runs.schemas import FrameFacts
from mnemoscope.runs.strict import read_json
from mnemoscope.runs.telling import Progress, shown
from mnemoscope.tasks import Task, allow_code, examples_digest, named_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Columns of the set that a continued arena must find.
ASKED = ("list", "example", "item", "prompt", "memorized", "generalized", "answer")
CHOICES = ("sizes", "prompting", "name", "progress", "workers", "opening", "carry")
NEAR = 0.1  # of worth on tune: what is fitted again


def arena(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    task: str | Task | Any = None,
    out: str | Path = "runs/arena",
    *,
    methods: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    **choices: Any,
) -> Path:
    """Run every method on one frozen set of conflicts, in both directions, and build the page; returns its path.

    Args:
        model: an open causal language model, which stays unchanged, or a name or path for ``load_model``.
        tokenizer: of an open model.
        task: a JSONL file, a task's name, ``package.module:Class``, or a ``Task``.
        out: the run folder; the arena is in ``out/arena``, and an interrupted one continues there.
        methods: names of methods (``interventions.methods``); default: all. What cannot be fitted is left out and
            named; if it was asked for by name, its reason is raised.
        options: of a task that is given by name.
        choices: ``sizes``, fields of ``ArenaConfig``; ``prompting``, the format of prompts; ``name`` of the model on
            the page; ``progress``, True to show how far it is, or what is called with (cell, stage, done, total, note);
            ``carry``, run folders of other arenas on this model, whose fits are judged here; of a model that is given
            by name ``workers``, processes that fit and judge, and ``opening``, other arguments of ``load_model``.

    Raises:
        InputError: an argument cannot be used, nothing is known by heart, or there are too few groups.
    """
    for choice in choices:
        if choice not in CHOICES:
            raise InputError(f"{choice}: arena has no such argument; it has {', '.join(CHOICES)}")
    allow_code(*(method for method in methods or () if "." in method))  # it is the user who names them
    methods = [name_of(method) for method in methods or () if method_module(method)] or None
    config = parse_arena(dict(choices.get("sizes") or {}))
    elsewhere = _carried(choices.get("carry") or ())
    made = _task(task, dict(options or {}), config.seed)
    is_open = not isinstance(model, str | Path)
    name = choices.get("name") or (type(model).__name__ if is_open else Path(str(model)).name)
    source, workers, opening = None if is_open else model, choices.get("workers") or 1, choices.get("opening") or {}
    if is_open and workers > 1:
        raise InputError(f"workers: {workers}; an open model is in one process, so give it by name or path")
    if opening if is_open else tokenizer:
        raise InputError("opening: not for an open model" if is_open else "tokenizer: not for a model given by name")
    if isinstance(model, str | Path):
        model, tokenizer = load_model(model, **opening)
    if tokenizer is None:
        raise InputError("tokenizer: None; an open model needs its tokenizer (or give the model by name)")
    prompting = _warned(choices.get("prompting") or PLAIN, tokenizer).of(made)
    asking = Asking(model, tokenizer, made.boundary, prompting=prompting)
    folder, threads, training = Path(out) / "arena", torch.get_num_threads(), model.training
    trial = Trial(asking, source, made, config, prompting, opening, folder / LEVERS, elsewhere)
    torch.set_num_threads(config.threads)
    model.eval()
    try:
        with shown(choices.get("progress")) as tell:
            _Run(trial, folder, name, tell, workers).go(methods)
    finally:
        torch.set_num_threads(threads)
        model.train(training)
    return build_arena(Path(out))


def _carried(runs: Sequence[Path | str]) -> dict[str, Any]:
    """What other arenas have fitted, by name; InputError where two have the same names."""
    found = [one for run in runs for one in carried(Path(run) / "arena")]
    if len(by_name := dict(found)) < len(found):
        raise InputError("carry: two runs are of one task in one format; carry them in arenas of their own")
    return by_name


def _warned(prompting: Prompting, tokenizer: PreTrainedTokenizerFast) -> Prompting:
    """The format of prompts, with a warning where the model's own is left out."""
    if tokenizer.chat_template and not prompting.chat:
        logging.getLogger("mnemoscope").warning("chat: this model has a chat template, and is asked without it")
    return prompting


def _task(task: Any, options: dict[str, Any], seed: int) -> Task:
    if task is None:
        raise InputError("task: None; give a JSONL file, the name of a task, package.module:Class, or a Task")
    return named_task(task, options, seed)


def _cells(table: pd.DataFrame, name: str) -> list[str]:
    return ["" if pd.isna(value) else str(value) for value in table[name]]


class _Run:
    """The run of an arena in its folder."""

    def __init__(self, trial: Trial, folder: Path, model: str, tell: Progress, workers: int) -> None:
        self.trial, self.asking, self.task, self.config = trial, trial.opened, trial.task, trial.config
        self.folder, self.tell, self.workers = folder, tell, workers
        self.facts, self.written = self._facts(model), list[Path]()

    def go(self, methods: Sequence[str] | None) -> None:
        """Run what is not done yet."""
        with locked(self.folder, lambda: self._done(UNSTEERED)):
            self._check_folder()
            chosen = [*(methods or method_names()), *self.trial.elsewhere]
            if not all(map(self._done, (UNSTEERED, *chosen, *self._again(chosen)))):
                self._run(chosen, methods is not None)

    def _run(self, chosen: Sequence[str], by_name: bool) -> None:
        self.tell("arena", "frame", 0, 1, "freezing the test set")
        frame = self.trial.frame
        bench = frame.bench
        counts: dict[str, Any] = {"asked": bench.known.asked, "known": len(bench.known.items)}
        counts |= {"order": list(dict.fromkeys([*method_names(), *chosen])), "no_gate": frame.gates.why_none}
        counts |= {"by_answers": told_by_answers(bench), "gates": frame.gates.names}
        counts |= {"lists": {name: len(prompts) for name, prompts in frame.lists.items()}}
        self._write_set(frame.table())
        self._write_json("frame", self.facts | counts)
        if not self._done(UNSTEERED):
            self._write(UNSTEERED, Found({"passes": 1, "changes_weights": False}, frame.judged(None, UNSTEERED)))
        with in_processes(self.workers, self.config.threads) as mapped:
            for waiting in (lambda: chosen, lambda: self._again(chosen)):  # the second depends on the first
                names = [name for name in waiting() if not self._done(name)]
                for number, (name, found) in enumerate(zip(names, mapped(self.trial, names), strict=True)):
                    self.tell("arena", name, number, len(names), "")
                    if by_name and "left_out" in found.facts:
                        raise InputError(found.facts["left_out"])
                    self._write(name, found)
        self.tell("arena", "page", 1, 1, "")

    def _again(self, chosen: Sequence[str]) -> list[str]:
        """Further fits: of all that is trained, and of what is fitted and within a tenth of the best on tune."""
        done = [name for name in chosen if self._done(name)]
        read = {name: read_json(intact(self.folder / f"{name}.json"), dict[str, Any]) for name in done}
        found = {name: facts for name, facts in read.items() if "left_out" not in facts}
        worth = {name: [facts["toward"][to]["tune"]["worth"] for to in Toward] for name, facts in found.items()}
        best = [max(side) for side in zip(*worth.values(), strict=True)]
        again = [
            name
            for name, facts in found.items()
            if facts["fitted"]
            and (facts["trained"] or any(w >= b - NEAR for w, b in zip(worth[name], best, strict=True)))
        ]
        return [f"{name}@{number}" for name in again for number in range(2, self.config.fits + 1)]

    def _write(self, name: str, found: Found) -> None:
        self.written += found.files
        for kind, table in found.tables.items():
            self._write_table(f"{name}-{kind}", table)
        self._write_json(name, found.facts)

    def _write_set(self, table: pd.DataFrame) -> None:
        """Write the frozen set; InputError where methods were judged on another one, as after a change of rounding."""
        path = self.folder / "set.parquet"
        if not self._done("frame"):
            return self._write_table("set", table)
        before = pd.read_parquet(intact(path))
        if not all(_cells(before, name) == _cells(table, name) for name in ASKED):
            raise InputError(
                f"out: {self.folder} holds an arena on another frozen set than this model gives here, as on another "
                "machine or after an update; give another folder"
            )
        self.written.append(path)  # other columns may differ in their last bits

    def _facts(self, model: str) -> dict[str, Any]:
        """What a continued arena must have in common with the one before."""
        return {
            "schema": SCHEMA,
            "model": model,
            "weights": Binding.of(self.asking.model, self.asking.tokenizer).weights,
            "dtype": str(self.asking.model.dtype).removeprefix("torch."),
            "task": self.task.name,
            "examples": examples_digest(self.task, self.config.seed),
            "sizes": self.config.model_dump(),
            "prompting": self.asking.prompting.facts,
        }

    def _check_folder(self) -> None:
        before = read_json(intact(self.folder / "frame.json"), FrameFacts) if self._done("frame") else self.facts
        for field, value in self.facts.items():
            if before.get(field) != value:
                raise InputError(
                    f"out: {self.folder} holds an arena whose {field} is {before.get(field)!r}; this one has {value!r}"
                )

    def _done(self, name: str) -> bool:
        return all((folder / f"{name}.json").is_file() for folder in (self.folder, self.folder / STAGES))

    def _write_json(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write facts, then the marker of all that was written since the last one: what says that it is done."""
        text = json.dumps(plain(dict(facts)), indent=1, allow_nan=False) + "\n"
        self.written.append(write_atomically(self.folder / f"{name}.json", text.encode()))
        write_marker(self.folder, name, self.written)
        self.written = []

    def _write_table(self, name: str, table: pd.DataFrame) -> None:
        path = self.folder / f"{name}.parquet"
        self.written.append(write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False)))
