"""Print docs/ARENA.md, all methods on all sets: ``python docs/arena.py RESULTS... > docs/ARENA.md``.

RESULTS are the files ``arena/results.json`` of runs; those that are published lie in ``docs/results/arena``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mnemoscope.report.arena import KEPT, TOWARDS, arena_name
from mnemoscope.report.arena_page import across_tables, facts_of, sentence, tables_of
from mnemoscope.report.page import Table
from mnemoscope.report.words import percent
from mnemoscope.statistics import Estimate

OURS = ("gradient", "learned", "low-rank")
KINDS = {
    "a sentence in the prompt": ("prompt",),
    "contrastive decoding, two passes": ("cad", "adacad", "coiecd"),
    "one vector, ours": ("gradient", "learned"),
    "one vector, others'": ("caa", "nmd", "iti", "knob"),
    "heads or neurons scaled": ("june", "juice", "ircan"),
    "a low-rank edit, ours": ("low-rank",),
    "a low-rank edit, LoReFT": ("reft",),
    "an adapter, other weights": ("lora", "dpo"),
}
STAY = {"agreeing": 0.97, "bare": 0.95}
RIVALS = {
    "first": "the first that takes one pass",
    "words": "the best wording",
    "contrastive": "contrastive decoding",
}
SURE = 0.05  # of a corrected p-value, at most

HEAD = """# Arena

Every method of the arena on one frozen test set, in both directions. `docs/arena.py` prints this page from the files
`arena/results.json` of runs that `mnemoscope arena` made, with the options of `scripts/arenas.sh`; its figures are
those of `RUN/arena.html`.

- **Wanted answer**: that of the text (to follow the text), or that of memory. Shares are of all test conflicts whose
  items the model knows by heart; that list was frozen before anything was applied.
- **Lost**: mean share of texts that agree and of bare questions that no longer get their answer.
- **Chosen on tune**: the setting with the largest share of wanted answers less lost ones; the rule is the same for all.
  **Best on tune** is the method for which that is largest; of equal ones the first in the list of methods is named.
- **Control**: random directions of the same norm, mean of the draws and the worst of them.
- **Surely above**: the interval lies above 0, and p is below 0.05, corrected over the comparisons of one direction.
- **The first that takes one pass** is the one with the most wanted answers on test, chosen after the fact.
- **Contrastive decoding** is that of the three which is best on tune.
- **A seed deals the same items anew**: nobody had looked at its test split, but under other seeds, with which methods
  were developed, most of its proverbs and facts had been fitted on or judged.
- `reft` is LoReFT at one of three layers, from the decision on; its authors also choose tokens of the prompt, and
  several layers. Of ours `low-rank` shifts every token at five blocks, `gradient` and `learned` one layer from the
  decision on.
"""


def main() -> None:
    """Print the page."""
    if not sys.argv[1:]:
        sys.exit("usage: python docs/arena.py RESULTS...")
    found = [json.loads(Path(given).read_text()) for given in sys.argv[1:]]
    print("\n".join(page(found)).rstrip())


def page(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The parts of the page, from the content of ``arena/results.json`` of every run."""
    yield HEAD
    if len(found) > 1:
        yield "## Side by side\n"
        for table in across_tables(found):
            yield markdown(table)
        yield "## By what is changed\n"
        yield markdown(kinds(found))
    yield "## Aims\n"
    for table in aims(found):
        yield markdown(table)
    for results in found:
        yield f"## {arena_name(results)}\n\n{facts_of(results)}\n"
        for toward in TOWARDS:
            yield f"- {sentence(results, toward)}"
        yield ""
        for table in tables_of(results):
            yield markdown(table)


