"""Print a report as Markdown, its answers and tables, for docs/REVIEW.md: ``python docs/review.py runs/paper``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mnemoscope.report import STORIES
from mnemoscope.report.page import Chapter, Table, View
from mnemoscope.report.records import read_run
from mnemoscope.report.schema import Results


def main(run: Path) -> None:
    """Print every task, story by story."""
    results = Results.model_validate(json.loads((run / "results.json").read_text()))
    for label, cells in read_run(run).by_label().items():
        view = View(results.tasks[label], cells, results.seeds.get(label, []))
        print(f"## {label}\n")
        for chapter in filter(None, (story(view) for story in STORIES)):
            answer = chapter.answer
            facts = " ".join(filter(None, (answer.number and f"**{answer.number}**", answer.sentence, answer.note)))
            print(f"### {answer.question} {answer.verdict}\n\n{facts}\n")
            for table in tables_of(chapter):
                print(markdown(table), end="\n\n")


def tables_of(chapter: Chapter) -> Iterator[Table]:
    """The tables of a chapter, in the order of the page."""
    yield from (exhibit.table for exhibit in chapter.exhibits if exhibit.table)
    yield from chapter.tables


def markdown(table: Table) -> str:
    """A table of the page as Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"{table.caption}:\n", *lines]).replace("\u00a0", " ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
