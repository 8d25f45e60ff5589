"""Damaged files of a run: its records, its vectors and detectors, its model; and prompts that no model reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from attack_inputs import JSON, KINDS, MODEL, Attack, Content

import helpers
from mnemoscope.runs.digests import facts_digest

CELL = "run/cells/addition-0"
RECORDS = {
    f"{CELL}/cell.json": ("task", "label", "seed", "memory_is_conflict", "trained", "binding"),
    f"{CELL}/records/chosen.json": ("pairs", "conflict", "aim"),
    f"{CELL}/probe.json": ("site", "best_layer", "layers"),
    f"{CELL}/records/training_time.json": ("seconds", "steps"),
    "run/manifest.json": ("versions", "machine", "stages"),
    "run/failed.json": (),
}
ARTEFACTS = ("digest", "task", "commit", "binding", "prompting", "card", "site")
PLACES = ("run", CELL)  # of markers


def sign(folder: Path) -> None:
    """Give changed files of a run the digests that a stranger would give them, so that their content is read."""
    for place in PLACES:
        helpers.sign(folder / place)


ODD: tuple[object, ...] = (None, True, [], {"a": 1}, "x", -1.5, [None])


def changed(name: str, value: object) -> Callable[[Path], object]:
    """Writes another value into a JSON file, with the digest that an artefact then has; ``...`` deletes the field."""

    def change(path: Path) -> None:
        found = json.loads(path.read_text())
        if value is ...:
            del found[name]
        else:
            found[name] = value
        if name != "digest" and "digest" in found:
            digests = found.pop("digest")
            found["digest"] = digests | {"facts": facts_digest(found)}
        path.unlink()
        path.write_text(json.dumps(found))

    return change


FITS: dict[str, tuple[object, ...]] = {  # values of ODD that are as good as what is there
    "task": ("x",),
    "label": ("x",),
    "commit": ("x",),
    "digest": (),
    "binding": (None, ...),
    "aim": (...,),
    "card": (None,),
    "memory_is_conflict": (True,),
    "trained": (True,),
    "seconds": (-1.5,),
    "layers": ([],),
    "machine": ({"a": 1}, ...),
    "versions": (...,),
    "stages": (...,),
}


def fields_of(file: str, names: Sequence[str], needed: Sequence[str] = ()) -> Iterator[tuple[str, Content]]:
    """Each field without a value, and with values that do not fit."""
    for name, value in product(names, (..., *ODD)):
        if name in needed or value not in FITS.get(name, ()):
            yield f"{name} is {value!r:.10}", changed(name, value)


DETECT = ("detect", MODEL, "--from", "run", "12+34=")
STEER = ("steer", MODEL, "--from", "run", "--toward", "generalized", "12+34=")
TABLES = ("pairs", "steering", "behaviour", "probes", "training")


def records() -> Iterator[Attack]:
    """Damaged files of a run, opened by ``report``."""
    for file, names in RECORDS.items():
        for what, content in (*JSON.items(), *KINDS.items(), *fields_of(file, names)):
            if what != "an empty object" or file not in ("run/failed.json", "run/manifest.json"):
                yield Attack(f"{file}: {what}", ("report", "run"), {file: content})
    for table, what in product(TABLES, ("nothing", "no JSON", *KINDS)):
        file = f"{CELL}/records/{table}.parquet"
        yield Attack(f"{table}: {what}", ("report", "run"), {file: (JSON | KINDS)[what]})
    for (what, content), file in product(
        (JSON | KINDS).items(), ("study.yaml", "cells/addition-0/contrast.safetensors")
    ):
        yield Attack(f"{file}: {what}", ("report", "run"), {f"run/{file}": content})


def files_of_artefacts() -> Iterator[Attack]:
    """Damaged files of vectors and detectors."""
    for stem, command in (("detector", DETECT), ("vectors/to_generalized-nmd", STEER)):
        for (what, content), ending in product((JSON | KINDS).items(), ("json", "safetensors")):
            yield Attack(f"{stem}.{ending}: {what}", command, {f"{CELL}/{stem}.{ending}": content}, opens=True)
        for what, content in fields_of(stem, ARTEFACTS, needed=("binding",)):
            yield Attack(f"{stem}: {what}", command, {f"{CELL}/{stem}.json": content}, opens=True)
    for what, content in JSON.items():
        yield Attack(f"chosen.json: {what}, steered", STEER, {f"{CELL}/records/chosen.json": content}, opens=True)


def tensors(stem: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Other tensors in a vector or detector, with the digest that they have."""

    def write(path: Path) -> None:
        import hashlib

        from safetensors.torch import load, save

        found = load(path.read_bytes())
        change(found)
        content = save(found)
        path.unlink()
        path.write_bytes(content)
        described = path.with_suffix(".json")
        digests = json.loads(described.read_text())["digest"]
        changed("digest", digests | {"tensors": hashlib.sha256(content).hexdigest()})(described)

    return write


