"""``results.json``: the numbers of a run, cell by cell and over seeds, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from threadpoolctl import threadpool_limits

from mnemoscope.report.records import Cell, Run
from mnemoscope.report.rows import Part, Row, over_all, rows_of, view
from mnemoscope.report.stories import behaviour, cost, detector, differ, holds, read, steer, where
from mnemoscope.report.words import AIMS, DIRECTIONS
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.processes import Map, in_order

MEASURES = [story.measure for story in (behaviour, differ, read, holds, steer, where, detector, cost)]


def compute_results(run: Run, parallel: Map = in_order) -> Part:
    """The results of a run from its records, as ``results.json`` has them; undefined numbers are NaN.

    Raises InputError, as ``measure_run``.
    """
    return view(measure_run(run, parallel))


def measure_run(run: Run, parallel: Map = in_order) -> Iterator[Row]:
    """All rows of a run, in the order of ``results.json``.

    Raises:
        InputError: cells of one label have the same seed or different layers, or their records contradict each other.
    """
    labels = run.by_label()
    for label, cells in labels.items():
        seeds, depths = [cell.seed for cell in cells], {cell.name: len(cell.contrast.nmd_LD) for cell in cells}
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{cells[0].folder.parent}: two cells of {label!r} have the same seed ({seeds})")
        if len(set(depths.values())) > 1:
            raise InputError(f"{cells[0].folder.parent}: cells of one name differ in their layers ({depths})")
    measured = iter(parallel(measure_cell, [cell for cells in labels.values() for cell in cells]))
    yield from rows_of({"schema": 1, "study": str(run.study.get("study", ""))})
    for label, cells in labels.items():
        yield from _of_task(label, cells, list(islice(measured, len(cells))))
    across = {"seeds": holds.measure_seeds(run), "transfer": holds.measure_transfer(run, run.probe_layers())}
    yield from rows_of({"failed": run.failed, **across})


@threadpool_limits.wrap(1)  # processes beside each other have a processor each, and rounding is the same in all
def measure_cell(cell: Cell) -> list[Row]:
    """What all stories measure of one cell."""
    return [row for measure in MEASURES for row in rows_of(measure(cell), cell.label, cell.seed)]


def _of_task(label: str, cells: Sequence[Cell], measured: list[list[Row]]) -> Iterator[Row]:
    """One label over its seeds, then each of them; the settings shown are the first seed's."""
    best = {str(cell.seed): {aim: cell.chosen[aim]["best"] for aim in AIMS} for cell in cells}
    one_best = {d for d in DIRECTIONS if all(of["pairs"][d] == of["conflict"][d] for of in best.values())}
    # What is best for conflicts is left out where it is what is best for pairs.
    same = {("steering", d, "best_conflict") for d in one_best}
    kept = [[row for row in rows if row.place[:3] not in same] for rows in measured]
    together = [_with_verdicts(rows) for rows in (over_all(kept), *kept)]
    task = view(row._replace(task="") for row in together[0])
    sweep, aim = where.measure_sweep(cells), cells[0].chosen.get("aim", "pairs")
    more = {
        "seeds": [cell.seed for cell in cells],
        "aim": aim,
        "levers": cells[0].chosen.get("levers", {}),
        "left_out": cells[0].chosen.get("left_out", {}),
        "judged": cells[0].chosen.get("judged", ["test"]),
        "memory_is_conflict": bool(cells[0].info["memory_is_conflict"]),
        "documents": bool(cells[0].info.get("documents", False)),
        "weights": cells[0].info.get("weights"),
        "sweep": sweep,
        "by_layer": where.measure_layers(sweep, task.contrast, aim),
        "chosen_by_seed": best,
    }
    yield from chain(together[0], rows_of(more, label), *together[1:])


def _with_verdicts(rows: list[Row]) -> list[Row]:
    """What follows from the estimates of a probe, after them."""
    probe = view(row._replace(task="", seed=None) for row in rows if row.place[0] == "probe").probe
    return [*rows, *rows_of({"probe": read.verdicts(probe)}, rows[0].task, rows[0].seed)]
