"""Per-neuron statistics of pairs: NMD, rho, effect sizes and their p-values.

Shapes: N pairs, B permutations, L layers, D neurons; all states are read at the decision position.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from scipy import sparse, stats

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import Seen
from mnemoscope.statistics import Floats, top_by_magnitude
from mnemoscope.statistics.intervals import TIE, blocks, same

# A standard deviation below this share of a neuron's root mean square is rounding: the neuron is constant.
CONSTANT = 1e-12
BLOCK_PAIRS = 256  # whose float64 copies are held at once
BLOCK_PERMUTATIONS = 64  # for a second array of all sums may not fit
# Names in the file, in the order of the fields of `Contrast`.
ARRAYS = ("nmd", "rho", "effect_size", "p_family_wise", "p_false_discovery", "state_norm")


@dataclass(slots=True, eq=False)
class PairedMoments:
    """Means and sums of squared deviations of paired states, streamed in float64, with the statistics they give.

    With labels y = +1 (generalized) and -1 (memorized) in equal number, y has mean 0 and variance 1, so that over the
    2N states cov(h, y) = mean(h y) = (mean of h^G - mean of h^M) / 2 = NMD / 2, and rho = NMD / (2 sd(h)).

    A batch is summed in two passes around its first pair, so that a large common offset costs no digits. Batches are
    joined by the pairwise update of Chan, Golub & LeVeque (1983, "Algorithms for computing the sample variance", The
    American Statistician 37:242-247), for the difference of two series in the form of Pebay (2008, Sandia report
    SAND2008-6212). Any sharding and any order agree up to rounding.

    Attributes:
        count: pairs so far.
        means_2LD: means of the states, generalized then memorized.
        squares_3LD: sums of squared deviations from the mean: generalized, memorized, generalized - memorized.
    """

    count: int
    means_2LD: Floats
    squares_3LD: Floats

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> PairedMoments:
        """Moments of no pairs, for states (L, D)."""
        return cls(0, np.zeros((2, *shape)), np.zeros((3, *shape)))

    @classmethod
    def of(cls, states_N2LD: NDArray[Any], signs_N: Floats | None = None) -> PairedMoments:
        """Moments of pairs, (generalized, memorized) each; both labels of a pair swap where its sign is negative."""
        moments = cls.empty(states_N2LD.shape[2:])
        for rows in blocks(len(states_N2LD), BLOCK_PAIRS):
            block_N2LD = states_N2LD[rows]
            if signs_N is not None:
                block_N2LD = np.where(signs_N[rows, None, None, None] < 0, block_N2LD[:, ::-1], block_N2LD)
            moments.add(block_N2LD[:, 0], block_N2LD[:, 1])
        return moments

    def add(self, states_generalized_NLD: ArrayLike, states_memorized_NLD: ArrayLike) -> None:
        """Add N pairs, row n of both arrays being one pair; ValueError unless both are (N, L, D)."""
        generalized_NLD = _as_batch("generalized", states_generalized_NLD, self.means_2LD[0])
        memorized_NLD = _as_batch("memorized", states_memorized_NLD, self.means_2LD[1])
        same("states_memorized: number of pairs", len(generalized_NLD), len(memorized_NLD))
        if not len(generalized_NLD):
            return
        series = generalized_NLD, memorized_NLD, generalized_NLD - memorized_NLD
        means, squares = zip(*map(_mean_and_squares, series), strict=True)
        self.merge(PairedMoments(len(generalized_NLD), np.stack(means[:2]), np.stack(squares)))

    def merge(self, other: PairedMoments) -> Self:
        """Add another shard's moments in place and return self; ValueError unless the shapes agree."""
        same("shape", self.means_2LD.shape, other.means_2LD.shape)
        if not other.count:
            return self
        count = self.count + other.count
        steps_2LD = other.means_2LD - self.means_2LD
        steps_3LD = np.concatenate([steps_2LD, steps_2LD[:1] - steps_2LD[1:]])
        self.squares_3LD += other.squares_3LD + self.count * other.count / count * steps_3LD**2
        self.means_2LD += other.count / count * steps_2LD
        self.count = count
        return self

    @property
    def nmd_LD(self) -> Floats:
        """Neuron-wise mean difference: mean of generalized - memorized, in units of the activation."""
        return self.means_2LD[0] - self.means_2LD[1]

    @property
    def rho_LD(self) -> Floats:
        """Pearson correlation of the activation with the label over the 2N states; NaN for a constant neuron."""
        # Pooling two equal halves: deviations from their own means, plus those of the means from the common mean.
        sd_LD = np.sqrt(self._squares_LD + self.nmd_LD**2 / 4)
        return np.clip(self._ratio(self.nmd_LD / 2, sd_LD), -1, 1)

    @property
    def effect_size_LD(self) -> Floats:
        """Cohen's d_z of the paired differences (ddof 1); NaN where they are constant or less than two."""
        return self._ratio(self.nmd_LD, np.sqrt(self.squares_3LD[2] / max(self.count - 1, 1)))

    @property
    def state_norm_L(self) -> Floats:
        """Root mean square over the 2N states of the Euclidean norm of a layer's state."""
        return np.sqrt(self._mean_square_LD.sum(axis=1))

    @property
    def _squares_LD(self) -> Floats:
        """Mean square of the deviations of each side from its own mean."""
        return (self.squares_3LD[0] + self.squares_3LD[1]) / (2 * self.count)

    @property
    def _mean_square_LD(self) -> Floats:
        return self._squares_LD + (self.means_2LD[0] ** 2 + self.means_2LD[1] ** 2) / 2

    def _ratio(self, numerator_LD: Floats, sd_LD: Floats) -> Floats:
        """numerator / sd; NaN where the sd is no more than rounding."""
        floor_LD = CONSTANT * np.sqrt(self._mean_square_LD)
        return np.divide(numerator_LD, sd_LD, out=np.full_like(sd_LD, math.nan), where=sd_LD > floor_LD)


