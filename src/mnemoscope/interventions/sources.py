"""What methods fit on: pairs with their states at one site and labels, lists to learn from, what is tried.

Shapes: P pairs, N examples, L layers, D neurons. Side 0 of a pair answered generalized, side 1 memorized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product, zip_longest
from operator import attrgetter
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from mnemoscope.behaviour import Asking, Batch, KeptStates, cache_prefixes, log_probabilities, prepare, read_states
from mnemoscope.config import GridConfig, LowRankConfig
from mnemoscope.interventions.contract import Toward
from mnemoscope.interventions.hooks import Positions, edited
from mnemoscope.models import Site
from mnemoscope.statistics.contrast import PairedMoments
from mnemoscope.tasks import Example

Entry = TypeVar("Entry")
Unit = Literal["norm", "spread"]
MASSIVE = 10.0  # times the median root mean square of a layer's neurons, from which on one is never shifted in spreads


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of the fit pairs: as answered, or shuffled with a seed, where both labels of a pair swap or stay."""

    shuffle: int | None = None
    permuted: bool = False  # labels stay, and the answers are those of other items (``FitLists.permuted``)

    def signs(self, n: int, *stream: int) -> np.ndarray:
        """float64 (n,): 1 where a label stays, -1 where it swaps, half of each; ``stream`` numbers its lists."""
        if self.shuffle is None or self.permuted:
            return np.ones(n)
        rng = np.random.default_rng([self.shuffle, *stream])
        signs_N = rng.permutation(np.where(np.arange(n) % 2 == 0, 1.0, -1.0))
        # Of an odd list one more stays or swaps, by chance: else the labels as answered would shine through.
        return -signs_N if n % 2 and rng.random() < 0.5 else signs_N


ANSWERED = Labels()
TOGETHER = 4  # shifts that are learned in one go
INDIFFERENCE = "indifference"  # of a learned shift: shuffled labels teach it to be undecided, which is no draw of noise
PERMUTED = "permuted_answers"  # a learned shift towards answers of other items: its null
TAUGHT = (INDIFFERENCE, PERMUTED)  # nulls of what learns from wanted answers; of others it is shuffled labels


@dataclass(frozen=True)
class Tried:
    """What methods try, where it is not their own choice."""

    grids: Mapping[Site, GridConfig] | None = None  # by site, of every shift; None: each method's own
    unit: Unit = "spread"  # of the strengths of these grids
    positions: Positions = "decision"  # shifted tokens
    low_rank: LowRankConfig | None = None  # blocks and factors of low-rank shifts; None: their own


@dataclass(frozen=True)
class FitLists:
    """Examples of the fit split, prepared with their prefixes, by behaviour steered to; shared by all sites.

    ``items`` and ``bare`` are in the order in which ``pairs`` and ``conflicts`` were prepared.
    """

    asking: Asking
    pairs: Mapping[Toward, Sequence[Batch]]  # phrasings of pairs that answer the other way
    conflicts: Mapping[Toward, Sequence[Batch]]  # other conflicts: of a study those that do, of an arena all
    kept: Mapping[Toward, Sequence[Batch]]  # memory and novel examples whose answers should stay
    held: Sequence[Batch] = ()  # what should stay, answered right or not; none: ``kept``
    kept_weight: float = 1.0  # of these in the objective of learned vectors
    steps: int = 20  # of whatever is learned by gradients, except low-rank shifts
    items: Mapping[Toward, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)  # names of both
    bare: tuple[Sequence[Example], Sequence[Example]] | None = None  # bare questions of both towards memory; None: none
    low_rank_steps: int = 60  # of low-rank shifts

    def can_permute(self) -> bool:
        """Whether every item can be given an answer of another that is neither of its own."""
        return self.permuted(0) is not None

    def permuted(self, seed: int) -> dict[str, list[int]] | None:
        """By item, the tokens of another item's answer that neither of its own two goes on with.

        Half of the items get an answer of either behaviour: where the two have formats of their own, answers of one
        format would teach the behaviour. All phrasings of an item get the same one. None where an item is left without.
        """
        answers, names = self._answers, sorted(self._answers)
        order = [names[i] for i in np.random.default_rng([seed, 1]).permutation(len(names))]
        found = {}
        for place, item in enumerate(order):
            ways = product((place % 2, 1 - place % 2), range(1, len(order)))
            either = (answers[order[(place + step) % len(order)]][option] for option, step in ways)
            found[item] = next((tokens for tokens in either if tokens not in answers[item]), [])
        return found if all(found.values()) else None

    @cached_property
    def _answers(self) -> dict[str, list[list[int]]]:
        """By item, the tokens of either behaviour's answer."""
        answers = dict[str, list[list[int]]]()
        for toward, of_both in self.items.items():
            for batches, items in zip((self.pairs[toward], self.conflicts[toward]), of_both, strict=True):
                for batch in batches:
                    rows = (batch.suffix_RM.tolist(), batch.length_R.tolist(), batch.example_R, batch.option_R)
                    for suffix, length, example, option in zip(*rows, strict=True):
                        answers.setdefault(items[batch.examples_N[example]], [[], []])[option] = suffix[:length]
        return answers


