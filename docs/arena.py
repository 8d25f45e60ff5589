"""Print the page of the arena, all methods on all sets: ``python docs/arena.py RESULTS...``.

RESULTS are the files ``arena/results.json`` of runs. The published ones are a list in ``docs/results/arena.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from printing import FOLDER, head, lines_of, table

from mnemoscope.report.page import Table
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.stories.arena import KEPT, MARGIN
from mnemoscope.report.stories.arena_page import across_tables, arena_name, facts_of, sentence, tables_of, verdict
from mnemoscope.report.words import percent
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate

OURS = ("gradient", "learned", "low-rank")
KINDS = {
    "a sentence in the prompt": ("prompt",),
    "solved conflicts before it": ("few-shot",),
    "contrastive decoding, two passes": ("cad", "adacad", "coiecd", "grd", "nwcad", "fides"),
    "an oracle: the bare question, or no text": ("cad-bare", "delete"),
    "one vector, ours": ("gradient", "learned"),
    "one vector, others'": ("caa", "nmd", "iti", "knob"),
    "heads, neurons or attention scaled": ("june", "juice", "ircan", "attend"),
    "a low-rank edit, ours": ("low-rank",),
    "a low-rank edit, LoReFT": ("reft",),
    "an adapter, other weights": ("lora", "dpo"),
}
STAY = 0.95  # of agreeing texts and of bare questions
RIVALS = {"adapter": "the best adapter", "words": "the best wording", "passes": "the best of two passes"}


def published() -> str:
    """The page of the published runs."""
    return "\n".join(page(json.loads((FOLDER / "results" / "arena.json").read_text())))


def page(written: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The parts of the page, from the content of ``arena/results.json`` of every run."""
    found = [parts_of(results) for results in written]
    yield head("arena")
    if len(found) > 1:
        yield "## Side by side\n"
        yield from map(captioned, across_tables(found))
        yield "## By what is changed\n"
        yield captioned(kinds(found))
    if found:
        yield "## Aims\n"
        yield from map(captioned, aims(found))
    for results in found:
        yield f"## {arena_name(results)}\n\n{facts_of(results)}\n"
        for toward in Toward:
            yield f"- {sentence(results, toward)}"
            yield f"- {verdict(results, toward)}"
        yield ""
        yield from map(captioned, tables_of(results))


def kinds(found: Sequence[Part]) -> Table:
    """Of each kind the method that is best on tune: wanted and lost answers, median (range) of the arenas."""
    rows = []
    for kind, names in KINDS.items():
        row = [kind]
        for toward in Toward:
            cells = []
            for results in found:
                of_kind = [results["methods"][name][toward] for name in names if name in results["methods"]]
                if of_kind:
                    cells.append(max(of_kind, key=worth))
            row += [spread(cell.wanted.estimate for cell in cells), spread(cell["lost"] for cell in cells)]
        rows.append(row)
    columns = [f"{toward}: {what}" for toward in Toward for what in ("wanted", "lost")]
    return Table(
        f"Median (range) of {len(found)} arenas, of each kind the method best on tune", ["kind", *columns], rows
    )


def worth(cell: Part) -> float:
    """What methods are chosen by on tune."""
    return cell["tune"]["wanted"] - cell["tune"]["lost"]


def spread(shares: Iterable[float]) -> str:
    """Median and range of shares, in per cent."""
    found = sorted(shares)
    return f"{percent(median(found))} ({percent(found[0])} to {percent(found[-1])})" if found else "-"


def aims(found: Sequence[Part]) -> Iterator[Table]:
    """In how many directions the best of our methods by the tune split meets each aim, and the comparisons."""
    told = [compared(results, toward) for results in found for toward in Toward if set(OURS) & set(results["methods"])]
    if told:
        counted = [[aim, f"{sum(met[aim] for _, met in told)} of {len(told)}"] for aim in told[0][1]]
        yield Table("Directions in which an aim is met", ["aim", "directions"], counted)
        names = ["arena", "toward", "ours by tune", *(f"minus {said}" for said in RIVALS.values())]
        yield Table("Exact answers, and differences in points", names, [row for row, _ in told])


def compared(results: Part, toward: str) -> tuple[list[str], dict[str, bool]]:
    """One direction: a row of the table, and whether each aim is met."""
    methods = {name: cell[toward] for name, cell in results["methods"].items()}
    mine = [name for name in OURS if name in methods]  # in this order, so that a tie on tune is the first's
    ours = max(mine, key=lambda name: worth(methods[name]))
    best, tests, cell = results["best"][toward], methods[ours]["tests"], methods[ours]
    beside = {role: tests[name] for role, name in best.items() if name in tests}
    fair = {name: one.default.mix for name, one in methods.items() if not results["methods"][name]["oracle"]}
    fair["unsteered"] = results.unsteered[toward].mix
    met = {
        f"no worse than {RIVALS['adapter']}": "adapter" in beside and beside["adapter"].no_worse,
        f"surely above {RIVALS['words']}": "words" in beside and beside["words"].exact.low > 0,
        f"surely above {RIVALS['passes']}": "passes" in beside and beside["passes"].exact.low > 0,
        f"{STAY} of agreeing texts and of bare questions stay": all(cell[one].estimate >= STAY for one in KEPT),
        "with the gate by tune first on every mix, or less than 5 points below": all(
            mix.estimate >= max(one[name].estimate for one in fair.values()) - MARGIN
            for name, mix in cell.default.mix.items()
        ),
    }
    told = f"{ours} {percent(cell.exact.estimate)} ({100 * cell.exact.low:.0f} to {100 * cell.exact.high:.0f})"
    differences = [f"{best[role]} {difference(beside[role].exact)}" if role in beside else "-" for role in RIVALS]
    return [arena_name(results), toward, told, *differences], met


def difference(found: Estimate) -> str:
    """A difference of shares in points."""
    return f"{100 * found.estimate:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f})"


def captioned(made: Table) -> str:
    """A table with its caption."""
    return f"**{made.caption}**\n\n{lines_of(table(made.columns, made.rows))}\n"


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python docs/arena.py RESULTS...")
    found = [json.loads(Path(given).read_text()) for given in sys.argv[1:]]
    print("\n".join(page(found)))
