"""The numbers of a run that somebody who fitted a vector looks at first."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from mnemoscope.report import words
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.stories.steer import other_ways
from mnemoscope.report.words import DIRECTIONS, REFITTED, Direction, count, counted, percent, ranged
from mnemoscope.runs.digests import intact
from mnemoscope.runs.strict import read_json
from mnemoscope.statistics import Estimate

LEARNED = ("learned", "low-rank")
WORKS, IN_PART = 0.6, 0.3  # shares of test examples that get the wanted answer
MOST_OTHER, MOST_LOST = 0.15, 0.1  # of test examples; settings are chosen within narrower limits on tune
GROUPS_NEEDED = 30  # with which an interval of a share is about 18 points to either side
OF_TEST = 4  # groups of a file for one of its test split
VECTORS = ("shift", "low-rank")
NAMES = {
    "words": "words in the prompt",
    "decoding": "contrastive decoding (two passes)",
    "adapter": "an adapter",
    "shift": "a shift",
    "low-rank": "a low-rank edit",
}
LEVERS = {"prompt": "words", "cad": "decoding", "lora": "adapter", "low-rank": "low-rank"}  # of runs that do not say


def of_direction(task: Part, direction: Direction) -> Part:
    """The best vector of one direction on the aim's test examples, every lever, and the verdict on the best of them."""
    aim, block = task.aim, words.for_aim(task.steering[direction], task.aim)
    control, found = block.beside.get(aim), block[aim]
    levers = _levers(task, direction)
    learned = any(n in REFITTED and c[aim].shift.known for n, c in block.controls.items())
    best = task.get("levers", {}).get(direction) or block.chosen.method
    lever = next(name for name, one in levers.items() if one.method == best)
    beyond = lever not in VECTORS or control is None or control.difference.sign > 0
    return Part(
        verdict=verdict(levers[lever], NAMES.get(lever, lever), beyond, len(task.get("judged", ["test"]))),
        lever=lever,
        levers=levers,  # by name: share that ends in the wanted behaviour, share that gives neither, the largest loss
        aim=aim,
        chosen=block.chosen if aim == "pairs" else block.chosen_conflict,
        shift=found.shift,
        other=found.other,  # share that gives neither answer
        strongest_control=words.control_names(control) if control else None,
        control=control.shift if control else None,
        noise_only=block.chosen.method in LEARNED and not learned,  # no control was learned, though the vector was
        collateral=words.changes(block, aim),
    )


def _levers(task: Part, direction: Direction) -> dict[str, Part]:
    """Every lever of a direction, of several methods the better one; of studies words and decoding as shown apart."""
    found: dict[str, Part] = {}
    best = words.for_aim(task.steering[direction], task.aim).chosen.method
    for method, blocks in sorted(task.steering_by_method.items(), key=lambda entry: entry[0] != best):
        block = blocks[direction]
        chosen = block.chosen if task.aim == "pairs" else block.chosen_conflict
        lost = block.get("lost_right", {}).get(task.aim, {})
        kept = [lost[name] for name in counted(direction) if name in lost and lost[name].known]
        one = Part(
            method=method, passes=chosen.get("passes", 1), shift=block[task.aim].shift, other=block[task.aim].other
        )
        one.lost = max(kept, key=lambda share: share.estimate, default=Estimate.undefined())
        found.setdefault(chosen.get("lever") or LEVERS.get(method, "shift"), one)
    for name, shares in other_ways(task, direction).items():
        passes = 1 + ("decoding" in name)
        one = Part(method=name, passes=passes, shift=shares, other=Estimate.undefined(), lost=Estimate.undefined())
        found.setdefault(name, one)
    return found


def verdict(one: Part, name: str, beyond: bool = True, judged: int = 1) -> str:
    """Whether to use a lever of a name, how sure that is, and at which price.

    ``beyond``: whether it surely does more than its strongest control, where it has one; ``judged``: splits.
    """
    share = one.shift
    if not share.known:
        return "not measured"
    groups, more = share.groups or GROUPS_NEEDED, ""
    if groups < GROUPS_NEEDED:
        lacking = OF_TEST // judged * (GROUPS_NEEDED - groups)
        more = f"add about {words.count(lacking, 'group')} to be sure"
    if math.isnan(share.low):
        return f"cannot tell: {words.count(groups, 'test group')}; {more}"
    price = [f"loses {percent(one.lost.estimate)} of what it should keep"] if one.lost.at_least > MOST_LOST else []
    price += [f"answers {percent(one.other.estimate)} neither way"] if one.other.estimate > MOST_OTHER else []
    if not beyond or share.estimate < max(IN_PART, np.nan_to_num(one.lost.estimate)):
        reason = ranged(share) if beyond else f"{ranged(share)}, not surely more than its strongest control"
        return "; ".join(filter(None, [f"do not use {name} ({reason})", more]))
    works = "works" if share.estimate >= WORKS else "works in part"
    return "; ".join(filter(None, [f"{works} with {name} ({ranged(share)})", ", ".join(price), more]))


