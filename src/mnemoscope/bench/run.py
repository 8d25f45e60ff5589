"""An arena: every method on one frozen set, method by method, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from mnemoscope.behaviour import PLAIN, Asking
from mnemoscope.bench.choose import Rule, choose, rate
from mnemoscope.bench.judge import TABLES, UNSTEERED, Frame
from mnemoscope.bench.lists import DrawnBench, told_by_answers
from mnemoscope.config import ArenaConfig, parse_arena
from mnemoscope.interventions import Binding, Intervention, SteeringVector, Toward
from mnemoscope.interventions.controls import has_equal_norm
from mnemoscope.interventions.methods import candidates, method_module, method_names, name_of
from mnemoscope.interventions.shifts import norm_of
from mnemoscope.models import load_model
from mnemoscope.report import build_arena
from mnemoscope.runs.digests import STAGES, intact, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import plain, write_atomically
from mnemoscope.runs.locks import locked
from mnemoscope.runs.schemas import FrameFacts
from mnemoscope.runs.strict import read_json
from mnemoscope.runs.telling import Progress, shown
from mnemoscope.tasks import Task, allow_code, examples_digest, named_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SCHEMA = 2  # 1: before two-pass methods had to close their answers
ASKED = ("list", "example", "item", "prompt", "memorized", "generalized", "answer")
FROZEN = (*ASKED, *(f"acts_{toward}" for toward in Toward))  # columns of the set that a continued arena must find
CHOICES = ("sizes", "prompting", "name", "progress")


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
            the page; ``progress``, True to show how far it is, or what is called with (cell, stage, done, total, note).

    Raises:
        InputError: an argument cannot be used, nothing is known by heart, or there are too few groups.
    """
    for choice in choices:
        if choice not in CHOICES:
            raise InputError(f"{choice}: arena has no such argument; it has {', '.join(CHOICES)}")
    allow_code(*(method for method in methods or () if "." in method))  # it is the user who names them
    for method in methods or ():
        method_module(method)
    methods = [name_of(method) for method in methods] if methods else None
    config = parse_arena(dict(choices.get("sizes") or {}))
    made = task if isinstance(task, Task) else _task(task, dict(options or {}), config.seed)
    is_open = not isinstance(model, str | Path)
    name = choices.get("name") or (type(model).__name__ if is_open else Path(str(model)).name)
    if isinstance(model, str | Path):
        model, tokenizer = load_model(model)
    if tokenizer is None:
        raise InputError("tokenizer: None; an open model needs its tokenizer (or give the model by name)")
    asking = Asking(model, tokenizer, made.boundary, prompting=choices.get("prompting") or PLAIN)
    folder, threads, training = Path(out) / "arena", torch.get_num_threads(), model.training
    torch.set_num_threads(config.threads)
    model.eval()
    try:
        with shown(choices.get("progress")) as tell:
            _Run(asking, made, config, folder, name, tell).go(methods)
    finally:
        torch.set_num_threads(threads)
        model.train(training)
    return build_arena(Path(out))


def _task(task: Any, options: dict[str, Any], seed: int) -> Task:
    if task is None:
        raise InputError("task: None; give a JSONL file, the name of a task, package.module:Class, or a Task")
    return named_task(task, options, seed)


def _cells(table: pd.DataFrame, name: str) -> list[str]:
    return ["" if pd.isna(value) else str(value) for value in table[name]]


def _norm(one: Intervention, bench: DrawnBench) -> float:
    """Of a vector, how far it moves states; NaN for what has no norm."""
    if not has_equal_norm(one):
        return math.nan
    assert isinstance(one, SteeringVector)
    return norm_of(one, bench.sources(one.site))


