"""Controls, shifts of the same norm that should not steer, and the choice between settings on the tune split by them.

Pairs sit near the decision boundary, so any shift flips some of them: a control costs little up to a limit and much
beyond it. A hard limit would prefer a setting without effect to one whose control exceeds it by chance; a full cost
would prefer a weak vector to one that steers nearly all.

Among settings that tune cannot tell apart, within one standard error by groups, rounding would decide. There the method
is taken that held better elsewhere (``SAFER``), then the weakest shift. For the same reason a loss, or a share of
neither answer, puts a setting last only where it is surely beyond its limit: of a few tune examples one would decide.

Shapes: L layers, D neurons.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch

from mnemoscope.behaviour import Batch, Scores
from mnemoscope.directions.sources import LOW_RANK, TOGETHER, Labels, Setting
from mnemoscope.directions.vectors import Directions, share_of, steered
from mnemoscope.models import Site
from mnemoscope.statistics import Estimate, proportion
from mnemoscope.steering import SteeringVector, scaled_to

COST = 0.5  # points of the shift per point of a control, up to its limit
FINALISTS = 3  # settings that are rated again at most
# Methods in the order in which a near tie is decided. In seeds of `paper`, `smollm2` and `gemma` whose test figures are
# published, NMD or a gradient was taken beside a learned shift and did a third to two thirds of it (docs/LOG.md).
SAFER = ("low-rank", "learned", "gradient", "whitened", "logistic", "standardized-nmd", "nmd", "pca")
RATING_DRAWS = 6  # of each control for a first rating, at most
AGAIN = 1_000_003  # added to a seed for the second rating
STANDING_IN = ("random_sign", "gaussian")  # for all four random controls, which steer about as many, in a ranking


def random_neurons(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """As many other neurons of each layer, with the same absolute shifts in random order and signs.

    Where a layer has not as many others, the rest are chosen ones; see ``shared_neurons``.
    """

    def others_first(layer: int) -> np.ndarray:
        order_D = rng.permutation(shift_LD.shape[1])
        return order_D[np.argsort(shift_LD[layer, order_D] != 0, kind="stable")]

    return _placed(shift_LD, rng, others_first)


def shared_neurons(shift_LD: np.ndarray) -> float:
    """Share of the neurons of ``random_neurons`` that are neurons of the vector; NaN for no shift."""
    chosen_L = (shift_LD != 0).sum(axis=1)
    shared = np.maximum(0, 2 * chosen_L - shift_LD.shape[1]).sum()
    return float(shared / chosen_L.sum()) if chosen_L.any() else math.nan


def low_correlation(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """The neurons of each layer with the lowest |rho|, with the same absolute shifts in random order and signs."""
    rank_LD = np.nan_to_num(np.abs(rho_LD))
    return _placed(shift_LD, rng, lambda layer: np.argsort(rank_LD[layer], kind="stable"))


def random_sign(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray) -> np.ndarray:
    """The chosen neurons with their absolute shifts and random signs."""
    return np.abs(shift_LD) * rng.choice([-1.0, 1.0], size=shift_LD.shape)


def gaussian(shift_LD: np.ndarray, rng: np.random.Generator, rho_LD: np.ndarray | None = None) -> np.ndarray:
    """A normally distributed direction over all neurons of the shifted layers."""
    return scaled_to(rng.standard_normal(shift_LD.shape), np.linalg.norm(shift_LD, axis=1))


SHUFFLED = "shuffled_labels"  # the same method on the same pairs with shuffled labels
INDIFFERENCE = "indifference"  # the same of a learned shift: it learns to be undecided, which is no draw of noise
PERMUTED = "permuted_answers"  # a learned shift towards answers of other items: its null
DRAWN = {control.__name__: control for control in (random_neurons, low_correlation, random_sign, gaussian)}
CONTROLS = ("random_neurons", "low_correlation", "random_sign", SHUFFLED, INDIFFERENCE, PERMUTED, "gaussian")
LEARNED = ("learned", LOW_RANK)  # methods that learn from wanted answers


def refitted(method: str) -> tuple[str, ...]:
    """Controls of a method that are fitted as its vector is, on other labels or answers."""
    return (INDIFFERENCE, PERMUTED) if method in LEARNED else (SHUFFLED,)


def control_draws(
    name: str, directions: Directions, setting: Setting, draws: int, seed: Sequence[int]
) -> Iterator[tuple[int, SteeringVector]]:
    """``draws`` numbered draws of a control, each seeded by its number; none where it does not exist.

    Shuffles depend on the first number of ``seed`` alone, so that one shuffle serves all settings. Values are moved
    between neurons, and norms are equal, in the unit of strength. Of a low-rank shift random signs and Gaussian
    directions are given to what it writes.
    """
    vector, rho_LD, sources = directions.vector(setting), directions.rho(), directions.sources
    spread_LD = sources.spread_LD
    shift_LD = sources.scaled(vector.dense(*spread_LD.shape).astype(np.float64))
    if name in refitted(setting.method):
        if name == PERMUTED and not directions.sources.lists.can_permute():
            return
        norm_L = np.linalg.norm(shift_LD, axis=1)
        for first, four in enumerate(shuffles(draws, seed[0], name == PERMUTED)):
            four = four[: draws - first * TOGETHER] if setting.method == LOW_RANK else four
            vectors = directions.vectors(setting, four)
            for number, found in enumerate(vectors[: draws - first * TOGETHER], first * TOGETHER):
                if setting.method == LOW_RANK:
                    yield number, _at_spread(found, vector, spread_LD)
                else:
                    found_LD = sources.scaled(found.dense(*shift_LD.shape))
                    yield number, vector.with_dense(_at_norm(found_LD, norm_L, sources.unit_L) * sources.scale_LD)
        return
    if name not in DRAWN:
        return
    # With more than half of the neurons or a whole layer shifted there are not as many others, and those with the
    # lowest |rho| are mostly the same ones with other signs.
    chosen_L, width = (shift_LD != 0).sum(axis=1), shift_LD.shape[1]
    others = 2 * chosen_L.sum() <= (chosen_L > 0).sum() * width + 1 and not (chosen_L == width).any()
    if setting.method == LOW_RANK:
        others = False
    if others or name not in ("random_neurons", "low_correlation"):
        for number in range(draws):
            rng = np.random.default_rng([*seed, number])
            if setting.method == LOW_RANK:
                yield number, _written(vector, name, rng, spread_LD)
            else:
                drawn_LD, carries_LD = DRAWN[name](shift_LD, rng, rho_LD), sources.scale_LD > 0
                if not carries_LD.all():  # what fell on neurons that are never shifted is made up by the others
                    drawn_LD = scaled_to(drawn_LD * carries_LD, np.linalg.norm(shift_LD, axis=1))
                yield number, vector.with_dense(drawn_LD * sources.scale_LD)


def _written(vector: SteeringVector, name: str, rng: np.random.Generator, spread_LD: np.ndarray) -> SteeringVector:
    """A low-rank shift that writes with random signs, or in Gaussian directions.

    They keep norms and angles of what is written to each other, in units of spread, so that every state is moved as far
    in these units as by the vector.
    """
    found = {}
    for layer, edit in vector.low_rank.items():
        write_KD, spread_D = edit.write_KD.double().numpy(), spread_LD[layer]
        if name == "random_sign":
            drawn_KD = write_KD * rng.choice([-1.0, 1.0], size=write_KD.shape[1])
        else:
            drawn_KD = turned(write_KD / spread_D, rng) * spread_D
        found[layer] = edit._replace(write_KD=torch.from_numpy(drawn_KD).float())
    return replace(vector, low_rank=found)


def turned(rows_KD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows in a random subspace, with the norms and angles that they had; K at most D."""
    frame_DK, corner_KK = np.linalg.qr(rows_KD.T)
    drawn_DK, signs_KK = np.linalg.qr(rng.standard_normal(frame_DK.shape))
    return (drawn_DK * np.sign(np.diag(signs_KK)) @ corner_KK).T


