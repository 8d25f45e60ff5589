"""The page of a reader: where it is right, and where it is wrong, about names and numbers of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mnemoscope.report.drawing import COLOUR, INK, MUTED, Panel, canvas, draw
from mnemoscope.report.page import Table, filled
from mnemoscope.report.words import count, percent, ranged
from mnemoscope.runs.files import write_atomically
from mnemoscope.statistics import auroc, proportion

TITLE, MOST, SHOWN = "Where it comes from", 12, 160  # rows of a table, and characters of a document
LEAD = """Of each name and number of an answer a reader tells whether it comes from the document in the prompt, from the
model's memory, or from neither. What it should tell was found by changing documents and reading again."""
P = ["p_document", "p_memory", "p_neither"]
COLOURS = {"document": COLOUR["generalized"], "memory": COLOUR["memorized"], "neither": MUTED}


def build_reader(folder: Path, model: str, rows: pd.DataFrame) -> Path:
    """Write ``reader.html``; returns its path.

    ``rows``: names and numbers that were read by probes fitted without their group: ``question``, ``document``,
    ``answer``, ``start``, ``end``, ``group``, ``label``, ``verdict``, ``p_document``, ``p_memory``, ``p_neither``.
    """
    rows = rows.assign(right=rows["label"] == rows["verdict"])
    article = {
        "name": model,
        "facts": f"{len(rows)} names and numbers in {count(rows['group'].nunique(), 'group')} of texts. Each was read "
        "by probes that were fitted without its group.",
        "sentences": _sentences(rows),
        "drawn": draw("reader", "What is read of each origin", (_verdicts(rows),)),
        "tables": [_confusion(rows), *(_texts(rows, right) for right in (True, False))],
    }
    about = {"brand": "reader", "title": TITLE, "lead": LEAD, "models": [], "across": []}
    return write_atomically(folder / "reader.html", filled("tables.html", **about, articles=[article]).encode())


def _sentences(rows: pd.DataFrame) -> list[str]:
    both = rows[rows["label"] != "neither"]
    told = auroc(both["p_document"] - both["p_memory"], both["label"] == "document", both["group"])
    right = proportion(rows["right"], rows["group"])
    sure = rows[rows[P].max(axis=1) >= 0.9]
    lines = [
        f"Document is told from memory {ranged(told)} right, of pairs of one each. Of all names and numbers "
        f"{ranged(right)} are read right.",
    ]
    if len(sure):
        share, well = percent(len(sure) / len(rows)), percent(float(sure["right"].mean()))
        lines.append(f"Where it is sure by 90 % ({share} of them), {well} are right.")
    return lines


def _confusion(rows: pd.DataFrame) -> Table:
    names = list(COLOURS)
    table = pd.crosstab(rows["label"], rows["verdict"]).reindex(index=names, columns=names, fill_value=0)
    lines = [[name, *(str(number) for number in table.loc[name])] for name in names]
    return Table(
        "What comes from where, and what is read", ["comes from", *(f"read: {name}" for name in COLOURS)], lines
    )


def _texts(rows: pd.DataFrame, right: bool) -> Table:
    """Some of either, of each origin alike, the surest first."""
    part = rows[rows["right"] == right].assign(sure=rows[P].max(axis=1))
    part = part.sort_values("sure", ascending=False).drop_duplicates(["group", "label"])
    part = part.groupby("label", sort=False).head(MOST // len(COLOURS))
    lines = []
    for row in part.to_dict("records"):
        answer, start, end = row["answer"], row["start"], row["end"]
        named = f"{answer[:start]}[{answer[start:end]}]{answer[end:]}".strip()
        facts = [row["label"], row["verdict"], percent(row["sure"]), row["question"], row["document"][:SHOWN]]
        lines.append([named, *facts])
    columns = ["answer", "comes from", "read as", "sure by", "question", "document"]
    return Table(f"Where it is {'right' if right else 'wrong'}, the surest first", columns, lines)


def _verdicts(rows: pd.DataFrame) -> Panel:
    """Of each origin, what it is read as, in per cent."""

    def shares(label: str) -> Sequence[float]:
        verdicts = rows.loc[rows["label"] == label, "verdict"]
        return [100 * float((verdicts == name).mean()) if len(verdicts) else 0.0 for name in COLOURS]

    def plot() -> Figure:
        figure, ax = canvas(330)
        ax.set_title("What is read of each origin")
        left = np.zeros(len(COLOURS))
        by_verdict = np.array([shares(label) for label in reversed(COLOURS)]).T
        for (name, colour), share in zip(COLOURS.items(), by_verdict, strict=True):
            ax.barh(range(len(COLOURS)), share, left=left, height=0.5, color=colour, label=f"read as {name}")
            left += share
        ax.set(
            xlabel="%", xlim=(0, 100), yticks=range(len(COLOURS)), yticklabels=[f"from {n}" for n in reversed(COLOURS)]
        )
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=10, labelcolor=INK)
        return figure

    return plot
