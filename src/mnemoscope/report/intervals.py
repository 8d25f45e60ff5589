"""How a number of the report gets its interval: by group, and by draw where a control has several."""

from __future__ import annotations

import pandas as pd

from mnemoscope.report.schema import DIRECTIONS, Direction, Shares
from mnemoscope.statistics import proportion


def shares(rows: pd.DataFrame, direction: Direction, *, confabulated: bool = True) -> Shares:
    """Shares of steered examples that answer with the target behaviour, keep the source's, or do neither."""
    target, source = DIRECTIONS[direction]
    draws = rows.draw if "draw" in rows else None
    found = {
        key: proportion(rows.after == after, rows.group, draws)
        for key, after in (("shift", target), ("stay", source), ("other", "other"))
    }
    if confabulated and "confabulated" in rows:
        found["confabulated"] = proportion(rows.confabulated, rows.group, draws)
    return Shares(**found)
