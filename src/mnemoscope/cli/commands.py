"""The commands that measure, fit, and watch models in training."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import mnemoscope as ms
from mnemoscope.cli import given
from mnemoscope.cli.shared import app, formatted, named_parts, open_model, opening, options, say, weights_note

AT_A_TIME = 4  # processes of a report, which each hold the largest table of a cell
MOST = 1_000_000  # examples of a kind that are written: each is held in memory, about a kilobyte
_RUN, _ARENA = "Run folder; default runs/STUDY.", "Run folder; an interrupted arena continues there."
_FITTED = "Run folder: pairs, vectors, detector, report."
_SERVED = "With --server: its model; default: the run's."
Site = Literal["block", "attention", "mlp", "neuron"]
SHOWN = {"worked out": "conflict_generalized", "remembered": "conflict_memorized", "other": "conflict_other"}
SHOWN |= {"new right": "novel_accuracy", "recalled": "recall"}
NOT_EXPORTED = "note: vectors of this fit cannot be exported; --positions all fits some that can"


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="A built-in one (paper, gemma, ...), or a YAML file.")] = "quickstart",
    out: Annotated[Path | None, typer.Option("-o", "--out", help=_RUN, callback=given.of_out)] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; default: the study's.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="As cells.inference.model.layers=6.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: as processors allow.")] = None,
    executor: Annotated[Literal["local", "ray"], typer.Option(help="ray: cells are tasks of a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default: this machine alone.")] = None,
    allow_code: given.AllowCode = None,
    as_json: given.AsJson = False,
) -> None:
    """Run a study, or go on with one, and build its report."""
    from mnemoscope.runs.telling import shown

    ms.allow_code(*allow_code or ())
    config = ms.load_study(study, overrides, seeds)
    folder = out or Path("runs") / config.study
    with shown(not as_json) as tell:
        page = ms.run_study(config, folder, tell, workers, executor, address)
    say(as_json, page, run=folder, results=folder / "results.json", report=page)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a study's or an arena's.")],
    beside: Annotated[list[Path] | None, typer.Option(help="Another arena's run, shown on the same page.")] = None,
    as_json: given.AsJson = False,
) -> None:
    """Rebuild the results and the page of a run, a study's or an arena's, from its records."""
    from mnemoscope.report import build_arena
    from mnemoscope.runs.digests import check_run
    from mnemoscope.runs.processes import in_processes

    results = run / "results.json"
    if beside and not (run / "arena" / "frame.json").is_file():
        raise ms.InputError(f"beside: {run} holds no arena; only arenas stand on one page")
    if (run / "study.yaml").is_file():
        with in_processes(min(AT_A_TIME, os.cpu_count() or 1)) as parallel:
            page = ms.build_report(run, parallel)
    elif (run / "arena" / "frame.json").is_file():
        page, results = build_arena(run, beside or ()), run / "arena" / "results.json"
    else:
        check_run(run)
    say(as_json, page, run=run, results=results, report=page)


@app.command()
@given.taking("force")
def fit(
    how: given.How,
    model: given.Model,
    task: given.Task,
    out: Annotated[Path, typer.Option("-o", "--out", help=_FITTED, callback=given.of_out)],
    option: given.TaskOptions = None,
    settings: Annotated[int, typer.Option(help="Settings of shifts tried in either direction; 4 or more.")] = 20,
    positions: Annotated[Literal["decision", "all"], typer.Option(help="all: for export.")] = "decision",
    aim: Annotated[Literal["conflict", "pairs"], typer.Option(help="conflict: as users meet it.")] = "conflict",
    lost: Annotated[float, typer.Option(min=0, max=1, help="Share of other answers that a vector may cost.")] = 0.08,
    neither: Annotated[float, typer.Option(min=0, max=1, help="Share it may leave answered neither way.")] = 0.12,
) -> None:
    """Find pairs, fit vectors and a detector for a model of yours on your data, and judge them; one run folder."""
    from mnemoscope.face.recipe import Choices
    from mnemoscope.runs.processes import quiet_library
    from mnemoscope.tasks import named_task

    asked: dict[str, Any] = {"settings": settings, "positions": positions, "aim": aim, "lost": lost, "neither": neither}
    Choices(**asked)
    named_task(task, given_options := options(option))
    prompting = formatted(how)
    asked |= {"dtype": how.dtype, "device_map": how.device_map, "layout": named_parts(how.layout)}
    # Processes of one thread each do not wait for one another, and round as one alone would.
    asked |= {"workers": how.threads or os.cpu_count() or 1, "threads": 1, "progress": not how.as_json}
    quiet_library()
    summary = ms.fit(model, task=task, out=out, prompting=prompting, options=given_options, **asked).summary()
    page = out / "report.html"
    say(how.as_json, f"{summary}\n{page}", run=out, report=page, tasks=summary.brief())
    if not how.as_json and positions != "all":
        typer.echo(NOT_EXPORTED, err=True)


@app.command()
@given.taking("force")
def check(how: given.How, model: given.Model, task: given.Task, option: given.TaskOptions = None) -> None:
    """See what a model does with your data before a fit: answers, pairs, what is known, time, what to add."""
    from mnemoscope.tasks import named_task

    made = named_task(task, options(option))
    prompting = formatted(how).of(made)
    from mnemoscope.face.check import check_task

    opened, tokenizer = open_model(model, how)
    found = check_task(ms.Asking(opened, tokenizer, made.boundary, 32, prompting), made)
    say(how.as_json, found, **asdict(found))


@app.command()
@given.taking("force")
def arena(
    how: given.How,
    model: given.Model,
    task: given.Task,
    out: Annotated[Path, typer.Option("-o", "--out", help=_ARENA, callback=given.of_out)],
    method: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated. Default: all.")] = None,
    option: given.TaskOptions = None,
    size: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: prompts or steps, as conflicts=80.")] = None,
    carry: Annotated[list[Path] | None, typer.Option(help="Run of another arena, whose fits are judged here.")] = None,
) -> None:
    """Compare every way to make a model follow its text, or its memory, on one frozen set of conflicts."""
    from mnemoscope.config import parse_arena
    from mnemoscope.interventions.registry import check_method
    from mnemoscope.tasks import named_task

    asked: dict[str, Any] = {
        "methods": method,
        "options": options(option),
        "sizes": options(size, "--size"),
        "carry": carry,
    }
    parse_arena(asked["sizes"])
    ms.allow_code(*(one for one in method or () if "." in one))  # it is the user who names it
    for one in method or ():
        check_method(one)
    named_task(task, asked["options"])
    asked |= {"prompting": formatted(how), "name": model, "progress": not how.as_json}
    asked |= {"workers": how.threads or os.cpu_count() or 1, "opening": opening(model, how)}
    page = ms.arena(model, None, task, out, **asked)
    say(how.as_json, page, run=out, results=out / "arena" / "results.json", page=page)


@app.command()
def tasks(as_json: given.AsJson = False) -> None:
    """List the tasks."""
    from mnemoscope.tasks import describe_tasks

    described = describe_tasks()
    width = max(map(len, described))
    say(as_json, "\n".join(f"{name:<{width}}  {line}" for name, line in described.items()), **described)


@app.command()
def data(
    task: Annotated[str, typer.Argument(help="A task, see `mnemoscope tasks`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSONL file to write.")],
    n: Annotated[int, typer.Option("-n", min=1, max=MOST, help="Examples of each kind.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    option: given.TaskOptions = None,
    as_json: given.AsJson = False,
) -> None:
    """Write examples of a task as JSONL; each conflict is followed by a rephrasing of it."""
    import numpy as np

    from mnemoscope.runs.files import write_atomically
    from mnemoscope.tasks import KINDS
    from mnemoscope.tasks.jsonl import write_jsonl

    ms.allow_code(task)  # it is the user who names it
    made = ms.build_task(task, options(option), seed)
    rng = np.random.default_rng([seed, 4])
    lines = []
    for kind in KINDS:
        for example in made.examples(rng, n, kind):
            lines += [example, made.rephrase(example, rng)] if kind == "conflict" else [example]
    write_atomically(out, write_jsonl(lines).encode())
    say(as_json, out, file=out, examples=len(lines))


@app.command()
@given.taking("chat", "reply", "force")
def doctor(
    how: given.How,
    model: given.MaybeModel = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to check with; at least two.")] = None,
    server: Annotated[str | None, typer.Option(help="http://HOST:PORT of a vLLM server with our plugin.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="With --server: its run.", callback=given.of_source)
    ] = None,
    named: Annotated[str | None, typer.Option("--model", help=_SERVED, callback=given.of_model)] = None,
    long: Annotated[int | None, typer.Option(min=1, help="With --server: tokens of prompts of several passes.")] = None,
    certify: Annotated[bool, typer.Option("--certify", help="With --server: say in cards what passed.")] = False,
) -> None:
    """Prove on a model of yours that batched = single, cached = uncached, alpha 0 = untouched; exit code 1 if not.

    With --server, that a server steers and reads as transformers does here, whatever it answers beside; it may be in
    use. Give the precision that it runs in (--dtype).
    """
    if server is not None:
        from mnemoscope.cli.proving import prove_server

        well = prove_server(server, source, named or model, how, prompt, long, certify)
    else:
        of_server = {"--from": source, "--model": named, "--long": long, "--certify": certify}
        for name, value in of_server.items():
            if value:
                raise ms.InputError(f"{name}: is for a server; name it too: --server URL")
        if model is None:
            raise ms.InputError("MODEL: missing; name a model, or a server: --server URL")
        well = _is_well(model, prompt, how)
    if not well:
        raise typer.Exit(1)


def _is_well(model: str, prompts: list[str] | None, how: given.How) -> bool:
    """Print the checks of a model; whether all have passed."""
    from mnemoscope.face.doctor import PROMPTS, examine

    checks = list(examine(*open_model(model, how), prompts or PROMPTS))
    well, width = all(check.passed for check in checks), max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        bound = f"at least {check.least:.2g}" if check.least else f"allowed {check.allowed:.2g}"
        flips = f", {check.flips} top tokens flip" if check.flips else ""
        found = f"largest difference {check.difference:.2g} ({bound}{flips})"
        lines.append(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {found}")
    rows = [asdict(check) | {"passed": check.passed} for check in checks]
    say(how.as_json, "\n".join(lines), model=model, weights=weights_note(model), passed=well, checks=rows)
    return well


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

    seen = -1
    from mnemoscope.report.emergence import draw_curve

    while True:
        path = table_of(source)
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
