"""A trial in an arena: a method is fitted, or carried over, chosen on tune, and judged on the frozen set."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, Prompting
from mnemoscope.bench.choose import Rule, choose, rate, searched_on
from mnemoscope.bench.judge import TABLES, Frame
from mnemoscope.bench.known import Known
from mnemoscope.bench.lists import DrawnBench
from mnemoscope.config import ArenaConfig
from mnemoscope.interventions import Intervention, SteeringVector, Toward
from mnemoscope.interventions.contract import load_intervention
from mnemoscope.interventions.controls import has_equal_norm
from mnemoscope.interventions.methods import can_refit, candidates, method_module, nulls, refitted
from mnemoscope.interventions.shifts import norm_of
from mnemoscope.interventions.sources import ANSWERED, PERMUTED
from mnemoscope.models import load_model
from mnemoscope.runs.digests import intact
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import FrameFacts
from mnemoscope.runs.strict import read_json
from mnemoscope.tasks import Task

LEVERS = "levers"  # folder of an arena for what was fitted and chosen


class Carried(NamedTuple):
    """What another arena has fitted: the folder of its interventions, the method, and on what it was fitted."""

    folder: Path
    method: str
    origin: str


class Found(NamedTuple):
    """Facts of a trial with ``left_out`` where it cannot be had, its tables by kind, and what it has written."""

    facts: dict[str, Any]
    tables: Mapping[str, pd.DataFrame]
    files: Sequence[Path] = ()


def carried(folder: Path) -> Iterator[tuple[str, Carried]]:
    """By a name of its own, what is fitted in another arena; InputError where there is none."""
    if not (folder / "frame.json").is_file():
        raise InputError(f"carry: {folder.parent} holds no arena")
    frame = read_json(intact(folder / "frame.json"), FrameFacts)
    origin = frame["task"] + ("-chat" if frame["prompting"]["chat"] else "")
    for path in sorted((folder / LEVERS).glob(f"{Toward.GENERALIZED}-*")):
        method = path.stem.removeprefix(f"{Toward.GENERALIZED}-")
        if path.suffix != ".json":
            yield f"{method}-from-{origin}", Carried(path.parent, method, origin)


@dataclass
class Trial:
    """Fits, chooses and judges methods on the frame, which each process makes for itself.

    Attributes:
        source: name or path of the model, for other processes, which open it with ``opening``; None: it is open.
        levers: folder for what is fitted; ``elsewhere``: by name, what was fitted in other arenas.
        known: what the model answers by heart, once it was asked.
    """

    asking: Asking | None
    source: str | Path | None
    task: Task
    config: ArenaConfig
    prompting: Prompting
    opening: Mapping[str, Any]
    levers: Path
    elsewhere: Mapping[str, Carried]
    known: Known | None = None
    _frame: Frame | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"asking": None, "_frame": None}

    @property
    def opened(self) -> Asking:
        """The model, ready to be asked."""
        if self.asking is None:
            assert self.source is not None, "an open model is in one process"
            model, tokenizer = load_model(self.source, **self.opening)
            self.asking = Asking(model.eval(), tokenizer, self.task.boundary, prompting=self.prompting)
        return self.asking

    @property
    def frame(self) -> Frame:
        """What all are judged on."""
        if self._frame is None:
            bench = DrawnBench.of(self.opened, self.task, self.config, self.known)
            self._frame, self.known = Frame.of(bench), bench.known
        return self._frame

    def __call__(self, name: str) -> Found:
        """The trial of a method, or with ``@2`` behind its name of one more fit in the setting of its first one."""
        try:
            return self._judged(*name.partition("@")[::2])
        except InputError as error:
            return Found({"left_out": str(error)}, {})

    def _judged(self, name: str, number: str) -> Found:
        bench = self.frame.bench.again(int(number or 1) - 1)
        found, judged, files, lists = dict[str, Any](), list[dict[str, pd.DataFrame]](), list[Path](), bench.choosing()
        rule = Rule(errors=self.config.errors)
        for toward in Toward:
            times = [time.perf_counter()]
            tried = self._tried(name, bench, toward)
            times.append(time.perf_counter())
            rated = [rate(one, lists.targets, place) for place, one in enumerate(tried)]
            compared = choose(bench, lists, rated, rule)
            is_set = name in self.elsewhere or (bool(number) and can_refit(name))
            best, at_end = (compared[0], False) if is_set else searched_on(bench, lists, compared[0], rule)
            one = best.one
            times.append(time.perf_counter())
            judged.append(self.frame.judged(one, toward, bench))
            times.append(time.perf_counter())
            tune: dict[str, Any] = {"wanted": best.rated.wanted.estimate, "lost": best.lost, "worth": best.worth}
            tune |= {"compared": len(compared), "at_end": at_end, "by_gate": self.frame.by_gate(one)}
            found[toward] = {
                "setting": dict(one.setting),
                "tune": tune,
                "tried": len(tried),
                "norm": norm_of(one, bench.sources(one.site)) if has_equal_norm(one) else math.nan,
                "seconds": dict(zip(("fit", "choose", "judge"), np.diff(times).tolist(), strict=True)),
            }
            files += [] if is_set or number else self._saved(one)
        tables = {kind: pd.concat([part[kind] for part in judged], ignore_index=True) for kind in TABLES}
        return Found(self._facts(name, one) | {"toward": found}, tables, files)

    def _facts(self, name: str, one: Intervention) -> dict[str, Any]:
        """What a method is, in either direction."""
        here = name not in self.elsewhere
        return {
            "passes": one.passes,
            "changes_weights": one.changes_weights,
            "words": type(one).prompt is not Intervention.prompt,
            "fitted": here and (isinstance(one, SteeringVector) or one.changes_weights),
            "trained": here and PERMUTED in nulls(name),
            "oracle": here and getattr(method_module(name), "ORACLE", False),
            "carried": None if here else list(self.elsewhere[name][1:]),
        }

    def _tried(self, name: str, bench: DrawnBench, toward: Toward) -> Sequence[Intervention]:
        """Settings of a method; of what was carried over, or is fitted again, the one that there is."""
        model, tokenizer = self.opened.model, self.opened.tokenizer
        if name in self.elsewhere:
            folder, method, _ = self.elsewhere[name]
            return [load_intervention(folder / f"{toward}-{method}.safetensors", model, tokenizer)]
        if bench is self.frame.bench or not can_refit(name):
            return candidates(name, bench, toward)
        first = load_intervention(self.levers / f"{toward}-{name}.safetensors", model, tokenizer)
        return refitted(bench, first, [ANSWERED])

    def _saved(self, one: Intervention) -> list[Path]:
        """The files of what was fitted and chosen, so that it is fitted again, and judged elsewhere."""
        if not isinstance(one, SteeringVector) and not one.changes_weights:
            return []
        about: dict[str, Any] = {"task": self.task.name, "prompting": self.prompting}
        bound = replace(one, **about).bound_to(self.opened.model, self.opened.tokenizer)
        self.levers.mkdir(parents=True, exist_ok=True)
        return bound.save(self.levers / f"{one.toward}-{one.method}.safetensors")
