"""The numbers of a run that somebody who fitted a vector looks at first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mnemoscope.report.schema import Chosen, Direction, Steered, TaskResults
from mnemoscope.report.words import CONTROLS, TOWARDS, count, largest_loss, layers, percent, ranged
from mnemoscope.statistics import Estimate


class DirectionSummary(BaseModel):
    """The best vector of one direction on test pairs.

    Attributes:
        pairs: share steered; ``other``: share that gives neither answer.
        strongest_control, control: its name, and the share that it steers; None where none was run.
        collateral: change in accuracy by list.
    """

    chosen: Chosen
    pairs: Estimate
    other: Estimate
    strongest_control: str | None
    control: Estimate | None
    collateral: dict[str, Estimate]

    @classmethod
    def of(cls, block: Steered) -> DirectionSummary:
        """The first numbers of a direction."""
        name = block.strongest()
        control = block.controls[name].pairs.shift if name else None
        found = {"chosen": block.chosen, "pairs": block.pairs.shift, "other": block.pairs.other}
        return cls(**found, strongest_control=name, control=control, collateral=block.collateral)

    def __str__(self) -> str:
        chosen, control = self.chosen, "none"
        if self.strongest_control and self.control:
            control = f"{percent(self.control.estimate)} ({CONTROLS[self.strongest_control]})"
        limits = "" if chosen.within_limits else "; beyond the limits"
        return (
            f"{ranged(self.pairs)} of {count(self.pairs.n, 'test pair')} steered by {chosen.method} at {chosen.site}, "
            f"{layers(chosen.layers)}, strength {chosen.strength:g}; strongest control {control}{limits}"
        )


class TaskSummary(BaseModel):
    """The first numbers of a task.

    Attributes:
        differ: share of neurons that differ; ``read``: accuracy of the probe; ``foreseen``: AUROC of the detector.
        pairs, groups: of all splits; ``test_pairs``: of the test split.
        flips: pairs / candidates of the test split.
        alike: share of the fit phrasings whose two answers begin with the same tokens.
    """

    weights: str | None
    differ: Estimate
    read: Estimate
    foreseen: Estimate | None
    pairs: int
    groups: int
    test_pairs: int
    flips: Estimate
    alike: float
    directions: dict[Direction, DirectionSummary]

    @classmethod
    def of(cls, task: TaskResults) -> TaskSummary:
        """The first numbers of a task."""
        everything = task.pairs.by_split["all"]
        return cls(
            weights=task.weights,
            differ=task.contrast.significant,
            read=task.probe.best.accuracy,
            foreseen=task.detection.auroc.p_memorized if task.detection else None,
            pairs=everything.pairs,
            groups=everything.groups,
            test_pairs=task.pairs.pairs,
            flips=task.pairs.yield_,
            alike=max(block.chosen.begin_alike or 0.0 for block in task.steering.values()),
            directions={direction: DirectionSummary.of(block) for direction, block in task.steering.items()},
        )

    def lines(self, name: str) -> list[str]:
        """The answers in sentences: do they differ, can it be read, can it be steered and at what cost."""
        title = f"{name} ({self.weights})" if self.weights else name
        counts = f"{count(self.pairs, 'pair')} of {count(self.groups, 'group')}, yield {ranged(self.flips)}"
        lines = [f"{title}: {counts}"]
        lines.append(f"  differ: {percent(self.differ.estimate)} of neurons, all tested together")
        lines.append(f"  read: {ranged(self.read)} of test states by a linear probe")
        for direction, block in self.directions.items():
            lines.append(f"  {TOWARDS[direction]}: {block}; largest loss {largest_loss(block.collateral, direction)}")
        if self.alike:
            lines.append(
                f"  {percent(self.alike)} of the prompts have two answers that begin alike: the numbers hold where that "
                "beginning stands at the end of the prompt"
            )
        if self.foreseen:
            lines.append(f"  P(memorized) ranks {ranged(self.foreseen)} right")
        return lines


class Summary(BaseModel):
    """The first numbers of a run by task; ``print`` it."""

    tasks: dict[str, TaskSummary]

    def __str__(self) -> str:
        return "\n".join(line for name, task in self.tasks.items() for line in task.lines(name))


def summary_of(run: str | Path) -> Summary:
    """The summary of a run folder, from its ``results.json``."""
    return _summary(json.loads((Path(run) / "results.json").read_text(encoding="utf-8")))


def _summary(results: dict[str, Any]) -> Summary:
    """Tasks that another version has written are left out."""
    found = {}
    for name, task in results.get("tasks", {}).items():
        try:
            found[name] = TaskSummary.of(TaskResults.model_validate({**task, "per_seed": {}}))
        except (ValidationError, TypeError):
            continue
    return Summary(tasks=found)


def in_words(run: str | Path) -> list[str]:
    """The lines of the summary of a run folder."""
    return str(summary_of(run)).splitlines()


def brief_of(run: str | Path) -> dict[str, Any]:
    """The numbers of the summary as plain data, as ``mnemoscope fit --json`` prints them."""
    return _brief(summary_of(run))


def brief(results: dict[str, Any]) -> dict[str, Any]:
    """The same from the content of ``results.json``."""
    return _brief(_summary(results))


def _brief(summary: Summary) -> dict[str, Any]:
    found = {}
    for name, task in summary.tasks.items():
        kept = task.model_dump(include={"differ", "read", "pairs", "test_pairs"})
        kept |= {"weights": task.weights} if task.weights else {}
        kept |= {"detect_auroc": task.model_dump()["foreseen"]} if task.foreseen else {}
        found[name] = {**kept, **{direction: block.model_dump() for direction, block in task.directions.items()}}
        for direction in task.directions:
            found[name][direction]["chosen"] = task.directions[direction].chosen.model_dump(exclude_none=True)
    return found


def compare_briefs(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Two runs side by side: a row for each number that either has, with ``first`` and ``second`` in words."""
    rows = []
    for task in {**first, **second}:
        ours, theirs = (_in_rows(found[task]) if task in found else {} for found in (first, second))
        for what in {**ours, **theirs}:
            rows.append({"task": task, "what": what, "first": ours.get(what, "-"), "second": theirs.get(what, "-")})
    return rows


def _in_rows(task: dict[str, Any]) -> dict[str, str]:
    rows = {"pairs": f"{task['pairs']:,.0f}", "test pairs": f"{task['test_pairs']:,.0f}"}
    rows |= {"neurons that differ": ranged(Estimate(**task["differ"]))}
    rows |= {"test states read right by a probe": ranged(Estimate(**task["read"]))}
    for direction, name in TOWARDS.items():
        block = DirectionSummary.model_validate(task[direction])
        chosen = block.chosen
        rows[f"{name}: method"] = f"{chosen.method}, {chosen.site}, strength {chosen.strength:g}"
        rows[f"{name}: test pairs steered"] = ranged(block.pairs)
        rows[f"{name}: strongest control"] = ranged(block.control) if block.control else "none"
        rows[f"{name}: cost"] = largest_loss(block.collateral, direction)
    if "detect_auroc" in task:
        rows["P(memorized) ranks right"] = ranged(Estimate(**task["detect_auroc"]))
    return rows
