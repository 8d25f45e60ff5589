"""The command line: arguments in, calls, output. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="mnemoscope",
    help="Is a language model remembering or thinking? Find out, see which neurons tell, and turn it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsChat = Annotated[bool, typer.Option("--chat", help="Put prompts by the chat template of the tokenizer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="A built-in study or the path of a YAML file.")] = "quickstart",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/STUDY.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; default: the study's.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b=c: replace a field of the study.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at a time; default: as processors allow.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a study, or go on with one, and build its report."""
    with _one_line_errors():
        from mnemoscope.config import load_study
        from mnemoscope.study import run_study

        config = load_study(study, overrides, seeds)
        folder = out or Path("runs") / config.study
        with _progress(quiet=as_json) as progress:
            report_path = run_study(config, folder, progress, workers)
        _say(
            {"run": str(folder), "results": str(folder / "results.json"), "report": str(report_path)}, as_json, "report"
        )


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Rebuild results.json and report.html from the records of a run."""
    with _one_line_errors():
        from mnemoscope.errors import InputError
        from mnemoscope.report import build_report

        if not (run_folder / "study.yaml").is_file():
            raise InputError(f"RUN: {run_folder} is not a run folder (it has no study.yaml)")
        path = build_report(run_folder)
        _say(
            {"run": str(run_folder), "results": str(run_folder / "results.json"), "report": str(path)},
            as_json,
            "report",
        )


@app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a causal model, or smollm2.")],
    task: Annotated[str, typer.Option(help="A task, see `mnemoscope tasks`, or a JSONL file of your own.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder: pairs, vectors, detector, report.")],
    option: Annotated[list[str] | None, typer.Option(help="name=value: an option of the task.")] = None,
    settings: Annotated[int, typer.Option(min=1, help="Settings tried in either direction, at most.")] = 42,
    threads: Annotated[int, typer.Option(min=1, help="Threads; results depend on them in the last bits.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    layout: Annotated[str | None, typer.Option(help="blocks=..,attention=..,mlp=..,down=..: parts of a model.")] = None,
    chat: AsChat = False,
    as_json: AsJson = False,
) -> None:
    """Find pairs, fit vectors and a detector for a model of yours on your data, and judge them; one run folder."""
    with _one_line_errors():
        from mnemoscope.fitting import fitting_study
        from mnemoscope.report import brief_of, in_words
        from mnemoscope.study import run_study

        shape = {"folder": model, "dtype": dtype, "layout": _named_parts(layout), "chat": {} if chat else None}
        config = fitting_study(shape, task, _options(option), settings, threads)
        with _progress(quiet=as_json) as progress:
            report_path = run_study(config, out, progress)
        if as_json:
            typer.echo(json.dumps({"run": str(out), "report": str(report_path), "tasks": brief_of(out)}))
        else:
            for line in [*in_words(out), str(report_path)]:
                typer.echo(line)


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks."""
    from mnemoscope.tasks import describe_tasks

    described = describe_tasks()
    if as_json:
        typer.echo(json.dumps(described))
    else:
        width = max(map(len, described))
        for name, line in described.items():
            typer.echo(f"{name:<{width}}  {line}")


