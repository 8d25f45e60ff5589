"""Numbers and names in words: the vocabulary of every sentence, table and figure of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mnemoscope.runs.toward import Direction, Toward
from mnemoscope.statistics import Estimate

Aim = Literal["pairs", "conflict"]
DIRECTIONS: tuple[Direction, ...] = tuple(toward.direction for toward in Toward)
AIMS: tuple[Aim, ...] = ("pairs", "conflict")  # what a setting is chosen for, and the list that it is to steer
NBSP = "\u00a0"
UNMEASURED, DASH = "not measured", "-"
# By whether the task quotes documents: the directions of steering, and the two behaviours.
TOWARDS: dict[bool, dict[str, str]] = {
    False: {"to_generalized": "towards working it out", "to_memorized": "towards remembering"},
    True: {"to_generalized": "to context", "to_memorized": "to memory"},
}
ANSWERED: dict[bool, dict[str, str]] = {
    False: {"memorized": "remembered", "generalized": "worked out", "other": "other"},
    True: {"memorized": "from memory", "generalized": "from context", "other": "other"},
}
LISTS = {"pairs": "pairs", "conflict": "any conflict", "memory": "facts to recall", "novel": "new questions"}
LISTS |= {"conflict_rest": "conflicts already there"}
KEPT = ("novel", "memory", "conflict_rest")  # what steering should leave alone
RIVALS = {"input_only": "the input alone", "input_repeats": "input with repeats"}  # what sees no state
RIVALS |= {"entropy": "entropy", "top_gap": "gap of top two"}
CONTROLS = {"random_neurons": "random neurons", "low_correlation": "low-|rho| neurons", "random_sign": "random signs"}
CONTROLS |= {"shuffled_labels": "shuffled labels", "indifference": "indifference"}
CONTROLS |= {"permuted_answers": "permuted answers", "gaussian": "Gaussian"}
REFITTED = ("shuffled_labels", "indifference", "permuted_answers")  # a method has the first, or the other two


def answered(key: str, documents: bool) -> str:
    """What examples of a behaviour are: ``remembered``, ``answered from memory``."""
    return f"answered {ANSWERED[documents][key]}" if documents else ANSWERED[documents][key]


def aimed(direction: str, documents: bool) -> str:
    """What a direction aims at, as a heading: ``Context``, ``Remembering``."""
    return TOWARDS[documents][direction].partition(" ")[2].capitalize()


def percent(share: float) -> str:
    """A share in per cent: whole, but with a decimal where whole numbers would show nothing or all."""
    if math.isnan(share):
        return UNMEASURED
    value = 100 * share
    if 0 < abs(value) < 0.05 or 99.95 < abs(value) < 100:
        return f"{'under 0.1' if abs(value) < 1 else 'over 99.9'}{NBSP}%"
    digits = 1 if 0 < abs(value) < 1 or 99 < abs(value) < 100 else 0
    return f"{value:.{digits}f}{NBSP}%"


def p_value(p: float) -> str:
    """A p-value to three digits."""
    return DASH if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def no_interval(found: Estimate) -> str:
    """Why a number has no interval."""
    return f"too few groups: {found.groups}" if found.too_few else "no interval"


def interval(share: Estimate) -> str:
    """``60 to 66 %`` for a share, cut to what a share can be; as many digits as it needs to have two ends."""
    if not share.known or math.isnan(share.low):
        return no_interval(share)
    low, high = (min(1.0, max(0.0, end)) for end in (share.low, share.high))
    digits = 1 if high - low < 0.02 else 0
    return f"{100 * low:.{digits}f}{NBSP}to{NBSP}{100 * high:.{digits}f}{NBSP}%"


def ranged(share: Estimate) -> str:
    """``63 % (60 to 66 %)``, with as many digits outside the brackets as inside."""
    if share.known and "." in interval(share):
        return f"{100 * share.estimate:.1f}{NBSP}% ({interval(share)})"
    return f"{percent(share.estimate)} ({interval(share)})" if share.known else UNMEASURED


def points(change: float, *, sign: bool = False) -> str:
    """A difference of shares, in percentage points."""
    if math.isnan(change):
        return UNMEASURED
    value = round(100 * change) + 0
    unit = "point" if abs(value) == 1 else "points"
    return f"{value:+d}{NBSP}{unit}" if sign and value else f"{value:d}{NBSP}{unit}"


def points_interval(change: Estimate) -> str:
    """``6 to 12``, in percentage points, cut to what a difference of shares can be."""
    if not change.known or math.isnan(change.low):
        return no_interval(change)
    low, high = (min(100, max(-100, round(100 * end))) for end in (change.low, change.high))
    return f"{low + 0:d}{NBSP}to{NBSP}{high + 0:d}"


def beyond(difference: Estimate) -> str:
    """``9 points more (6 to 12)``."""
    side = "more" if difference.estimate >= 0 else "fewer"
    return f"{points(abs(difference.estimate))} {side} ({points_interval(difference)})"


def count(number: float, noun: str) -> str:
    """``1 pair``, ``1,200 pairs``."""
    return f"{number:,.0f}{NBSP}{noun if number == 1 else noun + 's'}"


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def layers(numbers: Sequence[int]) -> str:
    """``layer 2``, ``layers 0 and 2``, ``layers 0 to 3``; ``no layer`` of what acts elsewhere."""
    if not numbers:
        return "no layer"
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layer{'s' if len(numbers) > 1 else ''} {listed([str(number) for number in numbers])}"


def argmax(values: Iterable[float]) -> int | None:
    """Where the largest defined value is; None where none is."""
    found = list(values)
    return None if all(math.isnan(value) for value in found) else int(np.nanargmax(found))


def counted(direction: Direction) -> tuple[str, ...]:
    """Lists on which a loss is damage: towards remembering, new questions have nothing to remember."""
    return KEPT if direction == "to_generalized" else ("memory", "conflict_rest")


def largest_loss(collateral: dict[str, Estimate], direction: Direction) -> str:
    """The largest loss among what should stay, such as ``-9 points of facts to recall``."""
    losses = [(collateral[key].estimate, LISTS[key]) for key in counted(direction) if collateral[key].known]
    if not losses:
        return UNMEASURED
    loss, of = min(losses, key=lambda found: found[0])
    return f"{points(loss, sign=True)} of {of}" if loss < 0 else "none"


def for_aim(block: Any, aim: Aim) -> Any:
    """The block of a direction whose method is best for an aim."""
    return block.best_conflict if aim == "conflict" and "best_conflict" in block else block


def changes(block: Any, aim: Aim) -> dict[str, Estimate]:
    """Collateral under the setting for an aim."""
    return block.collateral if aim == "pairs" else block.collateral_conflict


def strongest_control(block: Any, aim: Aim = "pairs") -> str:
    """``12 % (shuffled labels)``; ``none`` where no control was run."""
    found = block.beside.get(aim)
    return f"{percent(found.shift.estimate)} ({control_names(found)})" if found else "none"


def control_names(found: Any) -> str:
    """Which control steers most; over seeds that differ, each of them with the number of seeds."""
    if len(found.names) == 1:
        return "".join(CONTROLS.get(name, name) for name in found.names)
    return ", ".join(f"{CONTROLS.get(name, name)} in {seeds}" for name, seeds in found.names.items())
