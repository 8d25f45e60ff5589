"""Bad inputs, generated from few roots: each is a name, a command line, and files that it finds in its folder.

Every folder has a copy of a finished run; files that begin with ``run/`` change it, and get digests that are right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from helpers import MINI_STUDY
from mnemoscope.runs.digests import facts_digest

Content = str | bytes | Callable[[Path], object]  # a function makes it in place of what is there
Attack = tuple[str, tuple[str, ...], Mapping[str, Content]]

DEEP, NINES = "[" * 3000, "9" * 5000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
YAML: list[str | bytes] = [
    "study",
    "[1, 2]",
    "study: [a",
    "study:\n\t- a",
    "study: a\nstudy: b\ncells: {}",
    BOMB,
    MERGES,
]
YAML += ["study: &a [*a]", "study: *a", "study: " + DEEP, "study: " + "{a: " * 2000, "- " * 3000, f"study: {NINES}"]
YAML += [f"study: !!{kind} x" for kind in ("int", "float", "bool", "binary", "python/object/apply:os.system")]
YAML += ["study: !thing x", "{[1]: 2}", "? {a: 1}\n: 2", "study: a\n---\nstudy: b", "%YAML 7.0\n---\nstudy: a", "<<: 1"]
YAML += ["!!omap [a]", "!!set {a, b}", "[" + "1, " * 60_000 + "1]", "study: " + "x" * 2**20, "{" * 2000, "%TAG"]
BYTES: list[str | bytes] = ["", b"\x00", b"\xff\xfes\x00t"]
JSON: list[str | bytes] = [
    *BYTES,
    "{",
    "[]",
    "null",
    "1",
    '"x"',
    "{}",
    DEEP,
    NINES,
    '{"task": "\\ud800"}',
    '{"a":1,"a":2}',
]
ROW = '{"item": "a", "prompt": "p", "memorized": "a", "generalized": "b"'
ROWS = [
    *JSON,
    '{"item": "a"}',
    '{"item": NaN}',
    '{"item": true, "prompt": "p"}',
    ROW + ', "colour": "red"}',
    ROW + ', "item": "b"}',
]
ROWS += [ROW.replace('"b"', '"a"') + "}", '{"item": "a", "prompt": "p", "memorized": "a"}', ROW + ', "split": "odd"}']
NUMBERS = ("x", "", "1:30", "true", "1e999x", NINES, "0x10", "\udcff", "--", "-1")


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target or path.name)

    return make


KINDS: dict[str, Content] = {"a pipe": pipe, "a folder": folder, "a loop": link(""), "a broken link": link("nowhere")}
KINDS["a device"] = link("/dev/zero")
CELL, MODEL = "run/cells/addition-0", "run/cells/addition-0/model"
RUN = ("run", "s.yaml", "--out", "out")
DETECT = ("detect", MODEL, "--from", "run", "12+34=")
STEER = ("steer", MODEL, "--from", "run", "--toward", "generalized", "12+34=")
GGUF = ("export", "run", "--toward", "generalized", "--to", "gguf", "-o", "o.gguf")


def studies() -> Iterator[Attack]:
    """Study files, and values of ``--set`` and ``--option``."""
    for text in [*YAML, *BYTES, *KINDS]:
        yield f"study: {text[:30]!r}", RUN, {"s.yaml": KINDS.get(str(text), text)}
        if isinstance(text, str) and 0 < len(text) < 100_000 and text not in (*KINDS, "study"):
            yield f"--set: {text[:30]!r}", ("run", "quickstart", "--set", f"seeds={text}", "--out", "out"), {}
            data = ("data", "addition", "--option", f"digits={text}", "-o", "o.jsonl")
            yield f"--option: {text[:30]!r}", data, {}
    for setting in ("", "=", "seeds", "=1", "seeds.a=1", "cells..x=1", ".=1", "study=../x", "cells={}", "cells=1"):
        yield f"--set {setting}", ("run", "quickstart", "--set", setting, "--out", "out"), {}
    wrong = {"seeds": "true", "threads": "1.5", "study": "5", "cells.addition.detection.fitted": "'no'"}
    steering = {"tops": "[2]", "layers": "all", "strengths": "['1']", "colour": "1"}
    wrong |= {f"cells.addition.steering.grids.block.{name}": value for name, value in steering.items()}
    wrong |= {f"cells.addition.training.{name}": "'2'" for name in ("steps", "learning_rate", "stop", "precision")}
    for field, value in wrong.items():
        yield f"{field}={value}", (*RUN, "--set", f"{field}={value}"), {"s.yaml": MINI_STUDY}


def rows() -> Iterator[Attack]:
    """Files of rows, and options of tasks."""
    for text, (task, option, file) in product(
        [*ROWS, *KINDS],
        (
            ("jsonl", "file", "x.jsonl"),
            ("qa", "file", "x.jsonl"),
            ("facts", "table", "x.csv"),
            ("qa", "file", "x.parquet"),
        ),
    ):
        command = ("data", task, "--option", f"{option}={file}", "-o", "o.jsonl")
        yield f"{file} of {task}: {text[:60]!r}", command, {file: KINDS.get(str(text), text)}
    for task, option in (("addition", "digits=true"), ("inference", "statements='2'"), ("facts", "relations=capital")):
        yield f"{task}: {option}", ("data", task, "--option", option, "-o", "o.jsonl"), {}
        yield f"{task}: colour", ("data", task, "--option", "colour=1", "-o", "o.jsonl"), {}


def paths() -> Iterator[Attack]:
    """Outputs that cannot be written, and inputs that are no such thing."""
    named = ["there/out", "n" * 300, "/".join(["n" * 200] * 30), "/proc/nowhere/out", "/dev/null/out", ""]
    commands = [RUN[:3], ("data", "addition", "-o"), ("fit", MODEL, "--task", "addition", "-o"), (*GGUF[:-1],)]
    for command, path in product(commands, named):
        yield f"{command[0]} to {path[:20]!r}", (*command, path), {"there": "x", "s.yaml": MINI_STUDY}
    for command, path in product(
        (("report",), ("serve",), ("detect", MODEL, "1=", "--from"), ("doctor",)), [*named, *KINDS]
    ):
        files = {"there": KINDS.get(path, "x")}
        yield f"{command[0]} of {path[:20]!r}", (*command, "there" if path in KINDS else path), files


def options() -> Iterator[Attack]:
    """Options and arguments that are missing, unknown, or no number."""
    numbers = {("run", "quickstart"): ("--seeds", "--workers"), ("data", "addition", "-o", "o"): ("-n", "--seed")}
    numbers |= {STEER: ("--alpha", "--gate", "--max-new-tokens"), ("serve",): ("--port",)}
    for command, names in numbers.items():
        for option, value in product(names, NUMBERS):
            yield f"{command[0]} {option} {value[:9]!r}", (*command, option, value), {}
    for command in ("run", "report", "fit", "check", "arena", "tasks", "data", "doctor", "steer", "detect", "export"):
        yield f"{command} --colour", (command, "--colour"), {}
        if command not in ("run", "tasks"):
            yield f"{command} alone", (command,), {}
    for command in (("runs",), ("--version-of",), ("",), ("\ud800",), ("x" * 10_000,)):
        yield f"command {command[0][:9]!r}", command, {}
    for other in (("--executor", "cloud"), ("--address", "x:1"), ("--executor", "ray", "--workers", "2")):
        yield f"run {' '.join(other)}", (*RUN, *other), {"s.yaml": MINI_STUDY}
    for option in ("--dtype=float31", "--dtype=", "--layout=x", "--layout=blocks=", "--layout=blocks=a,mlp=b"):
        yield f"doctor {option}", ("doctor", MODEL, option), {}
    for toward in ("", "x", "to_generalized", "Generalized"):
        yield f"toward {toward!r}", (*STEER[:5], toward, "1+2="), {}
    for command, prompt in product((STEER, DETECT), ("hello", "", "12+34=\ud800", "1" * 3000, "é")):
        yield f"{command[0]} {prompt[:9]!r}", (*command[:-1], prompt), {}


FACTS: dict[str, dict[str, Any]] = {  # by file, values that fields cannot have; ``...`` deletes a field
    f"{CELL}/cell.json": {
        "task": ...,
        "label": 1,
        "seed": "x",
        "memory_is_conflict": None,
        "trained": [],
        "binding": 1,
    },
    f"{CELL}/records/chosen.json": {"pairs": ..., "conflict": [], "aim": "x"},
    f"{CELL}/probe.json": {"site": "x", "best_layer": ..., "layers": {"a": 1}},
    f"{CELL}/records/training_time.json": {"seconds": True, "steps": ...},
    "run/manifest.json": {"versions": [1], "machine": "x"},
    "run/failed.json": {"x": 1},
}
OF_ARTEFACT = {"digest": None, "task": ..., "commit": [], "binding": "x", "prompting": None, "card": True, "site": "x"}


def changed(name: str, value: Any) -> Callable[[Path], object]:
    """Writes another value into a JSON file, with the digest that an artefact then has."""

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


def records() -> Iterator[Attack]:
    """Damaged files of a run, opened by ``report``."""
    for file, facts in FACTS.items():
        texts = [text for text in JSON if text != "{}" or "cells" in file]
        for text in [*texts, *KINDS]:
            yield f"{file}: {text[:30]!r}", ("report", "run"), {file: KINDS.get(str(text), text)}
        for name, value in facts.items():
            yield f"{file}: {name} is {value!r}", ("report", "run"), {file: changed(name, value)}
    for name, text in product(("records/pairs.parquet", "records/steering.parquet", "contrast.safetensors"), BYTES):
        yield f"{name}: {text!r}", ("report", "run"), {f"{CELL}/{name}": text}
    for text in [*YAML[:8], *BYTES, *KINDS]:
        yield f"study.yaml: {text[:30]!r}", ("report", "run"), {"run/study.yaml": KINDS.get(str(text), text)}


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Other tensors in a vector or detector, with the digest that they have."""

    def write(path: Path) -> None:
        found = load(path.read_bytes())
        change(found)
        content = save(found)
        path.unlink()
        path.write_bytes(content)
        digests = json.loads(path.with_suffix(".json").read_text())["digest"]
        changed("digest", digests | {"tensors": hashlib.sha256(content).hexdigest()})(path.with_suffix(".json"))

    return write


