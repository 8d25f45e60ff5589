"""How a number of the report gets its interval: the bootstrap of ``statistics``, by group, with named resamples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.schema import DIRECTIONS, Direction, Shares
from mnemoscope.statistics import Estimate, auroc, named_rng, proportion


def mean(values_N: Any, groups_N: Any, name: str, *, signed: bool = False) -> Estimate:
    """The mean of 0/1 values, differences of such (``signed``), or margins, with resamples that its name seeds."""
    return proportion(np.asarray(values_N, float), np.asarray(groups_N, str), named_rng(name), signed=signed)


def shared_mean(values_N: Any, groups_N: Any, stream: str, *, signed: bool = False) -> Estimate:
    """As ``mean``, with the resamples of all means of the same stream (as a rule the cell) and number of groups."""
    values_N = np.asarray(values_N, float)
    known_N = ~np.isnan(values_N)
    codes_N = pd.factorize(pd.Series(groups_N)[known_N])[0]
    return proportion(values_N[known_N], codes_N, stream, signed=signed)


def ranking(scores_N: Any, labels_N: Any, groups_N: Any, name: str) -> Estimate:
    """Area under the ROC curve, with resamples of its own."""
    return auroc(scores_N, labels_N, np.asarray(groups_N, str), named_rng(name))


def shares(rows: pd.DataFrame, direction: Direction, stream: str, *, confabulated: bool = True) -> Shares:
    """Shares of steered examples that answer with the target behaviour, keep the source's, or do neither."""
    target, source = DIRECTIONS[direction]
    found = {
        key: shared_mean(rows.after == after, rows.group, stream)
        for key, after in (("shift", target), ("stay", source), ("other", "other"))
    }
    if confabulated and "confabulated" in rows:
        found["confabulated"] = shared_mean(rows.confabulated, rows.group, stream)
    return Shares(**found)