def _at_spread(found: SteeringVector, vector: SteeringVector, spread_LD: np.ndarray) -> SteeringVector:
    """A low-rank shift that writes as much as the vector does, in units of spread over all layers."""

    def norm(one: SteeringVector) -> float:
        written = ((edit.write_KD.double().numpy() / spread_LD[layer]) for layer, edit in one.low_rank.items())
        return math.sqrt(sum(float((rows_KD**2).sum()) for rows_KD in written))

    return found * (norm(vector) / norm(found)) if norm(found) else found


def _at_norm(shuffled_LD: np.ndarray, norm_L: np.ndarray, unit_L: np.ndarray) -> np.ndarray:
    """A shuffle at the norm of the vector in each layer; where it lacks one, the others make up the strength."""

    def relative(shift_LD: np.ndarray) -> float:
        return float(np.linalg.norm(np.linalg.norm(shift_LD, axis=1) / np.where(unit_L > 0, unit_L, 1.0)))

    placed_LD = scaled_to(shuffled_LD, norm_L)
    wanted = float(np.linalg.norm(norm_L / np.where(unit_L > 0, unit_L, 1.0)))
    if not relative(placed_LD):  # no layer in common: its own layers, at the same relative norm
        placed_LD = shuffled_LD
    found = relative(placed_LD)
    return placed_LD * (wanted / found) if found else placed_LD


def shuffles(draws: int, seed: int, permuted: bool = False) -> list[tuple[Labels, ...]]:
    """Labels for ``draws`` shuffles or a few more, always in fours: rounding must not depend on how many there are."""
    numbers = range(-(-draws // TOGETHER) * TOGETHER)
    drawn = [Labels(int(np.random.default_rng([seed, number]).integers(2**31)), permuted) for number in numbers]
    return [tuple(drawn[first : first + TOGETHER]) for first in numbers[::TOGETHER]]


def _placed(shift_LD: np.ndarray, rng: np.random.Generator, neurons_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """Each layer's absolute shifts, in random order and with random signs, on the first neurons given for it."""
    placed_LD = np.zeros_like(shift_LD)
    for layer, row_D in enumerate(shift_LD):
        values = np.abs(row_D[row_D != 0])
        if len(values):
            neurons = neurons_of(layer)[: len(values)]
            placed_LD[layer, neurons] = rng.permutation(values) * rng.choice([-1.0, 1.0], size=len(values))
    return placed_LD


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
