"""Print docs/ARENA.md, all methods on all sets: ``python docs/arena.py RUN... > docs/ARENA.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mnemoscope.report.arena import Records, arena_name, results_of
from mnemoscope.report.arena_page import across_tables, facts_of, sentence, tables_of
from mnemoscope.report.page import Table

HEAD = """# Arena

Every method of the arena on one frozen test set, in both directions. This page is printed by `docs/arena.py` from run
folders that `mnemoscope arena` made; its figures are those of `RUN/arena.html`.

- **Wanted answer**: that of the text (to follow the text), or that of memory. Shares are of all test conflicts whose
  items the model knows by heart; that list was frozen before anything was applied.
- **Lost**: mean share of texts that agree and of bare questions that no longer get their answer.
- **Chosen on tune**: the setting with the largest share of wanted answers less lost ones; the rule is the same for all.
- **Control**: random directions of the same norm, mean of the draws and the worst of them.
"""


def main() -> None:
    """Print the page."""
    runs = [Path(given) for given in sys.argv[1:]]
    if not runs:
        sys.exit("usage: python docs/arena.py RUN...")
    print("\n".join(page(runs)).rstrip())


def page(runs: Sequence[Path]) -> Iterator[str]:
    """The parts of the page."""
    yield HEAD
    found = [results_of(Records.of(run / "arena")) for run in runs]
    if len(found) > 1:
        yield "## Side by side\n"
        for table in across_tables(found):
            yield markdown(table)
    for results in found:
        yield f"## {arena_name(results)}\n\n{facts_of(results)}\n"
        for toward in ("generalized", "memorized"):
            yield f"- {sentence(results, toward)}"
        yield ""
        for table in tables_of(results):
            yield markdown(table)


def markdown(table: Table) -> str:
    """A table with its caption."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{table.caption}**\n", *lines, ""])


if __name__ == "__main__":
    main()
