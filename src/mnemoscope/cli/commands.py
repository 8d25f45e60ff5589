"""The commands that measure and fit: arguments in, calls, output."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mnemoscope.cli.shared import (
    AllowCode,
    AsChat,
    AsJson,
    DeviceMap,
    Dtype,
    Given,
    MaybeModel,
    Model,
    Parts,
    Reply,
    app,
    named_parts,
    open_model,
    options,
    progress,
    say,
    weights_note,
)

AT_A_TIME = 4  # processes of a report, which each hold the largest table of a cell


NOT_EXPORTED = "note: vectors of this fit cannot be exported; --positions all fits some that can"


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="quickstart, paper, smollm2, or a YAML file.")] = "quickstart",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; default runs/STUDY.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; default: the study's.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="As cells.inference.model.layers=6.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: as processors allow.")] = None,
    executor: Annotated[str, typer.Option(help="local, or ray: every cell is a task of a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default: this machine alone.")] = None,
    allow_code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on with one, and build its report."""
    from mnemoscope.config import load_study
    from mnemoscope.study.run import run_study
    from mnemoscope.tasks import allow_code as allow

    allow(*allow_code or ())
    config = load_study(study, overrides, seeds)
    folder = out or Path("runs") / config.study
    with progress(as_json) as tell:
        report_path = run_study(config, folder, tell, workers, executor, address)
    facts = {"run": str(folder), "results": str(folder / "results.json"), "report": str(report_path)}
    say(facts, as_json, "report")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    beside: Annotated[list[Path] | None, typer.Option(help="Another arena's run, shown on the same page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild the results and the page of a run, a study's or an arena's, from its records."""
    from mnemoscope.report import build_arena, build_report
    from mnemoscope.runs.errors import InputError
    from mnemoscope.runs.processes import in_processes

    if (run / "arena" / "frame.json").is_file() and not (run / "study.yaml").is_file():
        page, found = build_arena(run, beside or ()), run / "arena" / "results.json"
        say({"run": str(run), "results": str(found), "report": str(page)}, as_json, "report")
        return
    if not (run / "study.yaml").is_file():
        raise InputError(f"RUN: {run} is not a run folder (it has no study.yaml)")
    with in_processes(min(AT_A_TIME, os.cpu_count() or 1)) as parallel:
        path = build_report(run, parallel)
    facts = {"run": str(run), "results": str(run / "results.json"), "report": str(path)}
    say(facts, as_json, "report")


@app.command()
def fit(
    model: Model,
    task: Annotated[str, typer.Option(help="A task, see `mnemoscope tasks`, or a JSONL file of your own.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder: pairs, vectors, detector, report.")],
    option: Given = None,
    settings: Annotated[int, typer.Option(help="Settings tried in either direction, at most; 8 or more.")] = 48,
    positions: Annotated[str, typer.Option(help="decision, or all: every token, for export.")] = "decision",
    aim: Annotated[str, typer.Option(help="What vectors are for: conflict, as users meet it, or pairs.")] = "conflict",
    lost: Annotated[float, typer.Option(min=0, max=1, help="Share of other answers that a vector may cost.")] = 0.08,
    neither: Annotated[float, typer.Option(min=0, max=1, help="Share it may leave answered neither way.")] = 0.12,
    threads: Annotated[int | None, typer.Option(min=1, help="Processors to use; default: all there are.")] = None,
    budget: Annotated[float | None, typer.Option(help="Minutes that it may take; what is left out is told.")] = None,
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Find pairs, fit vectors and a detector for a model of yours on your data, and judge them; one run folder."""
    from mnemoscope.behaviour import Prompting
    from mnemoscope.face.fitted import fit as fit_model
    from mnemoscope.face.fitting import SHARES
    from mnemoscope.runs.files import dumped
    from mnemoscope.runs.processes import quiet_library

    asked: dict[str, Any] = {"prompting": Prompting(chat, reply=reply), "options": options(option)}
    asked |= {"settings": settings, "positions": positions, "aim": aim, "budget": budget}
    asked |= {"lost": lost, "neither": neither}
    asked |= {"dtype": dtype, "device_map": device_map, "layout": named_parts(layout)}
    note = [] if as_json or positions == "all" else [NOT_EXPORTED]
    quiet_library()
    # Processes of one thread each do not wait for one another, and round as one alone would.
    asked |= {"workers": threads or os.cpu_count() or 1, "threads": 1}
    with progress(as_json, note, SHARES) as tell:
        fitted = fit_model(model, task=task, out=out, progress=tell, **asked)
    summary, report_path = fitted.summary(), str(out / "report.html")
    if as_json:
        typer.echo(dumped({"run": str(out), "report": report_path, "tasks": summary.brief()}))
    else:
        typer.echo(f"{summary}\n{report_path}")


@app.command()
def check(
    model: Model,
    task: Annotated[str, typer.Option(help="A task, see `mnemoscope tasks`, or a JSONL file of your own.")],
    option: Given = None,
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """See what a model does with your data before a fit: answers, pairs, what is known, time, what to add."""
    from mnemoscope.behaviour import Asking, Prompting
    from mnemoscope.face.check import check_task
    from mnemoscope.runs.files import dumped
    from mnemoscope.tasks import named_task

    made = named_task(task, options(option))
    opened, tokenizer = open_model(model, dtype, layout, device_map)
    found = check_task(Asking(opened, tokenizer, made.boundary, 32, Prompting(chat, reply=reply).of(made)), made)
    typer.echo(dumped(asdict(found)) if as_json else str(found))


@app.command()
def arena(
    model: Model,
    task: Annotated[str, typer.Option(help="A task, see `mnemoscope tasks`, or a JSONL file of your own.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder; an interrupted arena continues there.")],
    method: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated. Default: all.")] = None,
    option: Given = None,
    size: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: how many prompts or steps, as conflicts=80.")
    ] = None,
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Compare every way to make a model follow its text, or its memory, on one frozen set of conflicts."""
    from mnemoscope.behaviour import Prompting
    from mnemoscope.bench.run import arena as run_arena

    asked: dict[str, Any] = {"methods": method, "options": options(option), "sizes": options(size)}
    opened, tokenizer = open_model(model, dtype, layout, device_map)
    asked |= {"prompting": Prompting(chat, reply=reply), "name": model}
    with progress(quiet=as_json) as tell:
        page = run_arena(opened, tokenizer, task, out, progress=tell, **asked)
    results = str(out / "arena" / "results.json")
    say({"run": str(out), "results": results, "page": str(page)}, as_json, "page")


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks."""
    from mnemoscope.tasks import describe_tasks

    described = describe_tasks()
    width = max(map(len, described))
    lines = (f"{name:<{width}}  {line}" for name, line in described.items())
    typer.echo(json.dumps(described) if as_json else "\n".join(lines))


@app.command()
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

    from mnemoscope.runs.files import write_atomically
    from mnemoscope.tasks import KINDS, allow_code, build_task
    from mnemoscope.tasks.jsonl import write_jsonl

    allow_code(task)  # it is the user who names it
    made = build_task(task, options(option), seed)
    rng = np.random.default_rng([seed, 4])
    lines = []
    for kind in KINDS:
        for example in made.examples(rng, n, kind):
            lines += [example, made.rephrase(example, rng)] if kind == "conflict" else [example]
    write_atomically(out, write_jsonl(lines).encode())
    say({"file": str(out), "examples": len(lines)}, as_json, "file")


@app.command()
def doctor(
    model: MaybeModel = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to check with; at least two.")] = None,
    server: Annotated[str | None, typer.Option(help="http://HOST:PORT of a vLLM server with our plugin.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="With --server: the run that it has.")] = None,
    named: Annotated[str | None, typer.Option("--model", help="With --server: its model; default: the run's.")] = None,
    long: Annotated[
        int | None,
        typer.Option(min=1, help="With --server: tokens of long prompts, which it reads in several passes."),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="With --server: say in the run's cards what passed.")
    ] = False,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Prove on a model of yours that batched = single, cached = uncached, alpha 0 = untouched; exit code 1 if not.

    With --server, that a server steers and reads as transformers does here, whatever it answers beside; it may be in
    use. Give the precision that it runs in (--dtype).
    """
    from mnemoscope.runs.errors import InputError

    if server is not None:
        from mnemoscope.cli.proving import prove_server

        if not prove_server(
            server, source, named or model, prompt, long, certify, [dtype, layout, device_map], as_json
        ):
            raise typer.Exit(1)
        return
    of_server = {"--from": source, "--model": named, "--long": long, "--certify": certify}
    alone = next((name for name, given in of_server.items() if given), None)
    if alone:
        raise InputError(f"{alone}: is for a server; name it too: --server URL")
    if model is None:
        raise InputError("MODEL: missing; name a model, or a server: --server URL")
    if not _is_well(model, prompt, open_model(model, dtype, layout, device_map), as_json):
        raise typer.Exit(1)


def _is_well(model: str, prompts: list[str] | None, opened: tuple[Any, Any], as_json: bool) -> bool:
    """Print the checks of a model; whether all have passed."""
    from mnemoscope.doctor import PROMPTS, examine
    from mnemoscope.runs.files import dumped

    checks = list(examine(*opened, prompts or PROMPTS))
    well = all(check.passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"passed": check.passed} for check in checks]
        typer.echo(dumped({"model": model, "weights": weights_note(model), "passed": well, "checks": rows}))
        return well
    width = max(len(check.name) for check in checks)
    for check in checks:
        bound = f"at least {check.least:.2g}" if check.least else f"allowed {check.allowed:.2g}"
        flips = f", {check.flips} top tokens flip" if check.flips else ""
        found = f"largest difference {check.difference:.2g} ({bound}{flips})"
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {found}")
    return well
