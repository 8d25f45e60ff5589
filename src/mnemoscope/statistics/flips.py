"""Sign-flip permutation tests of pairs, streamed and merged over shards; false discovery rates.

Shapes: N pairs, B permutations, L layers, D neurons.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats

from mnemoscope.statistics.common import TIE, Floats, as_batch, blocks, same

BLOCK_PERMUTATIONS = 64  # permutations are made in blocks of so many rows


@dataclass(slots=True, eq=False)
class SignFlips:
    """Paired sign-flip permutation test with the max statistic, streamed.

    If a neuron does not differ between the behaviours, the differences of a group are as likely to have the other sign.
    Whole groups flip, as the pairs of a group are not independent (exchangeability blocks: Winkler et al. 2014,
    NeuroImage 92:381-397). The statistic of a neuron is |sum of signed differences| / sqrt(sum of squared differences),
    whose denominator no flip changes. Sign b of a group is bit b of a hash of (seed, group), so that shards flip alike
    and their sums add up. Memory is B * L * D * 8 bytes, whatever N is: 25 MB for 6 layers of 512 at B = 1000.

    Attributes:
        count: differences so far.
        sum_LD, squares_LD: sum of the differences and of their squares.
        sums_BLD: sum of the differences with the signs of permutation b.
    """

    seed: int
    count: int
    sum_LD: Floats
    squares_LD: Floats
    sums_BLD: Floats = field(repr=False)

    @classmethod
    def empty(cls, shape: tuple[int, ...], permutations: int = 1000, seed: int = 0) -> SignFlips:
        """A test of no pairs, for differences (L, D); ValueError for less than one permutation."""
        if permutations < 1:
            raise ValueError(f"permutations: {permutations}; allowed is 1 or more")
        return cls(seed, 0, np.zeros(shape), np.zeros(shape), np.zeros((permutations, *shape)))

    def add(self, differences_NLD: ArrayLike, groups: Sequence[str]) -> None:
        """Add N differences (generalized - memorized) with their groups; ValueError unless (N, L, D) and N."""
        values_NLD = as_batch("differences", differences_NLD, self.sum_LD)
        same("groups: length", len(values_NLD), len(groups))
        if not len(values_NLD):
            return
        names_G, index_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        members_GN = sparse.csr_array((np.ones(len(index_N)), (index_N, np.arange(len(index_N)))))
        totals_GD = members_GN @ values_NLD.reshape(len(index_N), -1)
        permutations = len(self.sums_BLD)
        signs_BG = np.stack([_signs(self.seed, permutations, str(name)) for name in names_G], axis=1).astype(np.float64)
        for rows in blocks(permutations, BLOCK_PERMUTATIONS):  # in blocks, for a second array of B sums may not fit
            self.sums_BLD[rows] += (signs_BG[rows] @ totals_GD).reshape(-1, *self.sum_LD.shape)
        self.count += len(index_N)
        self.sum_LD += values_NLD.sum(axis=0)
        self.squares_LD += (values_NLD**2).sum(axis=0)

    def merge(self, other: SignFlips) -> Self:
        """Add another shard's sums in place and return self; ValueError unless seed, B and shape agree."""
        same("seed", self.seed, other.seed)
        same("shape", self.sums_BLD.shape, other.sums_BLD.shape)
        self.count += other.count
        self.sum_LD += other.sum_LD
        self.squares_LD += other.squares_LD
        self.sums_BLD += other.sums_BLD
        return self

    def p_values(self) -> tuple[Floats, Floats]:
        """Two-sided p-values (p_family_wise_LD, p_per_neuron_LD): 1 where all differences are 0, NaN while count is 0.

        Family-wise compares each neuron with the largest statistic of each permutation (Westfall & Young 1993,
        "Resampling-based multiple testing"). Both are (1 + permutations at least as extreme) / (B + 1), which is never
        0 (Phipson & Smyth 2010, SAGMB 9:39).
        """
        shape, permutations = self.sum_LD.shape, len(self.sums_BLD)
        if not self.count:
            return np.full(shape, math.nan), np.full(shape, math.nan)
        # Where all differences are 0 the statistic is 0 for every flip: never the maximum, and always a tie, so p = 1.
        scale_LD = np.sqrt(np.where(self.squares_LD > 0, self.squares_LD, 1.0))
        threshold_LD = np.abs(self.sum_LD) / scale_LD - TIE
        maxima_B, extreme_LD = np.empty(permutations), np.zeros(shape, dtype=np.int64)
        for rows in blocks(permutations, BLOCK_PERMUTATIONS):
            statistics_BLD = np.abs(self.sums_BLD[rows]) / scale_LD
            maxima_B[rows] = statistics_BLD.reshape(len(statistics_BLD), -1).max(axis=1)
            extreme_LD += (statistics_BLD >= threshold_LD).sum(axis=0)
        beaten_LD = permutations - np.searchsorted(np.sort(maxima_B), threshold_LD)
        return (1 + beaten_LD) / (permutations + 1), (1 + extreme_LD) / (permutations + 1)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """False discovery rates of one family of p-values, NaN left out (Benjamini & Hochberg 1995, JRSS B 57:289-300)."""
    q = np.array(p, dtype=np.float64)
    defined = ~np.isnan(q)
    q[defined] = stats.false_discovery_control(q[defined])
    return q


@lru_cache(maxsize=2_048)  # of 1.1 kB each for a thousand permutations
def _signs(seed: int, permutations: int, group: str) -> NDArray[np.int8]:
    """B signs of a group, from a hash that is the same in every process, machine and version."""
    digest = hashlib.shake_256(f"{seed}:{group}".encode()).digest((permutations + 7) // 8)
    bits_B = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), count=permutations)
    return 2 * bits_B.astype(np.int8) - 1
