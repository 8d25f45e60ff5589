"""Per-neuron statistics of pairs: what differs between remembering and thinking, and how sure that is.

Shapes: N pairs, L layers, D neurons. All states are taken at the decision position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from mnemoscope.errors import InputError
from mnemoscope.seen import Seen
from mnemoscope.statistics import Floats, PairedMoments, SignFlips, benjamini_hochberg, top_by_magnitude

# A standard deviation below this share of a neuron's root mean square is rounding: the neuron is constant.
CONSTANT = 1e-12
BLOCK_PAIRS = 256
# Names in the file, in the order of the fields of `Contrast`.
ARRAYS = ("nmd", "rho", "effect_size", "p_family_wise", "p_false_discovery", "state_norm")


@dataclass(frozen=True, eq=False)
class Contrast:
    """The statistics of every neuron at one site, over N pairs.

    With labels y = +1 (generalized) and -1 (memorized) in equal number, y has mean 0 and variance 1, so that over the
    2N states cov(h, y) = mean(h y) = (mean of h^G - mean of h^M) / 2 = NMD / 2, and rho = NMD / (2 sd(h)): rho and NMD
    have one sign.

    Attributes:
        site: where the states were taken.
        pairs, groups: numbers of pairs and of groups they come from.
        nmd_LD: mean of generalized - memorized, in units of the activation.
        rho_LD: Pearson correlation of the activation with y over the 2N states; NaN for a constant neuron.
        effect_size_LD: mean / standard deviation (ddof 1) of the paired differences (Cohen's d_z); NaN where these are
            constant, and for less than two pairs.
        p_family_wise_LD: sign-flip permutation, max statistic over all neurons.
        p_false_discovery_LD: sign-flip permutation per neuron, Benjamini-Hochberg over all neurons.
        state_norm_L: root mean square over the 2N states of the Euclidean norm of a layer's state.
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
        """The ceil(top * L * D) neurons with the largest |rho|, over all layers at once.

        A NaN rho counts as 0; of equal neurons the one with the lower layer, then index, is taken.

        Args:
            top: share of all neurons, in (0, 1].

        Returns:
            bool, shape (L, D).

        Raises:
            ValueError: `top` outside (0, 1].
        """
        return top_by_magnitude(self.rho_LD, top)

    def save(self, path: str | Path) -> None:
        """Write `contrast.safetensors` as `docs/RECORDS.md` describes it; equal contrasts give equal bytes."""
        arrays = (self.nmd_LD, self.rho_LD, self.effect_size_LD, self.p_family_wise_LD, self.p_false_discovery_LD)
        tensors = dict(zip(ARRAYS, map(np.ascontiguousarray, (*arrays, self.state_norm_L)), strict=True))
        metadata = {"site": self.site, "pairs": str(self.pairs), "groups": str(self.groups)}
        Path(path).write_bytes(_sorted_header(to_safetensors(tensors, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> Contrast:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: the file is damaged, or is not a contrast; one line says what is wrong.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                arrays = [file.get_tensor(name) for name in ARRAYS]
            pairs, groups, site = int(metadata["pairs"]), int(metadata["groups"]), metadata["site"]
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not a readable contrast file ({error})") from error
        shapes = [array.shape for array in arrays]
        if len(shapes[0]) != 2 or shapes != [shapes[0]] * 5 + [shapes[0][:1]]:
            raise InputError(
                f"{path}: not a readable contrast file (shapes {shapes}; allowed are five (L, D) and (L,))"
            )
        if {array.dtype for array in arrays} != {np.dtype(np.float64)}:
            raise InputError(f"{path}: not a readable contrast file (allowed is float64)")
        return cls(site, pairs, groups, *arrays)


@dataclass(eq=False)
class ContrastAccumulator:
    """Streams pairs into a `Contrast`; memory depends on neurons and permutations, not on the number of pairs.

    Shards may be added by different workers in any order, as long as site, shape, permutations and seed agree.

    Attributes:
        site: where the states are taken.
        moments, flips: the streamed statistics.
        groups: the groups seen.
    """

    site: str
    moments: PairedMoments
    flips: SignFlips
    groups: Seen = field(default_factory=Seen)

    @classmethod
    def empty(
        cls, site: str, layers: int, neurons: int, permutations: int = 1000, seed: int = 0
    ) -> ContrastAccumulator:
        """No pairs yet, of states (layers, neurons); ValueError for less than one permutation."""
        shape = (layers, neurons)
        return cls(site, PairedMoments.empty(shape), SignFlips.empty(shape, permutations, seed))

    def add(self, states_generalized_NLD: ArrayLike, states_memorized_NLD: ArrayLike, groups: Sequence[str]) -> None:
        """Take in N more pairs.

        Args:
            states_generalized_NLD: float32 or float64, of the generalized sides.
            states_memorized_NLD: of the memorized sides; row n of both is one pair.
            groups: the group of each pair.

        Raises:
            ValueError: shapes not (N, L, D), not N groups, or a state that is not finite. Nothing is added then.
        """
        generalized_NLD = np.asarray(states_generalized_NLD, dtype=np.float64)
        memorized_NLD = np.asarray(states_memorized_NLD, dtype=np.float64)
        if len(groups) != len(generalized_NLD):
            raise ValueError(
                f"groups: {len(groups)} names; allowed is one for each of the {len(generalized_NLD)} pairs"
            )
        for name, states_NLD in (("generalized", generalized_NLD), ("memorized", memorized_NLD)):
            if not np.isfinite(states_NLD).all():
                raise ValueError(f"states_{name}: a value is infinite or NaN; allowed are finite states")
        self.moments.add(generalized_NLD, memorized_NLD)
        self.flips.add(generalized_NLD - memorized_NLD, groups)
        for group in groups:
            self.groups.add(group)

    def merge(self, other: ContrastAccumulator) -> Self:
        """Take in another shard in place, and return self.

        Raises:
            ValueError: site, shape, permutations or seed differ. Nothing is merged then.
        """
        if other.site != self.site:
            raise ValueError(f"site: {other.site!r}; allowed is {self.site!r}, as in the accumulator it is merged into")
        self.flips.merge(other.flips)  # first, for it checks seed and permutations besides the shape
        self.moments.merge(other.moments)
        self.groups.update(other.groups)
        return self

    def result(self) -> Contrast:
        """The contrast of the pairs so far; all NaN if there are none."""
        pairs = self.moments.count
        p_family_wise_LD, p_per_neuron_LD = self.flips.p_values()
        if not pairs:
            nan_LD = np.full_like(p_family_wise_LD, math.nan)
            return Contrast(self.site, 0, 0, nan_LD, nan_LD, nan_LD, nan_LD, nan_LD, nan_LD[:, 0])
        nmd_LD, sd_LD, mean_square_LD = _pooled(self.moments)
        floor_LD = CONSTANT * np.sqrt(mean_square_LD)
        sd_difference_LD = np.sqrt(self.moments.squares_3LD[2] / max(pairs - 1, 1))
        return Contrast(
            site=self.site,
            pairs=pairs,
            groups=len(self.groups),
            nmd_LD=nmd_LD,
            rho_LD=np.clip(_ratio(nmd_LD / 2, sd_LD, floor_LD), -1, 1),
            effect_size_LD=_ratio(nmd_LD, sd_difference_LD, floor_LD),
            p_family_wise_LD=p_family_wise_LD,
            p_false_discovery_LD=benjamini_hochberg(p_per_neuron_LD),
            state_norm_L=np.sqrt(mean_square_LD.sum(axis=1)),
        )


def nmd_and_rho(generalized_NLD: ArrayLike, memorized_NLD: ArrayLike) -> tuple[Floats, Floats]:
    """`nmd_LD` and `rho_LD` of a `Contrast`, without the tests: cheap enough for many parts of the pairs.

    Args:
        generalized_NLD, memorized_NLD: states; row n of both is one pair.

    Raises:
        ValueError: the shapes differ, or there is no pair.
    """
    generalized, memorized = np.asarray(generalized_NLD), np.asarray(memorized_NLD)
    if generalized.shape != memorized.shape or not len(generalized):
        raise ValueError(
            f"states: {generalized.shape} and {memorized.shape}; allowed are equal shapes, one pair or more"
        )
    moments = PairedMoments.empty(generalized.shape[1:])
    for start in range(0, len(generalized), BLOCK_PAIRS):  # the float64 copies are of one block at a time
        moments.add(generalized[start : start + BLOCK_PAIRS], memorized[start : start + BLOCK_PAIRS])
    nmd_LD, sd_LD, mean_square_LD = _pooled(moments)
    return nmd_LD, np.clip(_ratio(nmd_LD / 2, sd_LD, CONSTANT * np.sqrt(mean_square_LD)), -1, 1)


def _pooled(moments: PairedMoments) -> tuple[Floats, Floats, Floats]:
    """NMD, the standard deviation (ddof 0) and the mean square over the 2N states; each (L, D)."""
    mean_generalized_LD, mean_memorized_LD = moments.means_2LD
    squares_LD = (moments.squares_3LD[0] + moments.squares_3LD[1]) / (2 * moments.count)
    nmd_LD = mean_generalized_LD - mean_memorized_LD
    mean_square_LD = squares_LD + (mean_generalized_LD**2 + mean_memorized_LD**2) / 2
    # Pooling two equal halves: deviations from their own means, plus those of the means from the common mean.
    return nmd_LD, np.sqrt(squares_LD + nmd_LD**2 / 4), mean_square_LD


def _ratio(numerator_LD: Floats, sd_LD: Floats, floor_LD: Floats) -> Floats:
    """numerator / sd; NaN where the sd is no more than rounding."""
    ratio_LD: Floats = np.full_like(sd_LD, math.nan)
    np.divide(numerator_LD, sd_LD, out=ratio_LD, where=sd_LD > floor_LD)
    return ratio_LD


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header's keys sorted: the library writes metadata in an order that varies."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
