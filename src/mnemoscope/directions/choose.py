"""The choice between settings, on the tune split: targeted effect minus control, within limits.

Pairs sit near the decision boundary, so any push flips some of them: what counts is the vector minus its worst control,
small norms are the honest ones, and what should stay as it is must stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.behaviour import Asking, Batch
from mnemoscope.directions.controls import CHEAP, CONTROLS, control_draws
from mnemoscope.directions.settings import TOWARD, Setting, share_of, steered, vector_of
from mnemoscope.directions.sources import Sources


@dataclass(frozen=True, slots=True)
class Limits:
    """What a chosen setting may do besides turning.

    Attributes:
        control: the highest mean shift rate of a control.
        collateral: the largest drop of the share that keeps its answer, of any list that should.
        draws: of each control.
        refits: draws of the controls that fit a method anew, which cost most; 0 leaves them out.
    """

    control: float
    collateral: float
    draws: int = 10
    refits: int = 2


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
    """A setting, and how far it exceeds its worst control on the tune split.

    Attributes:
        within: whether it keeps all limits; a choice beyond them is made only where no setting keeps them.
    """

    setting: Setting
    net: float
    within: bool


def choose(
    asking: Asking,
    lists: TuneLists,
    sources: Mapping[str, Sources],
    rated: Sequence[tuple[Setting, float]],
    limits: Limits,
    seed: Sequence[int] = (0,),
) -> Choice:
    """The setting that exceeds its worst control most, among those within the limits if there is one.

    Args:
        sources: by site.
        rated: settings of one direction with their shift rates on ``lists.turned``; at least one.
        seed: of the controls' draws.
    """
    best: Choice | None = None
    for setting, rate in sorted(rated, key=lambda pair: (-pair[1], pair[0].strength, pair[0].top)):
        if best and best.within and best.net >= rate:
            break  # not even without any effect of its control could a lower rate be better
        worst = worst_control(asking, lists.turned, sources[setting.site], setting, limits, seed)
        within = worst <= limits.control
        if within and (best is None or not best.within or rate - worst > best.net):
            within = damage(asking, lists, sources[setting.site], setting) <= limits.collateral
        candidate = Choice(setting, rate - worst, within)
        if best is None or (candidate.within, candidate.net) > (best.within, best.net):
            best = candidate
    assert best is not None, "a sweep has at least one setting"
    return best


def worst_control(
    asking: Asking,
    batches: Sequence[Batch],
    sources: Sources,
    setting: Setting,
    limits: Limits,
    seed: Sequence[int],
) -> float:
    """The highest mean shift rate of a control, and no further once over the limit.

    What is fitted anew comes last.
    """
    vector = vector_of(sources, setting)
    worst = 0.0
    for name in (*reversed(CHEAP), *(name for name in CONTROLS if name not in CHEAP)):
        drawn = control_draws(name, sources, setting, limits.draws if name in CHEAP else limits.refits, seed)
        rates = [
            share_of(steered(asking, batches, vector.with_dense(shift_LD), margins=False), TOWARD[setting.direction])
            for _, shift_LD in drawn
        ]
        worst = max(worst, float(np.mean(rates))) if rates else worst
        if worst > limits.control:
            break
    return worst


def damage(asking: Asking, lists: TuneLists, sources: Sources, setting: Setting) -> float:
    """The largest share of a list of those to be kept that loses its answer under a setting; 0 without such lists."""
    vector = vector_of(sources, setting)
    drops = [
        1.0 - share_of(steered(asking, batches, vector, margins=False), label) for batches, label in lists.kept.values()
    ]
    return max([drop for drop in drops if not math.isnan(drop)], default=0.0)