def kinds(found: Sequence[Mapping[str, Any]]) -> Table:
    """Of each kind the method that is best on tune: wanted and lost answers, median (range) of the arenas."""
    rows = []
    for kind, names in KINDS.items():
        row = [kind]
        for toward in TOWARDS:
            cells = []
            for results in found:
                of_kind = [results["methods"][name][toward] for name in names if name in results["methods"]]
                if of_kind:
                    cells.append(max(of_kind, key=worth))
            row += [spread(cell["wanted"]["estimate"] for cell in cells), spread(cell["lost"] for cell in cells)]
        rows.append(row)
    columns = [f"{toward}: {what}" for toward in TOWARDS for what in ("wanted", "lost")]
    return Table(
        f"Median (range) of {len(found)} arenas, of each kind the method best on tune", ["kind", *columns], rows
    )


def worth(cell: Mapping[str, Any]) -> float:
    """What methods are chosen by on tune."""
    return cell["tune"]["wanted"] - cell["tune"]["lost"]


def spread(shares: Iterable[float]) -> str:
    """Median and range of shares, in per cent."""
    found = sorted(shares)
    return f"{percent(median(found))} ({percent(found[0])} to {percent(found[-1])})" if found else "-"


def aims(found: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """In how many directions the best of our methods by the tune split meets each aim, and the comparisons."""
    told = [compared(results, toward) for results in found for toward in TOWARDS if set(OURS) & set(results["methods"])]
    if told:
        counted = [[aim, f"{sum(met[aim] for _, met in told)} of {len(told)}"] for aim in told[0][1]]
        yield Table("Directions in which an aim is met", ["aim", "directions"], counted)
        names = ["arena", "toward", "ours by tune", *(f"minus {said}" for said in RIVALS.values())]
        yield Table("Wanted answers, and differences in points", names, [row for row, _ in told])


def compared(results: Mapping[str, Any], toward: str) -> tuple[list[str], dict[str, bool]]:
    """One direction: a row of the table, and whether each aim is met."""
    methods = {name: cell[toward] for name, cell in results["methods"].items()}
    mine = [name for name in OURS if name in methods]  # in this order, so that a tie on tune is the first's
    ours = max(mine, key=lambda name: worth(methods[name]))
    first = results["first"][toward]
    baselines, tests = results["baselines"][toward], methods[ours]["tests"]
    ahead = {role: Estimate(**tests[name]["difference"]) for role, name in baselines.items() if name in tests}
    sure = {role: ahead[role].low > 0 and tests[baselines[role]]["p_holm"] < SURE for role in ahead}
    if ours != first["method"]:
        ahead["first"] = Estimate(**first["minus"][ours])
    gated = methods[ours]["gated"]
    mixed = {name: (cell["gated"] or cell["mix"])["estimate"] for name, cell in methods.items()}
    mixed["unsteered"] = results["unsteered"][toward]["mix"]["estimate"]
    met = {
        f"not surely below {RIVALS['first']}": "first" not in ahead or ahead["first"].high >= 0,
        f"surely above {RIVALS['words']}": sure.get("words", False),
        f"surely above {RIVALS['contrastive']}": sure.get("contrastive", False),
        "0.97 of agreeing texts and 0.95 of bare questions stay behind the gate": gated is not None
        and all(gated["right"][kept] >= STAY[kept] for kept in KEPT),
        "first on the mix, behind the gate": gated is not None and mixed[ours] >= max(mixed.values()),
    }
    wanted = methods[ours]["wanted"]
    told = f"{ours} {percent(wanted['estimate'])} ({100 * wanted['low']:.0f} to {100 * wanted['high']:.0f})"
    differences = [difference(ahead[rival]) if rival in ahead else "-" for rival in RIVALS]
    if "contrastive" in ahead:
        differences[2] = f"{baselines['contrastive']} {differences[2]}"
    differences[0] = f"{first['method']} {differences[0] if ours != first['method'] else '(itself)'}"
    return [arena_name(results), toward, told, *differences], met


def difference(found: Estimate) -> str:
    """A difference of shares in points."""
    return f"{100 * found.estimate:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f})"


def markdown(table: Table) -> str:
    """A table with its caption."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{table.caption}**\n", *lines, ""])


if __name__ == "__main__":
    main()
