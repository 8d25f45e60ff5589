"""The numbers of a run that somebody who fitted a vector looks at first."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mnemoscope.report import words
from mnemoscope.report.schema import REFITTED, Aim, Chosen, Direction, TaskResults
from mnemoscope.report.steer import other_ways
from mnemoscope.report.words import TOWARDS, count, counted, percent, ranged
from mnemoscope.runs.digests import intact
from mnemoscope.runs.strict import read_json
from mnemoscope.statistics import LEAST_GROUPS, Estimate

VECTOR, WORDS = "this vector", "asking in words"
LEARNED = ("learned", "low-rank")
BEYOND = "on tune this vector exceeds a limit (of its controls, of what it loses or leaves neither way); "
MOST_OTHER, MOST_LOST = 0.15, 0.1  # of test examples; settings are chosen within narrower limits on tune
GROUPS_NEEDED = 30  # with which an interval of a share is about 18 points to either side
OPTIONAL = ("weights", "detect_auroc")  # of a brief: left out where there is none


class DirectionSummary(BaseModel):
    """The best vector of one direction on the aim's test examples, and what a user should take."""

    advice: str
    ways: dict[str, Estimate]  # share that ends in the wanted behaviour: the vector, and what needs none
    aim: Aim
    chosen: Chosen
    shift: Estimate  # share steered
    other: Estimate  # share that gives neither answer
    strongest_control: str | None  # its name, in words; None where none was run
    control: Estimate | None  # the share that it steers
    noise_only: bool = False  # whether no control was learned, though the vector was
    collateral: dict[str, Estimate]  # change in accuracy by list

    @classmethod
    def of(cls, task: TaskResults, direction: Direction) -> DirectionSummary:
        """The first numbers of a direction."""
        aim, block = task.aim, task.steering[direction].for_aim(task.aim)
        control, found = block.beside.get(aim), getattr(block, aim)
        ways = {VECTOR: found.shift, **other_ways(task, direction)}
        chosen = block.chosen if aim == "pairs" else block.chosen_conflict
        broken = breaks(found.other, block.broken(aim), direction)
        beyond = control is None or control.difference.sign > 0
        learned = any(n in REFITTED and getattr(c, aim).shift.known for n, c in block.controls.items())
        return cls(
            advice=("" if chosen.within_limits else BEYOND) + broken + advice(ways, beyond),
            ways=ways,
            aim=aim,
            chosen=chosen,
            shift=found.shift,
            other=found.other,
            strongest_control=words.control_names(control) if control else None,
            control=control.shift if control else None,
            noise_only=chosen.method in LEARNED and not learned,
            collateral=block.lost(aim),
        )

    def rows(self, direction: Direction) -> dict[str, str]:
        """What to use; what the vector does, beside which control, at what cost, and its setting."""
        control, chosen, name = "none", self.chosen, TOWARDS[direction]
        if self.strongest_control and self.control:
            control = f"{ranged(self.control)}, {self.strongest_control}"
            control += "; noise only, as no control was learned" if self.noise_only else ""
        setting = f"{chosen.method} at {chosen.site}, {words.layers(chosen.layers)}, strength {chosen.strength:g}"
        tested = count(self.shift.n, "test pair" if self.aim == "pairs" else "test conflict")
        return {
            f"{name}, what to use": self.advice,
            name: f"{ranged(self.shift)} of {tested} steered, {percent(self.other.estimate)} neither",
            f"{name}, strongest control": control,
            f"{name}, largest loss": words.largest_loss(self.collateral, direction),
            f"{name}, setting": setting + ("" if chosen.within_limits else ", beyond the limits"),
        }


def breaks(other: Estimate, broken: dict[str, Estimate], direction: Direction) -> str:
    """What the vector breaks on the test split, where that is more than is wanted; else nothing.

    ``broken``: of what was answered right before, the share that is not any more.
    """
    kept = (broken[name] for name in counted(direction) if name in broken)
    lost = max((share.estimate for share in kept if share.known), default=0.0)
    found = [f"{percent(other.estimate)} answered neither way"] if other.known and other.estimate > MOST_OTHER else []
    found += [f"{percent(lost)} of what it should keep lost"] if lost > MOST_LOST else []
    return f"on test the vector leaves {' and '.join(found)}; " if found else ""


def advice(ways: dict[str, Estimate], beyond: bool) -> str:
    """What steers most: the vector, words or contrastive decoding; or that there are too few groups to tell.

    ``beyond``: whether the vector surely does more than its strongest control; if not, it is not what to use.
    """
    vector, others = ways[VECTOR], {way: share for way, share in ways.items() if way != VECTOR and share.known}
    if not vector.known:
        return "not measured"
    if vector.groups and (vector.groups < LEAST_GROUPS or math.isnan(vector.low)):
        return f"cannot tell: {count(vector.groups, 'test group')}; about {GROUPS_NEEDED} are needed"
    listed = [f"{way} {percent(share.estimate)}" for way, share in others.items()]
    unknown = [] if WORDS in ways else [f"{WORDS} not measured"]
    told = "; ".join([f"{VECTOR} {percent(vector.estimate)}", *listed, *unknown])
    best = max(others, key=lambda way: others[way].estimate, default=None)
    if best and _surely_above(others[best], vector):
        return f"{best} ({told})"
    if not beyond:
        return f"{best or 'nothing tried'}, as this vector does not surely more than its strongest control ({told})"
    if best is None or _surely_above(vector, others[best]):
        return f"the vector ({told})"
    return f"the vector or {best}, no sure difference ({told})"