ODD: dict[str, Callable[[Any], Any]] = {
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t + float("inf"),
    "shorter": lambda t: t[..., :-1].contiguous(),
    "twice": lambda t: torch.cat([t, t]),
    "one more axis": lambda t: t[None],
    "a number": lambda t: torch.tensor(1.0),
    "empty": lambda t: t[:0].clone(),
}


def artefacts() -> Iterator[Attack]:
    """Vectors, detectors and models that are damaged, or do not fit."""
    for stem, command in (("detector", DETECT), ("vectors/to_generalized-nmd", STEER)):
        for text, ending in product([*JSON, *KINDS], ("json", "safetensors")):
            yield f"{stem}.{ending}: {text[:30]!r}", command, {f"{CELL}/{stem}.{ending}": KINDS.get(str(text), text)}
        for name, value in OF_ARTEFACT.items():
            yield f"{stem}: {name} is {value!r}", command, {f"{CELL}/{stem}.json": changed(name, value)}
        for what, make in ODD.items():

            def each(found: dict[str, Any], make: Callable[[Any], Any] = make) -> None:
                found.update({name: make(tensor) for name, tensor in found.items()})

            yield f"{stem}: {what}", command, {f"{CELL}/{stem}.safetensors": tensors(each)}
    for name in ("layer.7", "layer.-1", "layer.x", "layer", "read.0", "colour.0", "layer.0.1"):
        more = tensors(lambda found, name=name: found.update({name: torch.ones(64)}))  # type: ignore[misc]
        yield f"vector: {name}", STEER, {f"{CELL}/vectors/to_generalized-nmd.safetensors": more}
    for file, command in product(("config.json", "model.safetensors", "tokenizer.json"), (DETECT, ("doctor", MODEL))):
        for text in [*BYTES, "{", "[]", "{}", DEEP]:
            yield f"{file}: {text[:9]!r}, {command[0]}", command, {f"{MODEL}/{file}": text}


ROOTS = (studies, rows, paths, options, records, artefacts)
