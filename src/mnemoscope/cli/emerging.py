"""The commands about models in training: watch, emergence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mnemoscope.cli import given
from mnemoscope.cli.shared import app, formatted, options, say

Site = Literal["block", "attention", "mlp", "neuron"]
SHOWN = {"worked out": "conflict_generalized", "remembered": "conflict_memorized", "other": "conflict_other"}
SHOWN |= {"new right": "novel_accuracy", "recalled": "recall"}


@app.command()
def watch(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of a trainer, a run, a cell, or a table.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The picture; default: beside the table.")] = None,
    every: Annotated[float | None, typer.Option(min=1.0, help="SECONDS between two looks at whether it grew.")] = None,
    as_json: given.AsJson = False,
) -> None:
    """Draw how both behaviours emerge while a model trains; with --every, until it is stopped."""
    from mnemoscope.watch.curve import PICTURE, Curve, table_of

    path, seen = table_of(source), -1
    from mnemoscope.report.emergence import draw_curve

    while True:
        curve = Curve.open(path)
        if len(curve.rows) != seen:
            seen = len(curve.rows)
            picture = draw_curve(curve.table, out or path.with_name(PICTURE))
            say(as_json, f"{_in_words(curve.rows[-1])}: {picture}", rows=curve.rows, picture=picture)
        if every is None:
            return
        time.sleep(every)


@app.command()
@given.taking("layout", "force")
def emergence(
    how: given.How,
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="Folders, a trainer's output folder, or hub ids (ID@REVISION)."),
    ],
    task: given.Task,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the table and the picture.", callback=given.of_out)
    ],
    option: given.TaskOptions = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each kind, at most.")] = 200,
    rephrasings: Annotated[int, typer.Option(min=0, help="Of each conflict, to find pairs; 0: no pairs.")] = 1,
    split: Annotated[Literal["fit", "tune", "test"], typer.Option(help="Of the task, what is asked.")] = "tune",
    contrast: Annotated[Site | None, typer.Option(help="Where the behaviours are compared by layer.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id with it, where checkpoints have none.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which questions are drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per pass, at most.")] = 64,
) -> None:
    """Ask the checkpoints of a training, one after another, and draw how both behaviours emerged."""
    from mnemoscope.runs.processes import quiet_library
    from mnemoscope.tasks import named_task

    named_task(task, options(option))
    prompting = formatted(how)
    from mnemoscope.watch.checkpoints import measure_checkpoints
    from mnemoscope.watch.curve import PICTURE

    quiet_library()
    asked: dict[str, Any] = {"examples": examples, "rephrasings": rephrasings, "split": split, "contrast": contrast}
    asked |= {"seed": seed, "batch_size": batch_size, "prompting": prompting}
    opening, rows = {"dtype": how.dtype, "device_map": how.device_map, "tokenizer": tokenizer}, []
    for row in measure_checkpoints(checkpoints, task, options(option), out, opening, **asked):
        rows.append(row)
        if not how.as_json:
            typer.echo(_in_words(row))
    say(how.as_json, out / PICTURE, rows=rows, picture=out / PICTURE)


def _in_words(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {row[key]:.2f}" for name, key in SHOWN.items() if key in row)
    return f"step {row['step']:,.0f}: {shares}"
