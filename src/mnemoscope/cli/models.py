"""Commands for a model of yours: check it, ask it, turn it, take the vector elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mnemoscope.cli.app import app
from mnemoscope.cli.given import AsChat, AsJson, DeviceMap, Dtype, Parts, Reply, named_parts
from mnemoscope.cli.output import one_line_errors, say


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a causal model, or smollm2.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to check with; at least two.")] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Prove on a model of yours that batched = single, cached = uncached, alpha 0 = untouched; exit code 1 if not."""
    with one_line_errors():
        from mnemoscope.doctor import PROMPTS, examine
        from mnemoscope.plain import dumped

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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the model, or smollm2.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What is put to the model.")],
    source: Annotated[Path, typer.Option("--from", help="A run, a cell of one, or the file of a vector.")],
    toward: Annotated[str, typer.Option(help="generalized or memorized.")],
    alpha: Annotated[float, typer.Option(min=0.0, help="Factor on the vector; 0 leaves the model as it is.")] = 1.0,
    gate: Annotated[
        float | None,
        typer.Option(
            help="Steer only where the other behaviour is at least so probable (0 to 1), memory and prompt seem to "
            "disagree, and the prompt is like those that the detector was fitted on."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind each prompt, at most.")] = 20,
    chat: AsChat = False,
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    force: Annotated[bool, typer.Option(help="Use a vector that was made on another model of the same shape.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model answers by itself, and what it answers under a vector."""
    with one_line_errors():
        from mnemoscope.behaviour import Asking
        from mnemoscope.errors import InputError
        from mnemoscope.plain import dumped
        from mnemoscope.steering import OPPOSITE, complete, find_vector

        if toward not in OPPOSITE:
            raise InputError(f"toward: {toward!r} is not one of {', '.join(OPPOSITE)}")
        opened, tokenizer = _open_with(source, model, dtype, layout, device_map)
        vector = find_vector(source, toward, opened, tokenizer, force)
        asking = Asking(opened, tokenizer, chat=_chat("vector", vector, chat, reply))
        if vector.begin_alike:
            typer.echo(_alike(vector.begin_alike), err=True)
        inputs = asking.padded([asking.text(prompt) for prompt in prompts])
        plain = complete(opened, tokenizer, inputs, max_new_tokens)
        opens = None
        if gate is not None:
            from mnemoscope.detect import Gate, find_detector

            if source.is_file():
                raise InputError("gate: needs a detector too; give --from the run or the cell that has both")
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
            about = {"model": model, "weights": _weights(model), "toward": toward, "vector": facts, "gate": acted}
            typer.echo(dumped(about | {"answers": rows}))
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
    reply: Reply = "",
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    layout: Parts = None,
    force: Annotated[bool, typer.Option(help="Use a detector that was fitted on another model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell, before it answers, how probably a model will go by what it remembers, and where that becomes readable."""
    with one_line_errors():
        from mnemoscope.behaviour import Asking
        from mnemoscope.detect import find_detector, read_prompts
        from mnemoscope.plain import dumped

        opened, tokenizer = _open_with(source, model, dtype, layout, device_map)
        detector = find_detector(source, opened, tokenizer, force)
        asking = Asking(opened, tokenizer, batch_size=32, chat=_chat("detector", detector, chat, reply))
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
            about = {"model": model, "weights": _weights(model), "layer": detector.layer, "site": detector.site}
            typer.echo(dumped(about | {"prompts": rows}))
        else:
            for row in rows:
                typer.echo(f"{row['prompt']}\n  {_verdict(row, detector.layer)}")


def _chat(what: str, made: Any, chat: bool, reply: str) -> Any:
    """How prompts are put: as those were that a vector or detector was made of, from what the command line says."""
    from mnemoscope.behaviour import Chat
    from mnemoscope.errors import InputError

    if reply and not chat:
        raise InputError("reply: it begins the reply in a chat; give --chat, or put it at the end of the prompt")
    if made.chat != chat:
        how, do = ("by a chat template", "give") if made.chat else ("as they are", "leave out")
        raise InputError(f"chat: the {what} was made of prompts that were put {how}; {do} --chat")
    if made.begun and not reply:
        raise InputError(f"reply: the {what} was made where the beginning of the reply was given; give it with --reply")
    return Chat(made.system, lambda prompt: (prompt, reply)) if chat else None


def _weights(model: str) -> str | None:
    """What is to be said of a packaged model's weights beside every number."""
    from mnemoscope.models import PACKAGED, QUANTIZED

    return QUANTIZED if model in PACKAGED else None


def _alike(share: float) -> str:
    return (
        f"note: {share:.0%} of the prompts that the vector was made of have two answers that begin alike; it was "
        "judged behind that beginning, so put it at the end of such a prompt"
    )


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
    layout: Parts = None,
    force: Annotated[bool, typer.Option(help="Use a vector that was made on another model of the same shape.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a vector for other programs; one with positions "all" only. Nothing that exists is overwritten."""
    with one_line_errors():
        from mnemoscope.errors import InputError
        from mnemoscope.export import bake, check_portable, to_gguf
        from mnemoscope.steering import SteeringVector

        vector = alpha * SteeringVector.load(file)
        check_portable(vector, to)  # before a large model is opened for nothing
        if out.exists() and (to == "gguf" or not out.is_dir() or any(out.iterdir())):
            raise InputError(f"out: {out} exists; nothing is overwritten")
        if to == "checkpoint" and model is None:
            raise InputError("model: a checkpoint is made of a model; name the one that the vector was made on")
        opened, tokenizer = _open(model, dtype, layout) if model is not None else (None, None)
        vector = alpha * SteeringVector.load(file, opened, tokenizer, force)
        if to == "checkpoint":
            bake(opened, tokenizer, vector, out)
        else:
            to_gguf(vector, out, _model_type(vector, opened))
        facts = {"out": str(out), "to": to, "toward": vector.toward, "layers": vector.layers, "alpha": alpha}
        say(facts, as_json, "out")


def _model_type(vector: Any, opened: Any) -> str:
    """What kind of model a vector is for."""
    from mnemoscope.errors import InputError
    from mnemoscope.models import core_of

    if opened is not None:
        return str(core_of(opened).config.model_type)
    if vector.binding is None:
        raise InputError("model: the vector does not say which model it was made on; name it")
    return str(vector.binding.model_type)


def _open_with(source: Path, model: str, dtype: str, layout: str | None, device_map: str | None) -> tuple[Any, Any]:
    """A user's model, for what was made of it; a path that is not there is told before a large model is opened."""
    from mnemoscope.errors import InputError

    if not source.exists():
        raise InputError(f"from: {source} does not exist")
    return _open(model, dtype, layout, device_map)


def _open(model: str, dtype: str, layout: str | None, device_map: str | None = None) -> tuple[Any, Any]:
    """A user's model and tokenizer, from what the command line says of them."""
    from mnemoscope.config import parse_model
    from mnemoscope.models import Layout, load_model
    from mnemoscope.processes import quiet_library

    quiet_library()
    given = {"folder": model, "dtype": dtype, "device_map": device_map, "layout": named_parts(layout)}
    shape = parse_model(given)
    if weights := _weights(model):
        typer.echo(f"{model}: weights are {weights}", err=True)
    where = Layout(**shape.layout.model_dump()) if shape.layout else None
    return load_model(model, dtype=shape.dtype, device_map=shape.device_map, layout=where)
