"""The choice between settings, on the tune split: targeted effect less what its controls cost, within limits.

Pairs sit near the decision boundary, so any push flips some of them: a control is paid for, little up to a limit and
dearly beyond it, and what should stay as it is must stay. A limit that ended a setting would prefer one without any
effect to one whose control exceeds it by the luck of its draws; a control that cost as much as the shift gains would
prefer a weak vector to one that turns nearly all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnemoscope.behaviour import Asking, Batch
from mnemoscope.directions.controls import CHEAP, CONTROLS, control_draws
from mnemoscope.directions.settings import TOWARD, Setting, share_of, steered, vector_of
from mnemoscope.directions.sources import Sources

COST = 0.5  # points of the shift that a control costs by each point that it turns, up to its limit
FINALISTS = 3  # settings that are rated again at most
AGAIN = 1_000_003  # added to a seed for the second rating


@dataclass(frozen=True, slots=True)
class Limits:
    """What a chosen setting may do besides turning.

    Attributes:
        control: the mean shift rate of a control beyond which it costs dearly.
        excess_cost: points of the shift that each point of a control beyond its limit costs.
        collateral: the largest drop of the share that keeps its answer, of any list that should.
        draws: of each control.
        refits: draws of the controls that fit a method anew, which cost most; 0 leaves them out.
        again: draws of either kind with which a chosen setting is rated once more.
    """

    control: float
    collateral: float
    draws: int = 6
    refits: int = 4
    again: int = 12
    excess_cost: float = 2.0


@dataclass(frozen=True)
class TuneLists:
    """Prepared tune examples of one direction of turning.

    Attributes:
        turned: those that a setting is to turn.
        kept: those that it should leave alone, by name, with the label that all of them have without a shift.
    """

    turned: Sequence[Batch]
    kept: Mapping[str, tuple[Sequence[Batch], str]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting, and what it gains on the tune split.

    Attributes:
        net: shift rate less what its worst control costs.
        kept: whether its collateral keeps the limit; a choice beyond it is made only where no setting keeps it.
        within: whether it keeps all limits.
    """

    setting: Setting
    net: float
    kept: bool
    within: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Higher is better."""
        return self.kept, self.net


def choose(
    asking: Asking,
    lists: TuneLists,
    sources: Mapping[str, Sources],
    rated: Sequence[tuple[Setting, float]],
    limits: Limits,
    seed: Sequence[int] = (0,),
) -> Choice:
    """The setting that gains most, among those that keep what should stay if there is one.

    Of many settings the one comes first whose few draws happened to flatter it, so it is rated once more, with more and
    other draws, and so is the next one if it seemed better than what is left of the first.

    Args:
        sources: by site.
        rated: settings of one direction with their shift rates on ``lists.turned``; at least one.
        seed: of the controls' draws.
    """
    best: Choice | None = None
    leaders: list[Choice] = []
    # Weak settings first: their controls do little, so that most strong ones are out after their first control.
    for setting, rate in sorted(rated, key=lambda pair: (pair[0].strength, -pair[1], pair[0].top)):
        least = best.net if best and best.kept else -math.inf
        if rate <= least:
            continue  # not even without any effect of its controls could it be better
        kept = damage(asking, lists, sources[setting.site], setting) <= limits.collateral
        if best and best.kept and not kept:
            continue
        worst = 0.0
        for mean in control_means(asking, lists.turned, sources[setting.site], setting, limits, seed):
            worst = max(worst, mean)
            if _net(rate, worst, limits) <= least:
                break
        candidate = Choice(setting, _net(rate, worst, limits), kept, kept and worst <= limits.control)
        if best is None or candidate.rank > best.rank:
            best = candidate
            leaders.append(candidate)
    # Shuffles go by the first number of the seed, and those that chose are to be no part of this.
    again = [seed[0] + AGAIN, *seed[1:]]
    more = replace(limits, draws=limits.again, refits=limits.again if limits.refits else 0)
    rates = dict(rated)
    final: Choice | None = None
    for leader in sorted(leaders, key=lambda leader: leader.rank, reverse=True)[:FINALISTS]:
        if final and final.rank >= leader.rank:
            break
        means = control_means(asking, lists.turned, sources[leader.setting.site], leader.setting, more, again)
        worst = max(means, default=0.0)
        net = _net(rates[leader.setting], worst, limits)
        rerated = replace(leader, net=net, within=leader.kept and worst <= limits.control)
        if final is None or rerated.rank > final.rank:
            final = rerated
    assert final is not None, "a sweep has at least one setting"
    return final


def _net(rate: float, worst: float, limits: Limits) -> float:
    return rate - COST * min(worst, limits.control) - limits.excess_cost * max(0.0, worst - limits.control)


def control_means(
    asking: Asking,
    batches: Sequence[Batch],
    sources: Sources,
    setting: Setting,
    limits: Limits,
    seed: Sequence[int],
) -> Iterator[float]:
    """The mean shift rate of each control that exists, one after the other; what is fitted anew comes last."""
    vector = vector_of(sources, setting)
    for name in (*reversed(CHEAP), *(name for name in CONTROLS if name not in CHEAP)):
        drawn = control_draws(name, sources, setting, limits.draws if name in CHEAP else limits.refits, seed)
        rates = [
            share_of(steered(asking, batches, vector.with_dense(shift_LD), margins=False), TOWARD[setting.direction])
            for _, shift_LD in drawn
        ]
        if rates:
            yield float(np.mean(rates))


def damage(asking: Asking, lists: TuneLists, sources: Sources, setting: Setting) -> float:
    """The largest share of a list of those to be kept that loses its answer under a setting; 0 without such lists."""
    vector = vector_of(sources, setting)
    drops = [
        1.0 - share_of(steered(asking, batches, vector, margins=False), label) for batches, label in lists.kept.values()
    ]
    return max([drop for drop in drops if not math.isnan(drop)], default=0.0)