def _of_task(task: Part) -> Part:
    """The first numbers of a task, as ``Summary.brief`` gives them."""
    everything, detection = task.pairs.by_split["all"], task.get("detection")
    areas = detection.auroc if detection else {}
    return Part(
        **({"weights": task.weights} if "weights" in task else {}),
        documents=task.get("documents", False),
        left_out=task.get("left_out", {}),
        differ=task.contrast.significant,
        read=task.probe.best.accuracy,
        pairs=everything.pairs,
        groups=everything.groups,
        test_pairs=task.pairs.pairs,
        **{"yield": task.pairs["yield"]},
        **{direction: of_direction(task, direction) for direction in DIRECTIONS},
        **({"detect_auroc": areas["p_memorized"]} if areas else {}),
        input_auroc=areas.get("input_only"),
        gate_auroc=detection.get("gate") if detection else None,
        answered_other=detection.get("other") if detection else None,
    )


def in_words(brief: Part) -> dict[str, str]:
    """The first numbers of a task in words: do they differ, can it be read, can it be steered and at what cost."""
    documents = brief.get("documents", False)
    alike = max(brief[direction].chosen.get("begin_alike", 0.0) for direction in DIRECTIONS)
    other = brief.answered_other
    areas = {name: brief.get(f"{name}_auroc") for name in ("detect", "input", "gate")}
    right = {name: ranged(area) if area else "" for name, area in areas.items()}
    verdicts = {words.aimed(direction, documents): brief[direction].verdict for direction in DIRECTIONS}
    rows = verdicts | {
        "pairs": f"{brief.pairs:,} of {count(brief.groups, 'group')}, yield {ranged(brief['yield'])}",
        "neurons that differ": ranged(brief.differ),
        "test states read right by a probe": ranged(brief.read),
        **{what: text for d in DIRECTIONS for what, text in _direction_in_words(brief[d], d, documents).items()},
        "left out": "; ".join(f"{method} ({why})" for method, why in brief.get("left_out", {}).items()),
        "weights": brief.get("weights"),
        "P(memorized) ranks right": right["detect"],
        "the input alone ranks right": right["input"],
        "conflicts left out of that, answered neither way": percent(other.estimate) if other else "",
        "the same below the vectors, for gates in one pass": right["gate"],
        "prompts whose answers begin alike (judged behind that)": percent(alike) if alike else "",
    }
    return {what: text for what, text in rows.items() if text}


def _direction_in_words(found: Part, direction: Direction, documents: bool) -> dict[str, str]:
    """What every lever does, loses and costs; the best vector beside which control, and its setting."""
    control, chosen, name = "none", found.chosen, words.TOWARDS[documents][direction]
    if found.strongest_control and found.control:
        control = f"{ranged(found.control)}, {found.strongest_control}"
        control += "; noise only, as no control was learned" if found.noise_only else ""
    setting = f"{chosen.method} at {chosen.site}, {words.layers(chosen.layers)}, strength {chosen.strength:g}"
    tested = count(found.shift.n, "test pair" if found.aim == "pairs" else "test conflict")
    rows = {}
    for lever, one in found.levers.items():
        lost = f", loses {percent(one.lost.estimate)} at most" if one.lost.known else ""
        neither = f", {percent(one.other.estimate)} neither" if one.other.known else ""
        passes = f", {one.passes} passes a token" if one.passes > 1 else ""
        rows[f"{name}, {lever}"] = f"{ranged(one.shift)} of {tested}{neither}{lost}{passes}"
    return rows | {
        f"{name}, vector's strongest control": control,
        f"{name}, vector's setting": setting + ("" if chosen.within_limits else ", beyond the limits"),
    }


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
        return from_json(to_json(self.tasks, inf_nan_mode="constants"))


def summary_of(run: str | Path) -> Summary:
    """The summary of a run folder, from its ``results.json``."""
    return Summary.of(read_json(intact(Path(run) / "results.json"), dict[str, Any]))
