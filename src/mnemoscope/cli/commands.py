"""The commands: arguments in, calls, output."""

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
    Force,
    Given,
    Model,
    Parts,
    Reply,
    app,
    named_parts,
    options,
    progress,
    say,
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
    from mnemoscope.config import load_study, opened_before
    from mnemoscope.study import run_study
    from mnemoscope.tasks import allow_code as allow

    allow(*allow_code or ())
    config = load_study(study, overrides, seeds)
    folder, notes = out or Path("runs") / config.study, [f"warning: {line}" for line in opened_before(config)]
    with progress(as_json, notes) as tell:
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
    from mnemoscope.errors import InputError
    from mnemoscope.executors import in_processes
    from mnemoscope.report import build_arena, build_report

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
    settings: Annotated[int, typer.Option(min=1, help="Settings tried in either direction, at most.")] = 72,
    positions: Annotated[str, typer.Option(help="decision, or all: every token, for export.")] = "decision",
    aim: Annotated[str, typer.Option(help="What vectors are for: conflict, as users meet it, or pairs.")] = "conflict",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: as many as there are cores.")] = None,
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
    from mnemoscope.face import fit as fit_model
    from mnemoscope.files import dumped
    from mnemoscope.fitting import SHARES
    from mnemoscope.processes import quiet_library

    asked: dict[str, Any] = {"prompting": Prompting(chat, reply=reply), "options": options(option)}
    asked |= {"settings": settings, "positions": positions, "aim": aim, "threads": threads, "budget": budget}
    asked |= {"dtype": dtype, "device_map": device_map, "layout": named_parts(layout)}
    note = [] if as_json or positions == "all" else [NOT_EXPORTED]
    quiet_library()
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
    from mnemoscope.check import check_task
    from mnemoscope.files import dumped
    from mnemoscope.tasks import allow_code, build_task

    allow_code(task)  # it is the user who names it
    is_file = task.endswith(".jsonl")
    made = build_task("jsonl" if is_file else task, options(option) | ({"file": task} if is_file else {}), 0)
    opened, tokenizer = _open(model, dtype, layout, device_map)
    split = made.split_reply if chat and made.begins_reply else None
    found = check_task(Asking(opened, tokenizer, made.boundary, 32, Prompting(chat, reply=reply, split=split)), made)
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
    from mnemoscope.arena.run import arena as run_arena
    from mnemoscope.behaviour import Prompting

    asked: dict[str, Any] = {"methods": method, "options": options(option), "sizes": options(size)}
    opened, tokenizer = _open(model, dtype, layout, device_map)
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

    from mnemoscope.files import write_atomically
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
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to check with; at least two.")] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Prove on a model of yours that batched = single, cached = uncached, alpha 0 = untouched; exit code 1 if not."""
    from mnemoscope.doctor import PROMPTS, examine
    from mnemoscope.files import dumped

    opened, tokenizer = _open(model, dtype, layout, device_map)
    checks = list(examine(opened, tokenizer, prompt or PROMPTS))
    well = all(check.passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"passed": check.passed} for check in checks]
        typer.echo(dumped({"model": model, "weights": _weights(model), "passed": well, "checks": rows}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            bound = f"at least {check.least:.2g}" if check.least else f"allowed {check.allowed:.2g}"
            flips = f", {check.flips} top tokens flip" if check.flips else ""
            found = f"largest difference {check.difference:.2g} ({bound}{flips})"
            typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {found}")
    if not well:
        raise typer.Exit(1)


@app.command()
def steer(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts to answer.")],
    source: Annotated[Path, typer.Option("--from", help="A run, a cell of one, or the file of a vector.")],
    toward: Annotated[str, typer.Option(help="generalized or memorized; of documents: context or memory.")],
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector; 0 leaves the model as it is.")] = 1.0,
    gate: Annotated[
        float | None,
        typer.Option(
            help="Steer only where the other behaviour is at least so probable (0 to 1), memory and prompt seem to "
            "disagree, and the prompt is like those that the detector was fitted on."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind each prompt, at most.")] = 20,
    go_on: Annotated[bool, typer.Option("--go-on", help="Show what follows an answer too.")] = False,
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Generate with and without a steering vector."""
    from mnemoscope.behaviour import Prompting
    from mnemoscope.files import dumped

    fitted = _fitted(source, force, Prompting(chat, reply=reply), model, dtype, layout, device_map)
    vector = fitted.vector(toward)
    if vector.begin_alike:
        alike = f"note: {vector.begin_alike:.0%} of the prompts of the vector's fit have two answers that begin alike"
        typer.echo(f"{alike}; it was judged behind that beginning, so put it at the end of such a prompt", err=True)
    rows = fitted.answers(prompts, toward, alpha, gate, max_new_tokens, go_on)
    acted = None if gate is None else {"asked": len(rows), "acted": sum(row["acted"] for row in rows)}
    if as_json:
        facts = {"method": vector.method, "site": vector.site, "layers": vector.layers, "alpha": alpha}
        about = {"model": model, "weights": _weights(model), "toward": toward, "vector": facts, "gate": acted}
        typer.echo(dumped(about | {"answers": rows}))
        return
    for row in rows:
        named = toward if row["acted"] else f"{toward} (the gate did not act)"
        typer.echo("\n".join(f"> {line}" for line in row["prompt"].split("\n")))
        width = max(map(len, ("unsteered", named)))
        for name, text in (("unsteered", row["plain"]), (named, row["steered"])):
            typer.echo(f"  {name + ':':<{width + 1}} {text.strip()}")
    if acted:
        places = [str(number) for number, row in enumerate(rows, 1) if row["acted"]]
        which = f": {', '.join(places)}" if places and len(rows) > 1 else ""
        typer.echo(f"the gate acted on {acted['acted']} of {acted['asked']} prompts{which}")


@app.command()
def detect(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts to read.")],
    source: Annotated[Path, typer.Option("--from", help="A run, a cell of one, or the file of a detector.")],
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Estimate, before it answers, how probably a model will follow its memory, and where that becomes readable."""
    import numpy as np

    from mnemoscope.behaviour import Prompting
    from mnemoscope.files import dumped

    fitted = _fitted(source, force, Prompting(chat, reply=reply), model, dtype, layout, device_map)
    reading = fitted.detect(prompts)
    names = ("p_memorized", "p_conflict", "unlike", "distance", "readable_from", "p_memorized_by_layer")
    columns = [prompts, *(np.asarray(getattr(reading, name)).tolist() for name in names)]
    rows = [dict(zip(("prompt", *names), row, strict=True)) for row in zip(*columns, strict=True)]
    if fitted.detector.as_good_as_the_input:  # then a layer that is sure may only have read the wording
        rows = [row | {"readable_from": None} for row in rows]
    if as_json:
        about = {"model": model, "weights": _weights(model), "layer": reading.layer, "site": fitted.detector.site}
        typer.echo(dumped(about | {"prompts": rows}))
    else:
        for row in rows:
            typer.echo(f"{row['prompt']}\n  {_verdict(row, reading.layer)}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE|RUN", help="A vector (.safetensors), or a run or cell of one.")],
    to: Annotated[str, typer.Option(help="gguf: for llama.cpp; checkpoint: a model with it baked in.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="What to write: a new file, or a new or empty folder.")],
    toward: Annotated[str | None, typer.Option(help="Of a run: generalized or memorized, context or memory.")] = None,
    model: Annotated[str | None, typer.Option(help="The model it was made on; needed for a checkpoint.")] = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto; what is written has it.")] = "float32",
    layout: Parts = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a vector for other programs; one with positions "all" only. Nothing that exists is overwritten."""
    from mnemoscope.errors import InputError
    from mnemoscope.export import bake, check_portable, to_gguf
    from mnemoscope.face import vector_file
    from mnemoscope.models import core_of
    from mnemoscope.steering import SteeringVector

    file = vector_file(file, toward) if file.is_dir() else file
    vector = alpha * SteeringVector.load(file)
    check_portable(vector, to)  # before a large model is opened for nothing
    if out.exists() and (to == "gguf" or not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} exists; nothing is overwritten")
    if to == "checkpoint" and model is None:
        raise InputError("model: a checkpoint is made of a model; name the one that the vector was made on")
    if to == "gguf" and model is None and vector.binding is None:
        raise InputError("model: the vector does not say which model it was made on; name it")
    opened, tokenizer = _open(model, dtype, layout) if model is not None else (None, None)
    vector = alpha * SteeringVector.load(file, opened, tokenizer, force)
    if to == "checkpoint":
        bake(opened, tokenizer, vector, out)
    else:
        bound = vector.binding.model_type if vector.binding else ""
        to_gguf(vector, out, core_of(opened).config.model_type if opened is not None else bound)
    facts = {"out": str(out), "to": to, "toward": vector.toward, "layers": vector.layers, "alpha": alpha}
    say(facts, as_json, "out")


@app.command()
def serve(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder; default: those in runs/.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    siblings: Annotated[bool, typer.Option("--siblings", help="Show the runs beside RUN too.")] = False,
    model: Annotated[str | None, typer.Option(help="Of a run that did not train one: its folder or hub id.")] = None,
    allow_code: AllowCode = None,
) -> None:
    """Open the playground: ask a model in the browser, and steer its answers.

    It listens on this machine only and prints an address with a token, new at every start. From another machine,
    forward the port (ssh -L 8000:127.0.0.1:8000 USER@MACHINE) and open the same address there.
    """
    from mnemoscope.errors import InputError
    from mnemoscope.tasks import allow_code as allow

    # The pages say that nothing leaves this machine, so nothing is downloaded.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from mnemoscope.web.app import serve
    except ImportError as error:
        raise InputError("serve: needs FastAPI and uvicorn: pip install 'mnemoscope[web]'") from error
    allow(*allow_code or ())
    serve(run, port, lambda address: typer.echo(address, err=True), siblings, model)


def _verdict(row: dict[str, Any], layer: int) -> str:
    text = f"P(memorized) {row['p_memorized']:.2f} at layer {layer}"
    if row["readable_from"] is not None:
        text += f", sure from layer {row['readable_from']} on"
    if row["p_conflict"] == row["p_conflict"]:
        text += f"; P(memory and rule disagree) {row['p_conflict']:.2f}"
    if row["unlike"]:
        far = f"distance {row['distance']:.1f}, up to 1 is like them"
        text += f"; unlike the prompts it was fitted on ({far}): ignore this"
    return text


def _weights(model: str) -> str | None:
    """Note on a packaged model's weights, shown beside every number."""
    from mnemoscope.models import PACKAGED, QUANTIZED

    return QUANTIZED if model in PACKAGED else None


def _fitted(source: Path, force: bool, prompting: Any, model: str, *opening: Any) -> Any:
    """Open vectors and detector with their model; a missing path is refused before a large model is opened."""
    from mnemoscope.errors import InputError
    from mnemoscope.face import Fitted

    if not source.exists():
        raise InputError(f"from: {source} does not exist")
    return Fitted.open(source, *_open(model, *opening), prompting=prompting, force=force)


def _open(model: str, dtype: str, layout: str | None, device_map: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, by the options of the command line."""
    from mnemoscope.config import parse_model
    from mnemoscope.models import load_model
    from mnemoscope.processes import quiet_library

    quiet_library()
    shape = parse_model({"folder": model, "dtype": dtype, "device_map": device_map, "layout": named_parts(layout)})
    if weights := _weights(model):
        typer.echo(f"{model}: weights are {weights}", err=True)
    return load_model(model, dtype=shape.dtype, device_map=shape.device_map, layout=shape.layout)