@dataclass(frozen=True, eq=False)
class Contrast:
    """The statistics of every neuron at one site, as `PairedMoments` and `SignFlips` define them; NaN without a pair.

    Attributes:
        pairs, groups: numbers of pairs and of groups they come from.
        p_family_wise_LD: sign-flip permutation, max statistic over all neurons.
        p_false_discovery_LD: sign-flip permutation per neuron, Benjamini-Hochberg over all neurons.
    """

    site: str
    pairs: int
    groups: int
    nmd_LD: Floats
    rho_LD: Floats
    effect_size_LD: Floats
    p_family_wise_LD: Floats
    p_false_discovery_LD: Floats
    state_norm_L: Floats

    def top_neurons(self, top: float) -> NDArray[np.bool_]:
        """The share ``top`` of all neurons with the largest |rho|, bool (L, D); see ``top_by_magnitude``."""
        return top_by_magnitude(self.rho_LD, top)

    def save(self, path: str | Path) -> None:
        """Write `contrast.safetensors` as `docs/records.head.md` describes it; equal contrasts give equal bytes."""
        site, pairs, groups, *arrays = (getattr(self, field.name) for field in fields(self))
        tensors = dict(zip(ARRAYS, map(np.ascontiguousarray, arrays), strict=True))
        metadata = {"site": site, "pairs": str(pairs), "groups": str(groups)}
        metadata["digest"] = _digest(metadata, list(tensors.values()))
        Path(path).write_bytes(_sorted_header(to_safetensors(tensors, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> Contrast:
        """Read what `save` wrote; FileNotFoundError without a file, InputError where it is damaged or no contrast.

        A file without a digest, of another program, is taken as it is; in a run the marker of its stage has one too.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                arrays = [file.get_tensor(name) for name in ARRAYS]
            digest = metadata.pop("digest", None)
            if set(metadata) != {"site", "pairs", "groups"} or digest not in (None, _digest(metadata, arrays)):
                raise ValueError("its digest differs")
            facts = metadata["site"], int(metadata["pairs"]), int(metadata["groups"])
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not a readable contrast file ({error})") from error
        shapes, types = [array.shape for array in arrays], {array.dtype for array in arrays}
        if len(shapes[0]) != 2 or shapes != [shapes[0]] * 5 + [shapes[0][:1]] or types != {np.dtype(np.float64)}:
            why = f"shapes {shapes}; allowed are five (L, D) and (L,), all of float64"
            raise InputError(f"{path}: not a readable contrast file ({why})")
        return cls(*facts, *arrays)


@dataclass(slots=True, eq=False)
class ContrastAccumulator:
    """Streams pairs into a `Contrast`; shards with one site, shape, permutations and seed merge in any order.

    Significance is a paired sign-flip permutation test with the max statistic. If a neuron does not differ between the
    behaviours, the differences of a group are as likely to have the other sign. Whole groups flip, as the pairs of a
    group are not independent (exchangeability blocks: Winkler et al. 2014, NeuroImage 92:381-397). The statistic of a
    neuron is |sum of signed differences| / sqrt(sum of squared differences), whose denominator no flip changes. Sign b
    of a group is bit b of a hash of (seed, group), so that shards flip alike and their sums add up. Memory is
    B * L * D * 8 bytes, whatever N is: 25 MB for 6 layers of 512 at B = 1000.

    Attributes:
        sum_LD, squares_LD: sum of the differences (generalized - memorized) and of their squares.
        sums_BLD: sum of the differences with the signs of permutation b.
    """

    site: str
    seed: int
    moments: PairedMoments
    sum_LD: Floats
    squares_LD: Floats
    sums_BLD: Floats = field(repr=False)
    groups: Seen = field(default_factory=Seen)

    @classmethod
    def empty(
        cls, site: str, layers: int, neurons: int, permutations: int = 1000, seed: int = 0
    ) -> ContrastAccumulator:
        """No pairs yet, of states (layers, neurons); ValueError for less than one permutation."""
        if permutations < 1:
            raise ValueError(f"permutations: {permutations}; allowed is 1 or more")
        shape = (layers, neurons)
        sums_BLD = np.zeros((permutations, *shape))
        return cls(site, seed, PairedMoments.empty(shape), np.zeros(shape), np.zeros(shape), sums_BLD)

    def add(self, states_generalized_NLD: ArrayLike, states_memorized_NLD: ArrayLike, groups: Sequence[str]) -> None:
        """Add N pairs with their groups; row n of both arrays is one pair.

        ValueError for shapes not (N, L, D), not N groups, or a state that is not finite. Nothing is added then.
        """
        generalized_NLD = np.asarray(states_generalized_NLD, dtype=np.float64)
        memorized_NLD = np.asarray(states_memorized_NLD, dtype=np.float64)
        same("groups: length", len(generalized_NLD), len(groups))
        for side, states_NLD in (("generalized", generalized_NLD), ("memorized", memorized_NLD)):
            if not np.isfinite(states_NLD).all():
                raise ValueError(f"states_{side}: a value is infinite or NaN; allowed are finite states")
        self.moments.add(generalized_NLD, memorized_NLD)
        if not len(groups):
            return
        difference_NLD = generalized_NLD - memorized_NLD
        names_G, index_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        members_GN = sparse.csr_array((np.ones(len(index_N)), (index_N, np.arange(len(index_N)))))
        totals_GD = members_GN @ difference_NLD.reshape(len(index_N), -1)
        permutations = len(self.sums_BLD)
        signs_BG = np.stack([_signs(self.seed, permutations, str(name)) for name in names_G], axis=1).astype(np.float64)
        for rows in blocks(permutations, BLOCK_PERMUTATIONS):
            self.sums_BLD[rows] += (signs_BG[rows] @ totals_GD).reshape(-1, *self.sum_LD.shape)
        self.sum_LD += difference_NLD.sum(axis=0)
        self.squares_LD += (difference_NLD**2).sum(axis=0)
        for name in names_G:
            self.groups.add(str(name))

    def merge(self, other: ContrastAccumulator) -> Self:
        """Add another shard in place and return self; ValueError unless site, seed, permutations and shape agree."""
        for name in ("site", "seed"):
            same(name, getattr(self, name), getattr(other, name))
        same("shape", self.sums_BLD.shape, other.sums_BLD.shape)
        self.moments.merge(other.moments)
        self.sum_LD += other.sum_LD
        self.squares_LD += other.squares_LD
        self.sums_BLD += other.sums_BLD
        self.groups.update(other.groups)
        return self

    def p_values(self) -> tuple[Floats, Floats]:
        """Two-sided p-values (p_family_wise_LD, p_per_neuron_LD): 1 where all differences are 0, NaN without a pair.

        Family-wise compares each neuron with the largest statistic of each permutation (Westfall & Young 1993,
        "Resampling-based multiple testing"). Both are (1 + permutations at least as extreme) / (B + 1), which is never
        0 (Phipson & Smyth 2010, SAGMB 9:39).
        """
        shape, permutations = self.sum_LD.shape, len(self.sums_BLD)
        if not self.moments.count:
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

    def result(self) -> Contrast:
        """The contrast of the pairs so far; all NaN if there are none."""
        p_family_wise_LD, p_per_neuron_LD = self.p_values()
        if not self.moments.count:
            nan_LD = p_family_wise_LD
            return Contrast(self.site, 0, 0, nan_LD, nan_LD, nan_LD, nan_LD, nan_LD, nan_LD[:, 0])
        arrays = self.moments.nmd_LD, self.moments.rho_LD, self.moments.effect_size_LD, p_family_wise_LD
        q_LD = stats.false_discovery_control(p_per_neuron_LD.ravel()).reshape(p_per_neuron_LD.shape)
        return Contrast(self.site, self.moments.count, len(self.groups), *arrays, q_LD, self.moments.state_norm_L)


def _as_batch(side: str, values: ArrayLike, like_LD: Floats) -> Floats:
    """States as float64 (N, L, D); ValueError unless each has the shape of ``like_LD``."""
    values_NLD = np.asarray(values, dtype=np.float64)
    same(f"states_{side}: shape", (len(values_NLD), *like_LD.shape), values_NLD.shape)
    return values_NLD


@lru_cache(maxsize=2_048)  # of 1.1 kB each for a thousand permutations
def _signs(seed: int, permutations: int, group: str) -> NDArray[np.int8]:
    """B signs of a group, from a hash that is the same in every process, machine and version."""
    digest = hashlib.shake_256(f"{seed}:{group}".encode()).digest((permutations + 7) // 8)
    bits_B = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), count=permutations)
    return 2 * bits_B.astype(np.int8) - 1


def _mean_and_squares(values_NLD: Floats) -> tuple[Floats, Floats]:
    """Mean and sum of squared deviations, around the first row so that an offset costs no digits."""
    first_LD = values_NLD[0]
    centered_NLD = values_NLD - first_LD
    shift_LD = centered_NLD.mean(axis=0)
    centered_NLD -= shift_LD
    squares_LD: Floats = (centered_NLD**2).sum(axis=0)
    return first_LD + shift_LD, squares_LD


def _digest(facts: dict[str, Any], arrays: Sequence[NDArray[np.float64]]) -> str:
    """SHA-256 of the facts and the values of a contrast."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header's keys sorted: the library writes metadata in an order that varies."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