@dataclass(frozen=True, eq=False)
class Sources:
    """Input of the methods: ``states_P2LD``, float32, of the fit pairs at the decision position.

    ``find_lists`` reads the lists for gradients and learned vectors when they are needed. ``unit``: what strength is
    counted in. ``norm``: of each layer's states. ``spread``: of each neuron's standard deviation, as a root mean square
    over a layer's neurons; massive activations neither carry a shift then nor set its size.
    """

    site: Site
    states_P2LD: np.ndarray
    find_lists: Callable[[], FitLists]
    unit: Unit = "norm"

    @cached_property
    def lists(self) -> FitLists:
        """Lists for gradients and learned vectors."""
        return self.find_lists()

    @property
    def shape_LD(self) -> tuple[int, int]:
        """Layers and neurons of the site."""
        return self.states_P2LD.shape[2], self.states_P2LD.shape[3]

    def moments(self, labels: Labels = ANSWERED) -> PairedMoments:
        """Moments of the pairs, which give NMD and rho."""
        return PairedMoments.of(self.states_P2LD, labels.signs(len(self.states_P2LD)))

    def differences_PLD(self, labels: Labels = ANSWERED) -> np.ndarray:
        """State of the side labelled generalized minus that of the other, float64."""
        differences_PLD = self.states_P2LD[:, 0].astype(np.float64) - self.states_P2LD[:, 1]
        return differences_PLD * labels.signs(len(differences_PLD))[:, None, None]

    @cached_property
    def norm_L(self) -> np.ndarray:
        """Root mean square norm of each layer's states, float64."""
        return self.moments().state_norm_L

    @cached_property
    def spread_LD(self) -> np.ndarray:
        """Standard deviation of each neuron over the states, float64; 1 for a constant one."""
        spread_LD = self.states_P2LD.std(axis=(0, 1), dtype=np.float64)
        return np.where(spread_LD > 0, spread_LD, 1.0)

    @cached_property
    def unit_LD(self) -> np.ndarray:
        """float64, how far a shift of strength 1 moves a neuron alone; 0 for one that is never shifted."""
        if self.unit == "norm":
            return np.repeat(self.norm_L[:, None], self.shape_LD[1], axis=1)
        size_LD = np.sqrt(np.square(self.states_P2LD, dtype=np.float64).mean(axis=(0, 1)))
        massive_LD = size_LD > MASSIVE * np.median(size_LD, axis=1, keepdims=True)
        return np.where(massive_LD, 0.0, self.spread_LD) * np.sqrt((~massive_LD).sum(axis=1))[:, None]

    def relative(self, shift_LD: np.ndarray) -> np.ndarray:
        """A shift in units of strength: over the layers the norm of this is its strength."""
        return np.divide(shift_LD, self.unit_LD, out=np.zeros(self.shape_LD), where=self.unit_LD > 0)

    def evenly(self, shift_LD: np.ndarray) -> np.ndarray:
        """A direction at strength 1 in every layer that has one."""
        return scaled_to(self.relative(shift_LD), np.ones(len(self.unit_LD))) * self.unit_LD

    @cached_property
    def margin_gradients(self) -> list[list[np.ndarray]]:
        """``margin_gradients`` of each batch of pairs, of those answered memorized, then of those generalized."""
        found = (self.lists.pairs[toward] for toward in Toward)
        return [[margin_gradients(self.lists.asking, b, self.site, self.shape_LD) for b in some] for some in found]


def read_sources(
    site: Site,
    pairs: Sequence[tuple[Example, Example]],
    asking: Asking,
    find_lists: Callable[[], FitLists],
    kept: KeptStates | None = None,
) -> Sources:
    """Sources of fit pairs, (answered generalized, answered memorized) each; ``kept`` states are not read again."""
    examples = [example for pair in pairs for example in pair]
    states_NLD = read_states(asking, examples, site, kept=kept).at_decision_NLD
    return Sources(site, states_NLD.reshape(len(pairs), 2, *states_NLD.shape[1:]), find_lists)


def margin_gradients(asking: Asking, batch: Batch, site: Site, shape_LD: tuple[int, int]) -> np.ndarray:
    """d(decision margin) / d(state from the decision position on) of each conflict, float32 (N, L, D).

    In nats per unit of the state; the model's own parameters get no gradient.
    """
    layers, neurons = shape_LD
    shifts = {layer: torch.zeros(len(batch.examples_N), neurons, requires_grad=True) for layer in range(layers)}
    with edited(asking.model, shifts, site):
        logp_N2 = log_probabilities(asking, batch)
    gradients = torch.autograd.grad((logp_N2[:, 1] - logp_N2[:, 0]).sum(), list(shifts.values()))
    return torch.stack([gradient_ND.float().cpu() for gradient_ND in gradients], dim=1).numpy()


def with_prefixes(asking: Asking, examples: Sequence[Example]) -> list[Batch]:
    """Prepared examples with cached states of their prompts up to the decision position."""
    batches = prepare(asking, examples, whole=True)
    cache_prefixes(asking, batches)
    return batches


def in_turn(lists: Iterable[Sequence[Entry]]) -> list[Entry]:
    """The first entry of every list, then the second of every list, and so on."""
    return [entry for row in zip_longest(*lists) for entry in row if entry is not None]


def spread_groups(entries: Iterable[Entry], group: Callable[[Any], str] = attrgetter("group")) -> list[Entry]:
    """Entries, such as examples, as evenly by ``group`` as possible."""
    by_group = defaultdict[str, list[Entry]](list)
    for entry in entries:
        by_group[group(entry)].append(entry)
    return in_turn(by_group.values())


def scaled_to(shift_LD: np.ndarray, norm_L: np.ndarray) -> np.ndarray:
    """Scale each layer's shift to a norm; a layer without a shift keeps none."""
    found_L = np.linalg.norm(shift_LD, axis=1)
    return shift_LD * np.divide(norm_L, found_L, out=np.zeros_like(found_L), where=found_L > 0)[:, None]
