"""Intervals, and what two sets have in common: every number with an uncertainty comes from here.

Undefined is NaN, never 0, and an interval of width 0 is never reported: it looks certain and is not.
"""

from mnemoscope.statistics.comparing import (
    cosine,
    half_of_groups,
    holm,
    in_group_order,
    overlap,
    overlap_by_chance,
    rank_correlation,
    sign_flips,
    top_by_magnitude,
)
from mnemoscope.statistics.intervals import (
    LEAST_GROUPS,
    Estimate,
    Floats,
    auroc,
    averaged,
    group_index,
    mean,
    mean_with_range,
    over_draws,
    over_seeds,
    proportion,
    surely_more,
)
