"""Intervals, and what two sets have in common: every number with an uncertainty comes from here.

Undefined is NaN, never 0, and an interval of width 0 is never reported: it looks certain and is not.
Randomness enters through an explicit generator, or through the name of a stream.
"""

from mnemoscope.statistics.intervals import Estimate, Floats, auroc, mean_with_range, named_rng, over_seeds, proportion
from mnemoscope.statistics.likeness import (
    cosine,
    half_of_groups,
    in_group_order,
    overlap,
    overlap_by_chance,
    rank_correlation,
    top_by_magnitude,
)