@app.command()
def data(
    task: Annotated[str, typer.Argument(help="A task, see `mnemoscope tasks`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSONL file to write.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Examples of each kind.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    option: Annotated[list[str] | None, typer.Option(help="name=value: an option of the task.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write examples of a task as JSONL; each conflict is followed by a rephrasing of it."""
    with _one_line_errors():
        import numpy as np

        from mnemoscope.files import write_atomically
        from mnemoscope.tasks import KINDS, build_task
        from mnemoscope.tasks.jsonl import write_jsonl

        made = build_task(task, _options(option), seed)
        rng = np.random.default_rng([seed, 4])
        lines = []
        for kind in KINDS:
            for example in made.examples(rng, n, kind):
                lines += [example, made.rephrase(example, rng)] if kind == "conflict" else [example]
        write_atomically(out, write_jsonl(lines).encode())
        _say({"file": str(out), "examples": len(lines)}, as_json, "file")


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a causal model, or smollm2.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to check with; at least two.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    layout: Annotated[str | None, typer.Option(help="blocks=..,attention=..,mlp=..,down=..: parts of a model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove on a model of yours that batched = single, cached = uncached, alpha 0 = untouched; exit code 1 if not."""
    with _one_line_errors():
        from mnemoscope.doctor import PROMPTS, examine

        opened, tokenizer = _open(model, dtype, layout)
        checks = list(examine(opened, tokenizer, prompt or PROMPTS))
        well = all(check.passed for check in checks)
        if as_json:
            rows = [{k: v for k, v in asdict(c).items() if v != float("inf")} | {"passed": c.passed} for c in checks]
            typer.echo(json.dumps({"model": model, "passed": well, "checks": rows}))
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model, or smollm2.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What is put to the model.")],
    source: Annotated[Path, typer.Option("--from", help="A run, a cell of one, or the file of a vector.")],
    toward: Annotated[str, typer.Option(help="generalized or memorized.")],
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector; 0 leaves the model as it is.")] = 1.0,
    gate: Annotated[
        float | None, typer.Option(help="Steer only where the other behaviour is at least so probable, 0 to 1.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind each prompt, at most.")] = 20,
    chat: AsChat = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    force: Annotated[bool, typer.Option(help="Use a vector that was made on another model of the same shape.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model answers by itself, and what it answers under a vector."""
    with _one_line_errors():
        from mnemoscope.behaviour import Asking, Chat
        from mnemoscope.errors import InputError
        from mnemoscope.steering import OPPOSITE, complete, find_vector

        if toward not in OPPOSITE:
            raise InputError(f"toward: {toward!r} is not one of {', '.join(OPPOSITE)}")
        opened, tokenizer = _open_with(source, model, dtype)
        vector = find_vector(source, toward, opened, tokenizer, force)
        _check_put("vector", vector.chat, chat)
        asking = Asking(opened, tokenizer, chat=Chat() if chat else None)
        inputs = asking.padded([asking.text(prompt) for prompt in prompts])
        plain = complete(opened, tokenizer, inputs, max_new_tokens)
        opens = None
        if gate is not None:
            from mnemoscope.detect import Gate, find_detector

            opens = Gate(find_detector(source, opened, tokenizer, force), vector.toward, gate)
        with vector.apply(opened, alpha=alpha, gate=opens):
            steered = complete(opened, tokenizer, inputs, max_new_tokens)
        rows = [
            {"prompt": prompt, "plain": before, "steered": after}
            for prompt, before, after in zip(prompts, plain, steered, strict=True)
        ]
        if as_json:
            facts = {"method": vector.method, "site": vector.site, "layers": vector.layers, "alpha": alpha}
            acted = {"asked": opens.asked, "acted": opens.acted} if opens else None
            typer.echo(json.dumps({"model": model, "toward": toward, "vector": facts, "gate": acted, "answers": rows}))
        else:
            for row in rows:
                typer.echo(
                    f"{row['prompt']}\n  by itself: {row['plain'].strip()}\n  {toward}: {row['steered'].strip()}"
                )
            if opens:
                typer.echo(f"the gate acted on {opens.acted} of {opens.asked} prompts")


@app.command()
def detect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model, or smollm2.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What would be put to the model.")],
    source: Annotated[Path, typer.Option("--from", help="A run, a cell of one, or the file of a detector.")],
    chat: AsChat = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    force: Annotated[bool, typer.Option(help="Use a detector that was fitted on another model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell, before it answers, how probably a model will go by what it remembers, and where that becomes readable."""
    with _one_line_errors():
        from mnemoscope.behaviour import Asking, Chat
        from mnemoscope.detect import find_detector, read_prompts

        opened, tokenizer = _open_with(source, model, dtype)
        detector = find_detector(source, opened, tokenizer, force)
        _check_put("detector", detector.chat, chat)
        asking = Asking(opened, tokenizer, batch_size=32, chat=Chat() if chat else None)
        reading = read_prompts(detector, asking, prompts)
        conflicts = [None if c != c else float(c) for c in reading.p_conflict_N]
        rows = [
            {
                "prompt": prompt,
                "p_memorized": float(reading.p_memorized_N[n]),
                "p_conflict": conflicts[n],
                "unlike": bool(reading.unlike_N[n]),
                "distance": float(reading.distance_N[n]),
                "readable_from": reading.readable_from_N[n],
                "p_memorized_by_layer": reading.p_memorized_NL[n].tolist(),
            }
            for n, prompt in enumerate(prompts)
        ]
        if as_json:
            typer.echo(json.dumps({"model": model, "layer": detector.layer, "site": detector.site, "prompts": rows}))
        else:
            for row in rows:
                typer.echo(f"{row['prompt']}\n  {_verdict(row, detector.layer)}")


def _check_put(what: str, fitted: bool, now: bool) -> None:
    from mnemoscope.errors import InputError

    if fitted != now:
        how, do = ("by a chat template", "give") if fitted else ("as they are", "leave out")
        raise InputError(f"chat: the {what} was made of prompts that were put {how}; {do} --chat")


def _verdict(row: dict[str, Any], layer: int) -> str:
    text = f"P(memorized) {row['p_memorized']:.2f} at layer {layer}"
    if row["readable_from"] is not None:
        text += f", sure from layer {row['readable_from']} on"
    if row["p_conflict"] is not None:
        text += f"; P(memory and rule disagree) {row['p_conflict']:.2f}"
    if row["unlike"]:
        text += (
            f"; unlike the prompts it was fitted on (distance {row['distance']:.1f}, up to 1 is like them): ignore this"
        )
    return text


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of a vector (.safetensors).")],
    to: Annotated[str, typer.Option(help="gguf: for llama.cpp; checkpoint: a model with it baked in.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="What to write: a new file, or a new or empty folder.")],
    model: Annotated[str | None, typer.Option(help="The model it was made on; needed for a checkpoint.")] = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto; what is written has it.")] = "float32",
    force: Annotated[bool, typer.Option(help="Use a vector that was made on another model of the same shape.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a vector for other programs; one with positions "all" only. Nothing that exists is overwritten."""
    with _one_line_errors():
        from mnemoscope.errors import InputError
        from mnemoscope.export import bake, check_portable, to_gguf
        from mnemoscope.steering import SteeringVector

        vector = alpha * SteeringVector.load(file)
        check_portable(vector, to)  # before a large model is opened for nothing
        if out.exists() and (to == "gguf" or not out.is_dir() or any(out.iterdir())):
            raise InputError(f"out: {out} exists; nothing is overwritten")
        if to == "checkpoint" and model is None:
            raise InputError("model: a checkpoint is made of a model; name the one that the vector was made on")
        opened, tokenizer = _open(model, dtype, None) if model is not None else (None, None)
        vector = alpha * SteeringVector.load(file, opened, tokenizer, force)
        if to == "checkpoint":
            bake(opened, tokenizer, vector, out)
        else:
            to_gguf(vector, out, _model_type(vector, opened))
        facts = {"out": str(out), "to": to, "toward": vector.toward, "layers": vector.layers, "alpha": alpha}
        _say(facts, as_json, "out")


def _model_type(vector: Any, opened: Any) -> str:
    """What kind of model a vector is for."""
    from mnemoscope.errors import InputError
    from mnemoscope.models import core_of

    if opened is not None:
        return str(core_of(opened).config.model_type)
    if vector.binding is None:
        raise InputError("model: the vector does not say which model it was made on; name it")
    return str(vector.binding.model_type)


def _open_with(source: Path, model: str, dtype: str) -> tuple[Any, Any]:
    """A user's model, for what was made of it; a path that is not there is told before a large model is opened."""
    from mnemoscope.errors import InputError

    if not source.exists():
        raise InputError(f"from: {source} does not exist")
    return _open(model, dtype, None)


def _open(model: str, dtype: str, layout: str | None) -> tuple[Any, Any]:
    """A user's model and tokenizer, from what the command line says of them."""
    from mnemoscope.config import parse_model
    from mnemoscope.models import Layout, load_model
    from mnemoscope.study import quiet_library

    quiet_library()
    shape = parse_model({"folder": model, "dtype": dtype, "layout": _named_parts(layout)})
    where = Layout(**shape.layout.model_dump()) if shape.layout else None
    return load_model(model, dtype=shape.dtype, layout=where)


def _named_parts(layout: str | None) -> dict[str, str] | None:
    return dict(part.partition("=")[::2] for part in layout.split(",")) if layout else None


def _options(given: list[str] | None) -> dict[str, Any]:
    """Options of a task, from ``name=value`` each; values are YAML."""
    import yaml

    from mnemoscope.errors import InputError

    pairs = [o.partition("=") for o in given or []]
    if any(not equals for _, equals, _ in pairs):
        raise InputError(f"--option: {given!r} is not of the form name=value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def main() -> None:
    """Entry point of the ``mnemoscope`` command."""
    app()


def _say(facts: dict[str, Any], as_json: bool, field: str) -> None:
    typer.echo(json.dumps(facts) if as_json else facts[field])


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn errors that a user can mend into one line on stderr: exit 2 for input, 1 for a run that cannot go on."""
    from mnemoscope.errors import InputError, StudyError

    try:
        yield
    except InputError as error:
        _fail(str(error), 2)
    except StudyError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to go on", 130)
    except Exception as error:
        # Libraries wrap the system's error in their own; its text is what they have in common.
        if os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error):
            _fail("disk: no space is left; finished stages are kept, run the same command again after making room", 2)
        if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError, FileNotFoundError)):
            _fail(f"path: {error.filename}: {error.strerror}", 2)
        raise


def _fail(message: str, code: int) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(code)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, str, float, float, str], None]]:
    """A progress bar per cell on a terminal, a line per stage elsewhere, nothing when quiet."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _Lines()


class _Lines:
    """One line on stderr for each tenth of a stage."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], int] = {}

    def __call__(self, cell: str, stage: str, done: float, total: float, note: str) -> None:
        tenth = int(10 * done / max(total, 1))
        if self.seen.get((cell, stage)) != tenth:  # a further attempt starts again at 0
            self.seen[cell, stage] = tenth
            typer.echo(f"{cell}  {stage:<10} {min(10 * tenth, 100):3d} %  {note}", err=True)


@contextmanager
def _bars() -> Iterator[Callable[[str, str, float, float, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def show(cell: str, stage: str, done: float, total: float, note: str) -> None:
            if cell not in bars:
                bars[cell] = progress.add_task(cell, total=1.0, note="")
            progress.update(bars[cell], description=f"{cell} {stage}", completed=done / max(total, 1e-9), note=note)

        yield show
