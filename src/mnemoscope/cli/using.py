"""The commands that use what was fitted: steer, detect, export, serve."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import mnemoscope as ms
from mnemoscope.cli import given
from mnemoscope.cli.shared import app, formatted, open_model, say, weights_note

GATE = "Steer only where the other behaviour is at least so probable (0 to 1), memory and prompt seem to disagree, and "
GATE += "the prompt is like those that the detector was fitted on."
TOWARD = "generalized or memorized; of documents: context or memory."
Lever = Literal["words", "decoding", "shift", "low-rank", "adapter"]
LEVER = "Default: what did best on tune; decoding takes two passes."
BARE = "The question of a prompt without its text, one for each prompt; default: from its last question mark's line on."
_FILE = "A vector (.safetensors), the folder of an adapter, a cell, or a run with one cell."
_ITS_MODEL = "The model it was made on; needed for a checkpoint or an adapter."
_RUNS = "A run folder; default: those in runs/."
_OF_RUN = "Of a run that did not train one: its folder or hub id."
READ = ("p_memorized", "p_conflict", "unlike", "distance", "readable_from", "p_memorized_by_layer")


@app.command()
@given.taking()
def steer(
    how: given.How,
    model: given.Model,
    prompts: given.Prompts,
    toward: Annotated[str, typer.Option(help=TOWARD, callback=given.of_toward)],
    source: given.MaybeSource = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector; 0 leaves the model as it is.")] = 1.0,
    gate: Annotated[float | None, typer.Option(min=0.0, max=1.0, help=GATE)] = None,
    lever: Annotated[Lever | None, typer.Option(help=LEVER)] = None,
    bare: Annotated[list[str] | None, typer.Option(help=BARE)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind each prompt, at most.")] = 20,
    go_on: Annotated[bool, typer.Option("--go-on", help="Show what follows an answer too.")] = False,
) -> None:
    """Generate unsteered, and by the best lever of a direction."""
    fitted = _fitted(source, model, how)
    fitted = fitted.use(toward, lever) if lever else fitted
    used = fitted.lever(toward)
    if alike := getattr(used, "begin_alike", 0.0):
        told = f"note: {alike:.0%} of the prompts of the vector's fit have two answers that begin alike"
        typer.echo(f"{told}; it was judged behind that beginning, so put it at the end of such a prompt", err=True)
    asked: dict[str, Any] = {"alpha": alpha, "max_new_tokens": max_new_tokens, "bare": bare, "go_on": go_on}
    rows = fitted.answers(prompts, toward, gate, **asked)
    lines, acted = list[str](), [str(number) for number, row in enumerate(rows, 1) if row["acted"]]
    for row in rows:
        named = f"{toward} ({used.lever if row['acted'] else 'the gate did not act: ' + row['held']})"
        width = 1 + max(map(len, ("unsteered", named)))
        lines += [f"> {line}" for line in row["prompt"].split("\n")]
        lines += [f"  {'unsteered:':<{width}} {row['plain'].strip()}"]
        lines += [f"  {named + ':':<{width}} {row['steered'].strip()}"]
    if gate is not None:
        which = f": {', '.join(acted)}" if acted and len(rows) > 1 else ""
        lines.append(f"the gate acted on {len(acted)} of {len(rows)} prompts{which}")
    facts: dict[str, Any] = {"model": model, "weights": weights_note(model), "toward": toward}
    facts["lever"] = {"name": used.lever, "method": used.method, "alpha": alpha, "passes": used.passes}
    facts["lever"] |= {name: getattr(used, name) for name in ("site", "layers") if hasattr(used, name)}
    facts["gate"] = None if gate is None else {"asked": len(rows), "acted": len(acted)}
    say(how.as_json, "\n".join(lines), **facts, answers=rows)


@app.command()
@given.taking()
def detect(how: given.How, model: given.Model, prompts: given.Prompts, source: given.Source) -> None:
    """Estimate, before it answers, how probably a model will follow its memory, and where that becomes readable."""
    import numpy as np

    fitted = _fitted(source, model, how)
    reading = fitted.detect(prompts)
    columns = (np.asarray(getattr(reading, name)).tolist() for name in READ)
    rows = [dict(zip(("prompt", *READ), row, strict=True)) for row in zip(prompts, *columns, strict=True)]
    if fitted.detector.as_good_as_the_input:  # then a layer that is sure may only have read the wording
        rows = [row | {"readable_from": None} for row in rows]
    facts = {"model": model, "weights": weights_note(model), "layer": reading.layer, "site": fitted.detector.site}
    say(how.as_json, reading, **facts, prompts=rows)


@app.command()
@given.taking("chat", "reply", "device_map", "threads")
def export(
    how: given.How,
    file: Annotated[Path, typer.Argument(metavar="FILE|RUN", help=_FILE, callback=given.of_source)],
    to: Annotated[Literal["gguf", "checkpoint"], typer.Option(help="For llama.cpp; a model with it baked in.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="What to write: a new file, or a new or empty folder.")],
    toward: Annotated[str | None, typer.Option(help=f"Of a run: {TOWARD}", callback=given.of_toward)] = None,
    model: Annotated[str | None, typer.Option(help=_ITS_MODEL, callback=given.of_model)] = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector.")] = 1.0,
) -> None:
    """Write a vector or an adapter for other programs; what acts on every token only. Nothing is overwritten."""
    from mnemoscope.face.stored import vector_file
    from mnemoscope.interventions import Toward, load_intervention
    from mnemoscope.models import core_of
    from mnemoscope.serving.export import check_portable

    adapter = (file / "adapter_config.json").is_file()
    file = vector_file(file, toward) if file.is_dir() and not adapter else file
    lever = load_intervention(file)
    if toward is not None and Toward.of(toward) != lever.toward:
        raise ms.InputError(
            f"toward: {toward!r}; the {'adapter' if adapter else 'vector'} in {file} steers to {lever.toward}"
        )
    check_portable(lever, to)  # before a large model is opened for nothing
    if out.exists() and (to == "gguf" or not out.is_dir() or any(out.iterdir())):
        raise ms.InputError(f"out: {out} exists; nothing is overwritten")
    if to == "checkpoint" and model is None:
        raise ms.InputError("model: a checkpoint is made of a model; name the one that the vector was made on")
    if to == "gguf" and model is None and lever.binding is None:
        raise ms.InputError("model: the vector does not say which model it was made on; name it")
    opened, tokenizer = open_model(model, how) if model is not None else (None, None)
    lever.check(opened, tokenizer, how.force)
    lever = lever.scaled(alpha)
    if isinstance(lever, ms.SteeringVector) and to == "checkpoint":
        ms.bake(opened, tokenizer, lever, out)
    else:
        config = core_of(opened).config if opened is not None else None
        bound = lever.binding.model_type if lever.binding else ""
        ms.to_gguf(lever, out, config.model_type if config else bound, config)
    layers = getattr(lever, "layers", None)
    say(how.as_json, out, out=out, to=to, toward=lever.toward, layers=layers, alpha=alpha)


@app.command("import")
@given.taking("chat", "reply", "device_map", "threads")
def import_vector(
    how: given.How,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A control vector of llama.cpp (GGUF).")],
    model: Annotated[str, typer.Option(help="The model it is for.", callback=given.of_model)],
    toward: Annotated[str, typer.Option(help=TOWARD, callback=given.of_toward)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The vector to write, a new .safetensors file.")],
) -> None:
    """Take in a control vector of llama.cpp, of ours or of others; its card says whether it was judged."""
    if out.exists():
        raise ms.InputError(f"out: {out} exists; nothing is overwritten")
    if not file.is_file():
        raise ms.InputError(f"FILE: {file} does not exist")
    vector = ms.from_gguf(file, toward, *open_model(model, how))
    vector.save(out)
    say(how.as_json, f"{out}\n{vector.card}", out=out, toward=vector.toward, layers=vector.layers)


@app.command()
def serve(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help=_RUNS, callback=given.of_run)] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    siblings: Annotated[bool, typer.Option("--siblings", help="Show the runs beside RUN too.")] = False,
    model: Annotated[str | None, typer.Option(help=_OF_RUN, callback=given.of_model)] = None,
    allow_code: given.AllowCode = None,
    threads: given.Threads = None,
    as_json: given.AsJson = False,
) -> None:
    """Open the playground: ask a model in the browser, and steer its answers.

    It listens on this machine only and prints an address with a token, new at every start. From another machine,
    forward the port (ssh -L 8000:127.0.0.1:8000 USER@MACHINE) and open the same address there.
    """
    # The pages say that nothing leaves this machine, so nothing is downloaded.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from mnemoscope.runs.processes import quiet_library

    try:
        from mnemoscope.web.app import serve
    except ImportError as error:
        raise ms.InputError("serve: needs FastAPI and uvicorn: pip install 'mnemoscope[web]'") from error
    ms.allow_code(*allow_code or ())
    quiet_library()
    told: Callable[[str], Any] = (lambda at: say(True, at, address=at)) if as_json else partial(typer.echo, err=True)
    serve(run, port, told, siblings, model)


def _fitted(source: Path | None, model: str, how: given.How) -> Any:
    """Open vectors and detector with their model."""
    from mnemoscope.face.ready import shipped

    source, prompting = source or shipped(model), formatted(how)
    return ms.Fitted.open(source, *open_model(model, how), prompting=prompting, force=how.force)