def _surely_above(one: Estimate, other: Estimate) -> bool:
    """Whether a share is above another by more than both intervals leave open, taken as independent.

    Square and add: Newcombe (1998), "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 17:873-890. Paired shares differ more surely than that.
    """
    return one.estimate - other.estimate > math.hypot(one.estimate - one.low, other.high - other.estimate)


class TaskSummary(BaseModel):
    """The first numbers of a task."""

    model_config = ConfigDict(populate_by_name=True)

    weights: str | None = None
    differ: Estimate  # share of neurons
    read: Estimate  # accuracy of the probe
    pairs: int  # of all splits, as the groups
    groups: int
    test_pairs: int
    yield_: Estimate = Field(alias="yield")  # pairs / candidates of the test split
    to_generalized: DirectionSummary
    to_memorized: DirectionSummary
    detect_auroc: Estimate | None = None
    input_auroc: Estimate | None = None
    gate_auroc: Estimate | None = None
    answered_other: Estimate | None = None

    @classmethod
    def of(cls, task: TaskResults) -> TaskSummary:
        """The first numbers of a task."""
        everything, detection = task.pairs.by_split["all"], task.detection
        return cls(
            weights=task.weights,
            differ=task.contrast.significant,
            read=task.probe.best.accuracy,
            pairs=everything.pairs,
            groups=everything.groups,
            test_pairs=task.pairs.pairs,
            yield_=task.pairs.yield_,
            detect_auroc=detection.auroc["p_memorized"] if detection else None,
            gate_auroc=detection.gate if detection else None,
            answered_other=detection.other if detection else None,
            input_auroc=detection.auroc["input_only"] if detection else None,
            **{direction: DirectionSummary.of(task, direction) for direction in task.steering},
        )

    def _other(self) -> str | None:
        return percent(self.answered_other.estimate) if self.answered_other else None

    def rows(self) -> dict[str, str]:
        """The answers in words: do they differ, can it be read, can it be steered and at what cost."""
        alike = max(block.chosen.begin_alike or 0.0 for block in (self.to_generalized, self.to_memorized))
        rows = {
            "pairs": f"{self.pairs:,} of {count(self.groups, 'group')}, yield {ranged(self.yield_)}",
            "neurons that differ": ranged(self.differ),
            "test states read right by a probe": ranged(self.read),
            **self.to_generalized.rows("to_generalized"),
            **self.to_memorized.rows("to_memorized"),
            "weights": self.weights,
            "P(memorized) ranks right": ranged(self.detect_auroc) if self.detect_auroc else None,
            "the input alone ranks right": ranged(self.input_auroc) if self.input_auroc else None,
            "conflicts left out of that, answered neither way": self._other(),
            "the same below the vectors, for gates in one pass": ranged(self.gate_auroc) if self.gate_auroc else None,
            "prompts whose answers begin alike (judged behind that)": percent(alike) if alike else None,
        }
        return {what: text for what, text in rows.items() if text}


class Summary(BaseModel):
    """The first numbers of a run by task; ``print`` it."""

    tasks: dict[str, TaskSummary]
    left_out: str = ""  # what a fit did without to keep to its budget

    @classmethod
    def of(cls, results: dict[str, Any]) -> Summary:
        """From the content of ``results.json``; tasks that another version has written are left out."""
        found = {}
        for name, task in results.get("tasks", {}).items():
            with suppress(ValidationError, TypeError):
                found[name] = TaskSummary.of(TaskResults.model_validate({**task, "per_seed": {}}))
        return cls(tasks=found, left_out=results.get("left_out", ""))

    def __str__(self) -> str:
        lines = []
        for name, task in self.tasks.items():
            lines += [name, *(f"  {what}: {text}" for what, text in task.rows().items())]
        lines += [f"left out to keep to the budget: {self.left_out}"] if self.left_out else []
        return "\n".join(lines)

    def brief(self) -> dict[str, Any]:
        """By task as plain data, as ``mnemoscope fit --json`` prints them."""
        dumped = {name: task.model_dump(by_alias=True) for name, task in self.tasks.items()}
        return {k: {key: v for key, v in d.items() if v is not None or key not in OPTIONAL} for k, d in dumped.items()}


def summary_of(run: str | Path) -> Summary:
    """The summary of a run folder, from its ``results.json``."""
    return Summary.of(read_json(intact(Path(run) / "results.json"), dict[str, Any]))


def compare_briefs(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Two runs side by side: a row for each number that either has, with ``first`` and ``second`` in words."""
    rows = []
    for task in {**first, **second}:
        ours, theirs = (TaskSummary(**found[task]).rows() if task in found else {} for found in (first, second))
        for what in {**ours, **theirs}:
            rows.append({"task": task, "what": what, "first": ours.get(what, "-"), "second": theirs.get(what, "-")})
    return rows
