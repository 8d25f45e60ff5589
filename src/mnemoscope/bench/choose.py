"""The one choice of a setting on the tune split, for all methods, in studies, fits and arenas.

A setting's worth is the share of its targets that get the wanted answer, less the share of other answers that it
loses: a point of either counts the same. Where controls are drawn, what the strongest of them steers is taken off as
well: half of it up to a limit, as pairs sit near the decision boundary and any shift flips some, and much beyond it. A
setting that surely breaks a limit comes last; of a few tune examples a limit that is broken by chance would decide.

Among settings that tune cannot tell apart, within a standard error by groups, rounding would decide. There the method
is taken that held better elsewhere (``SAFER``), then the weakest setting.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnemoscope.behaviour import Scores
from mnemoscope.bench.answers import scores
from mnemoscope.bench.lists import Bench, Lists
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Intervention
from mnemoscope.interventions.controls import CONTROLS, DRAWN, control_draws, has_equal_norm
from mnemoscope.interventions.methods import nulls
from mnemoscope.statistics import Estimate, proportion

COST = 0.5  # points of worth per point of a control, up to its limit
# Methods in the order in which a near tie is decided. In seeds of `paper`, `smollm2` and `gemma` whose test figures are
# published, NMD or a gradient was taken beside a learned shift and did a third to two thirds of it (docs/LOG.md).
SAFER = ("low-rank", "lora", "cad", "learned", "gradient", "whitened", "logistic", "standardized-nmd", "nmd", "pca")
STEP, STEPS = 1.5, 4  # of strengths beyond those that a method tries
FINALISTS = 3  # settings that are rated again at most
AGAIN = 1_000_003  # added to a seed for the second rating
STANDING_IN = ("random_sign", "gaussian")  # for all four random controls, which steer about as many


@dataclass(frozen=True, slots=True)
class Rule:
    """Limits of a setting's side effects, and how many controls are drawn.

    Attributes:
        lost: share that loses its answer, of any list that should keep it, beyond which a setting comes last.
        neither: the same of targets that give neither answer.
        control: share that a control steers, beyond which each point costs ``excess`` points.
        draws, refits: of each control, and of those that are fitted again, which cost most; 0: none.
        errors: settings within so many standard errors of the best one count as equally good; 0: the best one alone.
        names: of the controls.
        roughly: whether passes over whole prompts are in bfloat16 where that is quicker.
    """

    lost: float = 1.0
    neither: float = 1.0
    control: float = 1.0
    excess: float = 2.0
    draws: int = 0
    refits: int = 0
    errors: float = 1.0
    names: Sequence[str] = CONTROLS
    roughly: bool = False

    def cost(self, control: float) -> float:
        """What a control takes off."""
        return COST * min(control, self.control) + self.excess * max(0.0, control - self.control)


@dataclass(frozen=True, slots=True)
class Rated:
    """A setting with its shares of tune targets that get the wanted answer, and neither; ``place`` among candidates."""

    one: Intervention
    wanted: Estimate
    neither: Estimate
    place: int = 0


@dataclass(frozen=True, slots=True)
class Tuned:
    """A rated setting with its losses, a mean over lists, and what its strongest control steers.

    ``kept``: no list surely loses more than its limit. ``within``: it keeps all limits.
    """

    rated: Rated
    lost: float
    kept: bool
    control: float
    worth: float
    within: bool

    @property
    def one(self) -> Intervention:
        """The intervention."""
        return self.rated.one

    @property
    def rank(self) -> tuple[bool, float]:
        """Higher is better."""
        return self.kept, self.worth

    def least(self, errors: float) -> float:
        """The least worth that tune cannot tell from this one; of too few groups any."""
        error = self.rated.wanted.error
        return -math.inf if errors and math.isnan(error) else self.worth - (errors * error if errors else 0.0)

    @property
    def risk(self) -> tuple[int, float, int, int]:
        """Lower is safer on another processor, seed or split: by method, then the weaker one, of fewer layers."""
        one, method = self.one, self.one.method
        order = SAFER.index(method) if method in SAFER else len(SAFER)
        return order, float(getattr(one, "strength", 0.0)), len(getattr(one, "layers", ())), self.rated.place


def rate(one: Intervention, targets: Prompts, place: int = 0) -> Rated:
    """An intervention's shares on targets."""
    return rated_by(scores(one, targets), one, targets, place)


def rated_by(found: Scores, one: Intervention, targets: Prompts, place: int = 0) -> Rated:
    """The same of labels that are known."""
    wanted, neither = (proportion(found.behaviour_N == label, targets.groups) for label in (one.toward, "other"))
    return Rated(one, wanted, neither, place)


