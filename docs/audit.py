"""What audits find of what was planted, as a page: ``python docs/audit.py OUT... [--keep docs/results/audit.json]``.

Each OUT is a folder of ``benchmarks/planted.py``, after ``judge``, whose name is that of the model. What is kept is its
JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping

import printing
from printing import Found

MEASURES = {
    "score": "ours",
    "sooner": "ours, costs alone",
    "loss": "loss",
    "zlib": "loss / length in zlib",
    "min-k": "Min-K%",
    "min-k++": "Min-K%++",
    "gap": "right, less the share of variants solved",
    "completion": "ROUGE-L of the completed text",
    "peaked": "peaked replies (CDD)",
}
TIMES = ("1", "2", "4", "8", "16")


def sections_of(runs: Mapping[str, Mapping[str, Found]]) -> printing.Sections:
    """Of each run AUROC by how often items were taught, then who is accused."""
    sections: dict[str, list[str | printing.Table]] = {}
    for name, run in runs.items():
        planted = run["planted"]
        rows = [
            [said, *(f"{planted['planted, compared'][measure][f'{n} times']:.2f}" for n in TIMES), *told(measure, of)]
            for measure, said in MEASURES.items()
            if (of := planted["planted, compared"].get(measure))
        ]
        columns = [
            "AUROC of items taught",
            *("once" if n == "1" else f"{n} times" for n in TIMES),
            "4 and more",
            "found at 1 % false accusations",
            "ours is ahead by",
        ]
        sections[f"{name}: items that were taught, against what is clean"] = [printing.table(columns, rows)]
        accused = [
            [said, *(f"{planted[f'{checkpoint} answers'][what][n]:.2f}" for n in ("0", *TIMES))]
            for said, checkpoint, what in (
                ("called recited", "planted", "accused"),
                ("called recited, of the twin", "twin", "accused"),
                ("right originals", "planted", "right"),
                ("variants solved", "planted", "variants"),
            )
        ]
        sections[f"{name}: verdicts and answers"] = [
            "Shares, by how often an item was taught; the twin was taught as many fresh variants.",
            printing.table(["share", "never", *("once" if n == "1" else f"{n} times" for n in TIMES)], accused),
        ]
    return sections


def told(measure: str, of: Found) -> list[str]:
    """Items that were taught often, by a measure, and how much ours is ahead."""
    lead = f"{of['ours ahead by']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f})"
    return [f"{of['often']:.3f}", f"{of['found at 1 % false']:.2f}", "" if measure == "score" else lead]


def published() -> str:
    """The page of what is published."""
    return printing.of_runs("audit", sections_of)


if __name__ == "__main__":
    printing.print_runs("audit", sections_of, ("planted",))
