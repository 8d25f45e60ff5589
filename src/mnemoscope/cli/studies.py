"""Commands for studies, their data and their reports."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mnemoscope.cli.options import (
    AsChat,
    AsJson,
    DeviceMap,
    Dtype,
    Given,
    Model,
    Parts,
    Reply,
    named_parts,
    options,
    prompting,
)
from mnemoscope.cli.output import app, one_line_errors, progress, say

AT_A_TIME = 4  # processes of a report, which each hold the largest table of a cell


@app.command()
@one_line_errors()
def run(
    study: Annotated[
        str, typer.Argument(help="quickstart, paper, smollm2, or the path of a YAML file.")
    ] = "quickstart",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; default runs/STUDY.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; default: the study's.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="As cells.inference.model.layers=6.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: as processors allow.")] = None,
    executor: Annotated[str, typer.Option(help="local, or ray: every cell is a task of a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default: this machine alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on with one, and build its report."""
    from mnemoscope.config import load_study
    from mnemoscope.study import run_study

    config = load_study(study, overrides, seeds)
    folder = out or Path("runs") / config.study
    with progress(quiet=as_json) as tell:
        report_path = run_study(config, folder, tell, workers, executor, address)
    facts = {"run": str(folder), "results": str(folder / "results.json"), "report": str(report_path)}
    say(facts, as_json, "report")


@app.command()
@one_line_errors()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Rebuild results.json and report.html from the records of a run."""
    from mnemoscope.errors import InputError
    from mnemoscope.executors import in_processes
    from mnemoscope.report import build_report

    if not (run_folder / "study.yaml").is_file():
        raise InputError(f"RUN: {run_folder} is not a run folder (it has no study.yaml)")
    with in_processes(min(AT_A_TIME, os.cpu_count() or 1)) as parallel:
        path = build_report(run_folder, parallel)
    facts = {"run": str(run_folder), "results": str(run_folder / "results.json"), "report": str(path)}
    say(facts, as_json, "report")


@app.command()
@one_line_errors()
def fit(
    model: Model,
    task: Annotated[str, typer.Option(help="A task, see `mnemoscope tasks`, or a JSONL file of your own.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder: pairs, vectors, detector, report.")],
    option: Given = None,
    settings: Annotated[int, typer.Option(min=1, help="Settings tried in either direction, at most.")] = 66,
    positions: Annotated[str, typer.Option(help="decision, or all: every token, for export.")] = "decision",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: as many as there are cores.")] = None,
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Find pairs, fit vectors and a detector for a model of yours on your data, and judge them; one run folder."""
    from mnemoscope.face import fit as fit_model
    from mnemoscope.files import dumped
    from mnemoscope.report import brief_of

    with progress(quiet=as_json) as tell:
        fitted = fit_model(
            model,
            task=task,
            out=out,
            prompting=prompting(chat, reply),
            options=options(option),
            settings=settings,
            positions=positions,
            threads=threads,
            progress=tell,
            dtype=dtype,
            device_map=device_map,
            layout=named_parts(layout),
        )
    summary, report_path = fitted.summary(), str(out / "report.html")
    if as_json:
        typer.echo(dumped({"run": str(out), "report": report_path, "tasks": brief_of(out)}))
    else:
        typer.echo(f"{summary}\n{report_path}")


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks."""
    from mnemoscope.tasks import describe_tasks

    described = describe_tasks()
    width = max(map(len, described))
    lines = (f"{name:<{width}}  {line}" for name, line in described.items())
    typer.echo(json.dumps(described) if as_json else "\n".join(lines))


@app.command()
@one_line_errors()
def data(
    task: Annotated[str, typer.Argument(help="A task, see `mnemoscope tasks`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSONL file to write.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Examples of each kind.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    option: Given = None,
    as_json: AsJson = False,
) -> None:
    """Write examples of a task as JSONL; each conflict is followed by a rephrasing of it."""
    import numpy as np

    from mnemoscope.files import write_atomically
    from mnemoscope.tasks import KINDS, build_task
    from mnemoscope.tasks.jsonl import write_jsonl

    made = build_task(task, options(option), seed)
    rng = np.random.default_rng([seed, 4])
    lines = []
    for kind in KINDS:
        for example in made.examples(rng, n, kind):
            lines += [example, made.rephrase(example, rng)] if kind == "conflict" else [example]
    write_atomically(out, write_jsonl(lines).encode())
    say({"file": str(out), "examples": len(lines)}, as_json, "file")
