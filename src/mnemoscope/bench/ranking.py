"""The choice between settings of a study on the tune split, by what they steer, lose, and what their controls steer.

Pairs sit near the decision boundary, so any shift flips some of them: a control costs little up to a limit and much
beyond it. A hard limit would prefer a setting without effect to one whose control exceeds it by chance; a full cost
would prefer a weak vector to one that steers nearly all.

Among settings that tune cannot tell apart, within one standard error by groups, rounding would decide. There the method
is taken that held better elsewhere (``SAFER``), then the weakest shift. For the same reason a loss, or a share of
neither answer, puts a setting last only where it is surely beyond its limit: of a few tune examples one would decide.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from mnemoscope.behaviour import Batch, Scores
from mnemoscope.interventions.controls import CONTROLS, DRAWN, control_draws, refitted
from mnemoscope.interventions.directions import Directions, share_of, steered
from mnemoscope.interventions.sources import Setting
from mnemoscope.models import Site
from mnemoscope.statistics import Estimate, proportion

COST = 0.5  # points of the shift per point of a control, up to its limit
FINALISTS = 3  # settings that are rated again at most
# Methods in the order in which a near tie is decided. In seeds of `paper`, `smollm2` and `gemma` whose test figures are
# published, NMD or a gradient was taken beside a learned shift and did a third to two thirds of it (docs/LOG.md).
SAFER = ("low-rank", "learned", "gradient", "whitened", "logistic", "standardized-nmd", "nmd", "pca")
RATING_DRAWS = 6  # of each control for a first rating, at most
AGAIN = 1_000_003  # added to a seed for the second rating
STANDING_IN = ("random_sign", "gaussian")  # for all four random controls, which steer about as many, in a ranking


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a chosen setting's side effects.

    Attributes:
        control: mean shift rate of a control, beyond which each point costs ``excess_cost`` points of the shift.
        collateral: the largest drop of the share that keeps its answer, of any list that should.
        neither: the largest share of the steered examples that give neither answer.
        draws, refits: of each control, and of those that are refitted, which cost most; 0 leaves these out.
        again: draws of either kind for the second rating of the best settings.
        names: of the controls.
    """

    control: float
    collateral: float
    draws: int = RATING_DRAWS
    refits: int = 4
    again: int = 12
    excess_cost: float = 2.0
    neither: float = 1.0
    names: Sequence[str] = CONTROLS

    def net(self, rate: float, worst: float) -> float:
        """A shift rate less what the worst control costs."""
        return rate - COST * min(worst, self.control) - self.excess_cost * max(0.0, worst - self.control)

    def choice(self, setting: Setting, rate: Estimate, worst: float, kept: bool) -> Choice:
        """A setting with its shift rate, its worst control's, and whether its collateral keeps the limit."""
        net = self.net(rate.estimate, worst)
        return Choice(setting, rate, net, kept, kept and worst <= self.control)


@dataclass(frozen=True)
class TuneLists:
    """Prepared tune examples of one direction: ``targets`` to be steered, and lists to be left alone, by name.

    The latter with the label that all of them have unsteered. ``groups_N``: of the targets. ``apart``: parts of
    ``kept`` that count separately.
    """

    targets: Sequence[Batch]
    groups_N: Sequence[str]
    kept: Mapping[str, tuple[Sequence[Batch], str]]
    apart: Mapping[str, tuple[Sequence[Batch], str]] = field(default_factory=dict)

    def rate(self, scores: Scores, behaviour: str) -> Estimate:
        """Share of the targets that show a behaviour, with its interval by group."""
        return proportion(scores.behaviour_N == behaviour, self.groups_N)


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting with its shift rate on the tune split, and ``net``, the rate less the cost of its worst control.

    Settings whose collateral is not ``kept`` in its limit come last; ``within``: it keeps all limits.
    """

    setting: Setting
    rate: Estimate
    net: float
    kept: bool
    within: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Higher is better."""
        return self.kept, self.net

    @property
    def as_good(self) -> tuple[bool, float]:
        """The least rank that tune cannot tell from this one's."""
        return self.kept, self.net - self.rate.error

    @property
    def risk(self) -> tuple[int, float, int, float]:
        """Lower is safer on another processor, seed or split: by method, then the weaker shift, of fewer layers."""
        setting = self.setting
        return SAFER.index(setting.method), setting.strength, len(setting.layers), setting.top