class _Run:
    """The run of an arena in its folder."""

    def __init__(
        self, asking: Asking, task: Task, config: ArenaConfig, folder: Path, model: str, tell: Progress
    ) -> None:
        self.asking, self.task, self.config, self.folder, self.tell = asking, task, config, folder, tell
        self.facts, self.written = self._facts(model), list[Path]()

    def go(self, methods: Sequence[str] | None) -> None:
        """Run what is not done yet."""

        with locked(self.folder, lambda: self._done(UNSTEERED)):
            self._check_folder()
            chosen = list(methods or method_names())
            waiting = [name for name in (UNSTEERED, *chosen) if not self._done(name)]
            if waiting:
                self._run(chosen, waiting, methods is not None)

    def _run(self, chosen: Sequence[str], waiting: Sequence[str], by_name: bool) -> None:
        self.tell("arena", "frame", 0, 1, "freezing the test set")
        bench = DrawnBench.of(self.asking, self.task, self.config)
        frame = Frame.of(bench)
        counts: dict[str, Any] = {"asked": bench.known.asked, "known": len(bench.known.items)}
        counts |= {"order": list(dict.fromkeys([*method_names(), *chosen])), "no_gate": frame.why}
        counts["by_answers"] = told_by_answers(bench)
        counts |= {"lists": {name: len(prompts) for name, prompts in frame.lists.items()}}
        self._write_set(frame.table())
        self._write_json("frame", self.facts | counts)
        for number, name in enumerate(waiting):
            self.tell("arena", name, number, len(waiting), "")
            try:
                facts = self._unsteered(frame) if name == UNSTEERED else self._method(name, frame)
            except InputError as error:
                if by_name:
                    raise
                facts = {"left_out": str(error)}
            self._write_json(name, facts)
        self.tell("arena", "page", 1, 1, "")

    def _write_set(self, table: pd.DataFrame) -> None:
        """Write the frozen set; InputError where methods were judged on another one, as after a change of rounding."""
        path = self.folder / "set.parquet"
        if not self._done("frame"):
            return self._write_table("set", table)
        before = pd.read_parquet(intact(path))
        if not all(_cells(before, name) == _cells(table, name) for name in FROZEN):
            raise InputError(
                f"out: {self.folder} holds an arena on another frozen set than this model gives here, as on another "
                "machine or after an update; give another folder"
            )
        self.written.append(path)  # other columns may differ in their last bits

    def _unsteered(self, frame: Frame) -> dict[str, Any]:
        for kind, table in frame.judged(None, UNSTEERED).items():
            self._write_table(f"{UNSTEERED}-{kind}", table)
        return {"passes": 1, "changes_weights": False}

    def _method(self, name: str, frame: Frame) -> dict[str, Any]:
        """Fit, choose and judge a method in both directions; write its tables and return what was chosen."""
        bench, found, judged = frame.bench, dict[str, Any](), list[dict[str, pd.DataFrame]]()
        for toward in Toward:
            times = [time.perf_counter()]
            tried = candidates(name, bench, toward)
            times.append(time.perf_counter())
            lists = bench.choosing()
            rated = [rate(one, lists.targets, place) for place, one in enumerate(tried)]
            compared = choose(bench, lists, rated, Rule(errors=self.config.errors))
            best = compared[0]
            times.append(time.perf_counter())
            judged.append(frame.judged(best.one, toward))
            times.append(time.perf_counter())
            tune = {"wanted": best.rated.wanted.estimate, "lost": best.lost, "worth": best.worth}
            found[toward] = {
                "setting": dict(best.one.setting),
                "tune": tune | {"compared": len(compared)},
                "tried": len(tried),
                "norm": _norm(best.one, bench),
                "seconds": dict(zip(("fit", "choose", "judge"), np.diff(times).tolist(), strict=True)),
            }
        for kind in TABLES:
            self._write_table(f"{name}-{kind}", pd.concat([tables[kind] for tables in judged], ignore_index=True))
        one = best.one
        facts = {"passes": one.passes, "changes_weights": one.changes_weights, "joined": one.contrast is not None}
        return facts | {"toward": found}

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
