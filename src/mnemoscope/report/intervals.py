"""How a number of the report gets its interval: by group, and by draw where a control has several."""

from __future__ import annotations

import pandas as pd

from mnemoscope.report.schema import DIRECTIONS, Direction, Shares
from mnemoscope.statistics import group_index, proportion


def shares(rows: pd.DataFrame, direction: Direction, *, confabulated: bool = True) -> Shares:
    """Shares of steered examples that answer with the target behaviour, keep the source's, or do neither."""
    target, source = DIRECTIONS[direction]
    groups, draws = group_index(rows.group, len(rows)), rows.draw if "draw" in rows else None  # names are sorted once
    found = {
        key: proportion(rows.after == after, groups, draws)
        for key, after in (("shift", target), ("stay", source), ("other", "other"))
    }
    if confabulated and "confabulated" in rows:
        found["confabulated"] = proportion(rows.confabulated, groups, draws)
    return Shares(**found)
