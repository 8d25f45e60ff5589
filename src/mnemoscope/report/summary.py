"""The numbers of a run that somebody who fitted a vector looks at first."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnemoscope.report import words
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.stories.steer_page import other_ways
from mnemoscope.report.words import DIRECTIONS, REFITTED, TOWARDS, Direction, count, counted, percent, ranged
from mnemoscope.runs.digests import intact
from mnemoscope.runs.strict import read_json
from mnemoscope.statistics import LEAST_GROUPS, Estimate

VECTOR, WORDS = "this vector", "asking in words"
LEARNED = ("learned", "low-rank")
BEYOND = "on tune this vector exceeds a limit (of its controls, of what it loses or leaves neither way); "
MOST_OTHER, MOST_LOST = 0.15, 0.1  # of test examples; settings are chosen within narrower limits on tune
GROUPS_NEEDED = 30  # with which an interval of a share is about 18 points to either side


def _of_direction(task: Part, direction: Direction) -> Part:
    """The best vector of one direction on the aim's test examples, and what a user should take."""
    aim, block = task.aim, words.for_aim(task.steering[direction], task.aim)
    control, found = block.beside.get(aim), block[aim]
    ways = {VECTOR: found.shift, **other_ways(task, direction)}
    chosen = block.chosen if aim == "pairs" else block.chosen_conflict
    broken = breaks(found.other, block.get("lost_right", {}).get(aim, {}), direction)
    beyond = control is None or control.difference.sign > 0
    learned = any(n in REFITTED and c[aim].shift.known for n, c in block.controls.items())
    return Part(
        advice=("" if chosen.within_limits else BEYOND) + broken + advice(ways, beyond),
        ways=ways,  # share that ends in the wanted behaviour: the vector, and what needs none
        aim=aim,
        chosen=chosen,
        shift=found.shift,
        other=found.other,  # share that gives neither answer
        strongest_control=words.control_names(control) if control else None,
        control=control.shift if control else None,
        noise_only=chosen.method in LEARNED and not learned,  # no control was learned, though the vector was
        collateral=words.changes(block, aim),
    )


def _of_task(task: Part) -> Part:
    """The first numbers of a task, as ``Summary.brief`` gives them."""
    everything, detection = task.pairs.by_split["all"], task.get("detection")
    areas = detection.auroc if detection else {}
    return Part(
        **({"weights": task.weights} if "weights" in task else {}),
        differ=task.contrast.significant,
        read=task.probe.best.accuracy,
        pairs=everything.pairs,
        groups=everything.groups,
        test_pairs=task.pairs.pairs,
        **{"yield": task.pairs["yield"]},
        **{direction: _of_direction(task, direction) for direction in DIRECTIONS},
        **({"detect_auroc": areas["p_memorized"]} if areas else {}),
        input_auroc=areas.get("input_only"),
        gate_auroc=detection.get("gate") if detection else None,
        answered_other=detection.get("other") if detection else None,
    )


def in_words(brief: Part) -> dict[str, str]:
    """The first numbers of a task in words: do they differ, can it be read, can it be steered and at what cost."""
    alike = max(brief[direction].chosen.get("begin_alike", 0.0) for direction in DIRECTIONS)
    other = brief.answered_other
    areas = {name: brief.get(f"{name}_auroc") for name in ("detect", "input", "gate")}
    right = {name: ranged(area) if area else "" for name, area in areas.items()}
    rows = {
        "pairs": f"{brief.pairs:,} of {count(brief.groups, 'group')}, yield {ranged(brief['yield'])}",
        "neurons that differ": ranged(brief.differ),
        "test states read right by a probe": ranged(brief.read),
        **_direction_in_words(brief.to_generalized, "to_generalized"),
        **_direction_in_words(brief.to_memorized, "to_memorized"),
        "weights": brief.get("weights"),
        "P(memorized) ranks right": right["detect"],
        "the input alone ranks right": right["input"],
        "conflicts left out of that, answered neither way": percent(other.estimate) if other else "",
        "the same below the vectors, for gates in one pass": right["gate"],
        "prompts whose answers begin alike (judged behind that)": percent(alike) if alike else "",
    }
    return {what: text for what, text in rows.items() if text}


def _direction_in_words(found: Part, direction: Direction) -> dict[str, str]:
    """What to use; what the vector does, beside which control, at what cost, and its setting."""
    control, chosen, name = "none", found.chosen, TOWARDS[direction]
    if found.strongest_control and found.control:
        control = f"{ranged(found.control)}, {found.strongest_control}"
        control += "; noise only, as no control was learned" if found.noise_only else ""
    setting = f"{chosen.method} at {chosen.site}, {words.layers(chosen.layers)}, strength {chosen.strength:g}"
    tested = count(found.shift.n, "test pair" if found.aim == "pairs" else "test conflict")
    return {
        f"{name}, what to use": found.advice,
        name: f"{ranged(found.shift)} of {tested} steered, {percent(found.other.estimate)} neither",
        f"{name}, strongest control": control,
        f"{name}, largest loss": words.largest_loss(found.collateral, direction),
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


@dataclass(frozen=True)
class Summary:
    """The first numbers of a run by task; ``print`` it."""

    tasks: dict[str, Part]

    @classmethod
    def of(cls, results: dict[str, Any]) -> Summary:
        """From the content of ``results.json``; tasks that another version has written are left out."""
        found = {}
        for name, task in results.get("tasks", {}).items():
            with suppress(AttributeError, KeyError, TypeError, ValueError):
                brief = _of_task(parts_of({**task, "per_seed": {}}))
                in_words(brief)
                found[name] = brief
        return cls(found)

    def __str__(self) -> str:
        shown = {
            name: [f"  {what}: {text}" for what, text in in_words(task).items()] for name, task in self.tasks.items()
        }
        return "\n".join(line for name, lines in shown.items() for line in (name, *lines))

    def brief(self) -> dict[str, Any]:
        """By task as plain data, as ``mnemoscope fit --json`` prints them."""
        found: dict[str, Any] = _plain(self.tasks)
        return found


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(part) for key, part in tree.items()}
    return asdict(tree) if isinstance(tree, Estimate) else tree


def summary_of(run: str | Path) -> Summary:
    """The summary of a run folder, from its ``results.json``."""
    return Summary.of(read_json(intact(Path(run) / "results.json"), dict[str, Any]))
