"""Choose between settings on the tune split: shift rate less the cost of controls, within limits.

Pairs sit near the decision boundary, so any shift flips some of them: a control costs little up to a limit and much
beyond it. A hard limit would prefer a setting without effect to one whose control exceeds it by chance; a full cost
would prefer a weak vector to one that steers nearly all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mnemoscope.behaviour import Batch
from mnemoscope.directions.controls import CONTROLS, SHUFFLED, control_draws
from mnemoscope.directions.sources import Setting
from mnemoscope.directions.vectors import Directions, share_of, steered
from mnemoscope.models import Site

COST = 0.5  # points of the shift per point of a control, up to its limit
FINALISTS = 3  # settings that are rated again at most
AGAIN = 1_000_003  # added to a seed for the second rating
STANDING_IN = ("random_sign", "gaussian")  # for all four random controls, which steer about as many, in a ranking


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a chosen setting's side effects.

    Attributes:
        control: mean shift rate of a control, beyond which each point costs ``excess_cost`` points of the shift.
        collateral: the largest drop of the share that keeps its answer, of any list that should.
        draws, refits: of each control, and of shuffled labels, which cost most; 0 leaves these out.
        again: draws of either kind for the second rating of the best settings.
    """

    control: float
    collateral: float
    draws: int = 6
    refits: int = 4
    again: int = 12
    excess_cost: float = 2.0

    def net(self, rate: float, worst: float) -> float:
        """A shift rate less what the worst control costs."""
        return rate - COST * min(worst, self.control) - self.excess_cost * max(0.0, worst - self.control)

    def choice(self, setting: Setting, rate: float, worst: float, kept: bool) -> Choice:
        """A setting with its shift rate, its worst control's, and whether its collateral keeps the limit."""
        return Choice(setting, rate, self.net(rate, worst), kept, kept and worst <= self.control)


@dataclass(frozen=True)
class TuneLists:
    """Prepared tune examples of one direction.

    Attributes:
        targets: to be steered.
        kept: to be left alone, by name, with the label that all of them have unsteered.
        apart: parts of ``kept`` whose collateral counts separately.
    """

    targets: Sequence[Batch]
    kept: Mapping[str, tuple[Sequence[Batch], str]]
    apart: Mapping[str, tuple[Sequence[Batch], str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting with its shift rate on the tune split, and ``net``, the rate less the cost of its worst control.

    Settings whose collateral is not ``kept`` in its limit come last; ``within``: it keeps all limits.
    """

    setting: Setting
    rate: float
    net: float
    kept: bool
    within: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Higher is better."""
        return self.kept, self.net


def ranked(
    lists: TuneLists,
    directions: Mapping[Site, Directions],
    rated: Sequence[tuple[Setting, float]],
    limits: Limits,
    seed: Sequence[int] = (0,),
) -> list[Choice]:
    """Choices by rank, best first, without settings that had lost before all their controls were drawn.

    ``rated``: settings of one direction, at least one, with their shift rates on ``lists.targets``. ``seed``: of the
    controls' draws.
    """
    ordered = sorted(rated, key=lambda pair: (pair[0].strength, -pair[1], pair[0].top))
    # Ordered by the figures measured so far: shift rate, then collateral, then random controls.
    waiting = [(-1, -rate, number, 0, 0.0) for number, (_, rate) in enumerate(ordered)]
    heapq.heapify(waiting)
    found: list[Choice] = []
    while waiting:
        kept, net, number, known, worst = heapq.heappop(waiting)
        setting, rate = ordered[number]
        if found and max(choice.rank for choice in found) >= (bool(kept), -net):
            break
        site = directions[setting.site]
        if known == 0:
            kept = -int(damage(lists, site, setting) <= limits.collateral)
        else:
            names = (STANDING_IN, (SHUFFLED,))[known - 1]
            worst = max([worst, *control_means(lists.targets, site, setting, limits, seed, names)])
        if known < 2:
            heapq.heappush(waiting, (kept, -limits.net(rate, worst), number, known + 1, worst))
        else:
            found.append(limits.choice(setting, rate, worst, bool(kept)))
    return sorted(found, key=lambda choice: choice.rank, reverse=True)


def final(
    lists: TuneLists,
    directions: Mapping[Site, Directions],
    candidates: Iterable[Choice],
    limits: Limits,
    seed: Sequence[int] = (0,),
) -> Choice:
    """The candidate with the best second rating, with more and other draws of every control.

    The best of many first ratings is too high by chance; the next candidate is rated again while its first rating
    exceeds the best second one. ``candidates`` are those of ``ranked``, at least one.
    """
    # Shuffles depend on the first number of the seed; none that ranked is used again.
    again = [seed[0] + AGAIN, *seed[1:]]
    more = replace(limits, draws=limits.again, refits=limits.again if limits.refits else 0)
    found: list[Choice] = []
    for candidate in sorted(candidates, key=lambda choice: choice.rank, reverse=True)[:FINALISTS]:
        if found and max(choice.rank for choice in found) >= candidate.rank:
            break
        setting = candidate.setting
        worst = max(control_means(lists.targets, directions[setting.site], setting, more, again), default=0.0)
        found.append(more.choice(setting, candidate.rate, worst, candidate.kept))
    return max(found, key=lambda choice: choice.rank)


def control_means(
    batches: Sequence[Batch],
    directions: Directions,
    setting: Setting,
    limits: Limits,
    seed: Sequence[int],
    names: Sequence[str] = CONTROLS,
) -> list[float]:
    """The mean shift rate of each control that exists."""
    asking, vector = directions.sources.lists.asking, directions.vector(setting)
    rates = [
        [
            share_of(steered(asking, batches, vector.with_dense(shift_LD), margins=False), setting.toward)
            for _, shift_LD in control_draws(name, directions, setting, draws, seed)
        ]
        for name, draws in ((name, limits.refits if name == SHUFFLED else limits.draws) for name in names)
    ]
    return [float(np.mean(found)) for found in rates if found]


def damage(lists: TuneLists, directions: Directions, setting: Setting) -> float:
    """The largest share of a kept list that loses its answer under a setting; 0 without such lists."""
    asking, vector = directions.sources.lists.asking, directions.vector(setting)
    drops = [
        1.0 - share_of(steered(asking, batches, vector, margins=False), label)
        for batches, label in (*lists.kept.values(), *lists.apart.values())
    ]
    return max([drop for drop in drops if not math.isnan(drop)], default=0.0)