def choose(bench: Bench, lists: Lists, rated: Sequence[Rated], rule: Rule, seed: Sequence[int] = (0,)) -> list[Tuned]:
    """Settings of one direction ``in_order``, without those that had lost before all was measured of them.

    ``seed``: of the controls' draws.
    """
    # Ordered by what is known so far: wanted answers, then losses, then controls, of which refits cost most.
    waiting = [
        (-1, -float(np.nan_to_num(one.wanted.estimate)), number, 0, 0.0, 0.0) for number, one in enumerate(rated)
    ]
    heapq.heapify(waiting)
    found: list[Tuned] = []
    while waiting:
        kept, cost, number, known, lost, control = heapq.heappop(waiting)
        one, best = rated[number], max(found, key=lambda tuned: tuned.rank, default=None)
        if best and best.kept and (-cost < best.least(rule.errors) or (not rule.errors and -cost <= best.worth)):
            break
        if known == 0:
            losses = [_lost(one.one, prompts, label, rule) for prompts, label in lists.kept.values()]
            lost = float(np.mean([loss.estimate for loss in losses])) if losses else 0.0
            worst = max((loss.at_least for loss in losses if loss.known), default=0.0)
            kept = -int(worst <= rule.lost and one.neither.at_least <= rule.neither)
        elif known < 3:
            refits = [name for name in nulls(one.one.method) if name in rule.names][:1]  # one is enough for a ranking
            random = () if set(DRAWN).isdisjoint(rule.names) else STANDING_IN
            names = random if known == 1 else refits
            control = max([control, *_controls(bench, lists.targets, one.one, rule, names, seed)])
        worth = float(np.nan_to_num(one.wanted.estimate)) - lost - rule.cost(control)
        if known < 3:
            heapq.heappush(waiting, (kept, -worth, number, known + 1, lost, control))
        else:
            is_kept = bool(kept)
            found.append(Tuned(one, lost, is_kept, control, worth, is_kept and control <= rule.control))
    return in_order(found, rule.errors)


def confirmed(
    bench: Bench, lists: Lists, found: Sequence[Tuned], rule: Rule, seed: Sequence[int] = (0,)
) -> list[Tuned]:
    """The settings in order once the controls of the first ones were drawn again: more of them, and all that there are.

    The best of many first ratings is too high by chance; the next setting is rated again while its first rating exceeds
    what is as good as the best second one. ``found``: in order, at least one.
    """
    # Shuffles depend on the first number of the seed; none that were drawn before are used again.
    again, more = [seed[0] + AGAIN, *seed[1:]], replace(rule, draws=2 * rule.draws, refits=2 * rule.refits)
    rated: list[Tuned] = []
    for tuned in found[:FINALISTS]:
        best = max(rated, key=lambda one: one.rank, default=None)
        if best and (best.kept, best.least(rule.errors)) >= tuned.rank:
            break
        control = max(_controls(bench, lists.targets, tuned.one, more, rule.names, again), default=0.0)
        worth = float(np.nan_to_num(tuned.rated.wanted.estimate)) - tuned.lost - rule.cost(control)
        within = tuned.kept and control <= rule.control
        rated.append(replace(tuned, control=control, worth=worth, within=within))
    seen = {id(tuned.rated) for tuned in rated}
    return [*in_order(rated, rule.errors), *(tuned for tuned in found if id(tuned.rated) not in seen)]


def searched_on(bench: Bench, lists: Lists, best: Tuned, rule: Rule) -> tuple[Tuned, bool]:
    """The best setting, or a stronger or weaker form of it that is better on tune, also beyond the grid of its method.

    And whether the last form that was tried was still better than all before it.
    """
    found, found_at_end = best, False
    for factor in (STEP, 1 / STEP):
        now, scale, at_end = best, 1.0, False
        for step in range(STEPS):
            scale *= factor
            one = best.one.scaled(scale)
            if one is best.one:  # it has no strength
                break
            one = replace(one, setting={**one.setting, "scaled": round(scale, 4)})
            (tuned,) = choose(bench, lists, [rate(one, lists.targets)], rule)
            if tuned.rank <= now.rank:
                break
            now, at_end = tuned, step == STEPS - 1
        if now.rank > found.rank:
            found, found_at_end = now, at_end
    return found, found_at_end


def in_order(found: Iterable[Tuned], errors: float = 1.0) -> list[Tuned]:
    """By rank, best first; but before all the safest of those that tune cannot tell from the best one."""
    ranks = sorted(found, key=lambda t: (t.rank, t.rated.wanted.estimate, -t.rated.place), reverse=True)
    if not ranks:
        return []
    best = ranks[0]
    near = [tuned for tuned in ranks if tuned.rank >= (best.kept, best.least(errors))]
    first = min(near, key=lambda tuned: tuned.risk) if errors else best
    return [first, *(tuned for tuned in ranks if tuned is not first)]


def _lost(one: Intervention, prompts: Prompts, label: str, rule: Rule) -> Estimate:
    """Share of a list that loses the label that all of it had."""
    behaviour_N = scores(one, prompts, roughly=rule.roughly).behaviour_N
    return proportion(behaviour_N != label, np.arange(len(behaviour_N)))


def _controls(
    bench: Bench, targets: Prompts, one: Intervention, rule: Rule, names: Sequence[str], seed: Sequence[int]
) -> list[float]:
    """The mean share that each control steers, of those that exist."""
    found = list[float]()
    for name in names if has_equal_norm(one) and len(targets) else ():  # of no targets nothing is known
        draws = rule.draws if name in DRAWN else rule.refits
        assert has_equal_norm(one)
        shares = [
            float(np.mean(scores(drawn, targets, roughly=rule.roughly).behaviour_N == one.toward))
            for _, drawn in (control_draws(name, bench, one, draws, seed) if draws else ())
        ]
        found += [float(np.mean(shares))] if shares else []
    return found