def artefacts() -> Iterator[Attack]:
    """Vectors and detectors whose tensors do not fit, hold no numbers, or nothing but zeros."""
    import torch

    def each(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
        return lambda found: found.update({name: make(found[name])})

    odd: dict[str, Callable[[Any], Any]] = {
        "NaN": lambda t: t * float("nan"),
        "infinite": lambda t: t + float("inf"),
        "shorter": lambda t: t[..., :-1].contiguous(),
        "twice": lambda t: torch.cat([t, t]),
        "one more axis": lambda t: t[None],
        "a number": lambda t: torch.tensor(1.0),
        "empty": lambda t: t[:0].clone(),
    }
    for name in ("weights_LD", "bias_L", "conflict_D", "mean_D", "whitening_DD"):
        for what, make in odd.items():
            change = tensors("detector", each(name, make))
            yield Attack(f"detector: {name} {what}", DETECT, {f"{CELL}/detector.safetensors": change}, opens=True)
        gone = tensors("detector", lambda found, name=name: found.pop(name))  # type: ignore[misc]
        yield Attack(f"detector: no {name}", DETECT, {f"{CELL}/detector.safetensors": gone}, opens=True)
    vector = f"{CELL}/vectors/to_generalized-nmd.safetensors"
    for what, make in (odd | {"of zeros": torch.zeros_like}).items():
        change = tensors("vector", lambda found, make=make: found.update({k: make(t) for k, t in found.items()}))  # type: ignore[misc]
        yield Attack(f"vector: {what}", STEER, {vector: change}, opens=True)
    for name in ("layer.7", "layer.-1", "layer.x", "layer", "read.0", "colour.0", "layer.0.1"):
        change = tensors("vector", lambda found, name=name: found.update({name: torch.ones(64)}))  # type: ignore[misc]
        yield Attack(f"vector: {name}", STEER, {vector: change}, opens=True)
    for prompt in ("hello", "", " ", "12+34=\ud800", "1" * 3000, "é", "12+34= x"):
        word = prompt.encode("utf-8", "surrogatepass")
        yield Attack(f"prompt {prompt[:9]!r}", (*STEER[:-1], word), {"run/.x": None}, opens=True)
        yield Attack(f"prompt {prompt[:9]!r}, read", (*DETECT[:-1], word), {"run/.x": None}, opens=True)
    for toward in ("", "x", "to_generalized", "Generalized"):
        yield Attack(f"toward {toward!r}", (*STEER[:5], toward, "1+2="), {"run/.x": None}, opens=True)
    for file, command in product(("config.json", "model.safetensors", "tokenizer.json"), (DETECT, ("doctor", MODEL))):
        for what in ("nothing", "no JSON", "a list", "deep", "no UTF-8", "an empty object"):
            yield Attack(f"model: {file} {what}, {command[0]}", command, {f"{MODEL}/{file}": JSON[what]}, opens=True)


ROOTS = (records, files_of_artefacts, artefacts)