def in_order(choices: Sequence[Choice]) -> list[Choice]:
    """By rank, best first; but before all the safest of those that tune cannot tell from the best one."""
    ranks = sorted(choices, key=lambda choice: (choice.rank, [-part for part in choice.risk]), reverse=True)
    near = [choice for choice in ranks if choice.rank >= ranks[0].as_good] or ranks  # of no examples no rank is known
    first = min(near, key=lambda choice: choice.risk)
    return [first, *(choice for choice in ranks if choice is not first)]


def ranked(
    lists: TuneLists,
    directions: Mapping[Site, Directions],
    rated: Sequence[tuple[Setting, Estimate]],
    limits: Limits,
    seed: Sequence[int] = (0,),
    others: Mapping[Setting, Estimate] = MappingProxyType({}),
) -> list[Choice]:
    """Choices ``in_order``, without settings that had lost before all their controls were drawn.

    ``rated``: settings of one direction, at least one, with their shift rates on ``lists.targets``. ``seed``: of the
    controls' draws. ``others``: shares of these that give neither answer, where known.
    """
    ordered = sorted(rated, key=lambda pair: (pair[0].strength, -pair[1].estimate, pair[0].top))
    # Ordered by the figures measured so far: shift rate, then collateral, then random controls.
    waiting = [(-1, -rate.estimate, number, 0, 0.0) for number, (_, rate) in enumerate(ordered)]
    heapq.heapify(waiting)
    found: list[Choice] = []
    while waiting:
        kept, net, number, known, worst = heapq.heappop(waiting)
        setting, rate = ordered[number]
        if found and max(found, key=lambda choice: choice.rank).as_good > (bool(kept), -net):
            break
        site = directions[setting.site]
        if known == 0:
            neither = setting not in others or others[setting].at_least <= limits.neither
            kept = -int(neither and most_lost(lists, site, setting) <= limits.collateral)
        else:
            # Indifference steers more than permuted answers do, and one refit is enough for a ranking.
            names = (STANDING_IN, [name for name in refitted(setting.method) if name in limits.names][:1])[known - 1]
            worst = max([worst, *control_rates(lists, site, setting, limits, seed, names)])
        if known < 2:
            heapq.heappush(waiting, (kept, -limits.net(rate.estimate, worst), number, known + 1, worst))
        else:
            found.append(limits.choice(setting, rate, worst, bool(kept)))
    return in_order(found)


def final(
    lists: TuneLists,
    directions: Mapping[Site, Directions],
    candidates: Sequence[Choice],
    limits: Limits,
    seed: Sequence[int] = (0,),
) -> Choice:
    """The candidate that comes first by a second rating, with more and other draws of every control.

    The best of many first ratings is too high by chance; the next candidate is rated again while its first rating
    exceeds what is as good as the best second one. ``candidates`` are those of ``ranked``, at least one.
    """
    # Shuffles depend on the first number of the seed; none that ranked is used again.
    again = [seed[0] + AGAIN, *seed[1:]]
    more = replace(limits, draws=limits.again, refits=limits.again if limits.refits else 0)
    found: list[Choice] = []
    for candidate in in_order(candidates)[:FINALISTS]:
        if found and max(found, key=lambda choice: choice.rank).as_good >= candidate.rank:
            break
        setting = candidate.setting
        rates = control_rates(lists, directions[setting.site], setting, more, again, limits.names)
        found.append(more.choice(setting, candidate.rate, max(rates, default=0.0), candidate.kept))
    return in_order(found)[0]


def control_rates(
    lists: TuneLists,
    directions: Directions,
    setting: Setting,
    limits: Limits,
    seed: Sequence[int],
    names: Sequence[str] = CONTROLS,
) -> list[float]:
    """The mean shift rate of each control that exists."""
    asking, rates = directions.sources.lists.asking, list[float]()
    for name, draws in ((name, limits.draws if name in DRAWN else limits.refits) for name in names):
        drawn = control_draws(name, directions, setting, draws, seed)
        found = [
            share_of(steered(asking, lists.targets, vector, margins=False, roughly=True), setting.toward)
            for _, vector in drawn
        ]
        if found:
            rates.append(float(np.mean(found)))
    return rates


def most_lost(lists: TuneLists, directions: Directions, setting: Setting) -> float:
    """The largest share of a kept list that surely, by a 95 % interval, loses its answer; 0 without such lists."""
    asking, vector = directions.sources.lists.asking, directions.vector(setting)
    found = [
        proportion(
            (scores := steered(asking, batches, vector, margins=False, roughly=True)).behaviour_N != label,
            np.arange(len(scores.behaviour_N)),
        )
        for batches, label in (*lists.kept.values(), *lists.apart.values())
    ]
    return max([lost.at_least for lost in found if lost.known], default=0.0)
