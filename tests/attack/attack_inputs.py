"""Bad inputs, generated from few roots: each is a command line and the files it finds in its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from helpers import MINI_STUDY
from mnemoscope.config import dump_study, parse_study
from mnemoscope.tasks import TASKS
from mnemoscope.tasks.registry import task_class

Content = str | bytes | Callable[[Path], object] | None  # None: deleted; a function makes it in place of what is there


@dataclass(frozen=True)
class Attack:
    """One bad input.

    Attributes:
        name: its root and what it is.
        arguments: of the command, in a folder of its own.
        files: content by path in that folder; a path that begins with ``run/`` changes a copy of a finished run.
        opens: whether the command opens a model, so that it is never run in a process of its own.
        code: the exit code.
    """

    name: str
    arguments: tuple[str | bytes, ...]
    files: Mapping[str, Content] = field(default_factory=dict)
    opens: bool = False
    code: int = 2


NINES, DEEP = "9" * 5000, "[" * 3000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
YAML: dict[str, str | bytes] = {
    "nothing": "",
    "a word": "study",
    "a list": "[1, 2]",
    "unclosed": "study: [a",
    "a tab": "study:\n\t- a",
    "a repeated key": "study: a\nstudy: b\ncells: {}",
    "an alias bomb": BOMB,
    "a bomb of merges": MERGES,
    "an alias of itself": "study: &a [*a]",
    "no such alias": "study: *a",
    "deep lists": "study: " + DEEP,
    "deep mappings": "study: " + "{a: " * 2000,
    "deep dashes": "- " * 3000,
    "a long number": f"study: {NINES}",
    "a date that is none": "study: !!timestamp 2024-13-45",
    "a number that is none": "study: !!int x",
    "a float that is none": "study: !!float x",
    "a truth that is none": "study: !!bool x",
    "binary that is none": "study: !!binary x",
    "Python": "!!python/object/apply:os.system [touch pwned]",
    "a tag": "study: !thing x",
    "a list as key": "{[1]: 2}",
    "a mapping as key": "? {a: 1}\n: 2",
    "two documents": "study: a\n---\nstudy: b",
    "another version": "%YAML 7.0\n---\nstudy: a",
    "a bad merge": "<<: 1",
    "a zero byte": b"study: \x00",
    "no UTF-8": b"study: \xff\xfe",
    "half a UTF-16": b"\xff\xfes\x00t",
    "an omap": "!!omap [a]",
    "a set": "!!set {a, b}",
    "many values": "[" + "1, " * 60_000 + "1]",
    "two megabytes": "study: " + "x" * 2_000_000,
    "a flow without end": "{" * 2000,
    "an anchor alone": "&a",
    "a directive alone": "%TAG",
}
JSONL: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "a text": '"x"',
    "deep": '{"item": ' + DEEP,
    "a long number": f'{{"item": {NINES}}}',
    "half a character": '{"item": "\\ud800", "prompt": "p", "memorized": "a", "generalized": "b"}',
    "no UTF-8": b'{"item": "\xff"}',
    "a byte order mark": "\ufeff{}",
    "a zero byte": b"\x00",
    "NaN": '{"item": NaN}',
    "a repeated key": '{"item": "a", "item": "b", "prompt": "p", "memorized": "a", "generalized": "b"}',
    "no prompt": '{"item": "a"}',
    "a number as prompt": '{"item": "a", "prompt": 1}',
    "an unknown field": '{"item": "a", "prompt": "p", "colour": "red"}',
    "equal answers": '{"item": "a", "prompt": "p", "memorized": "a", "generalized": "a"}',
    "one answer": '{"item": "a", "prompt": "p", "memorized": "a"}',
    "no conflict": '{"item": "a", "prompt": "p", "answer": "x"}',
    "a wrong kind": '{"item": "a", "prompt": "p", "answer": "x", "kind": "odd"}',
    "a wrong split": '{"item": "a", "prompt": "p", "answer": "x", "split": "odd"}',
    "empty texts": '{"item": "", "prompt": ""}',
    "true as item": '{"item": true, "prompt": "p"}',
}
JSON: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "a text": '"x"',
    "an empty object": "{}",
    "deep": DEEP,
    "a long number": NINES,
    "no UTF-8": b"\xff",
    "half a character": '{"task": "\\ud800"}',
    "a zero byte": b"\x00\x00",
}
WRONG: dict[type, tuple[str, ...]] = {  # by the type of a field, YAML that is of another
    bool: ("'no'", "yes", "1", "[]"),
    int: ("true", "no", "1:30", "'2'", "1.5", ".nan", "[1]"),
    float: ("true", "no", "1:30", "'2'", "{}"),
    str: ("5", "true", "[a]", "1.5"),
    list: ("true", "5", "{a: 1}", "[[[]]]"),
    dict: ("true", "5", "[1]", "x"),
}
NUMBERS = ("x", "", "1:30", "true", "1e999x", NINES, "0x10", b"\xff", "--")


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


loop = link("")


KINDS: dict[str, Content] = {
    "a pipe": pipe,
    "a folder": folder,
    "a link to itself": loop,
    "a broken link": link("nowhere"),
    "a device": link("/dev/zero"),
}


def studies() -> Iterator[Attack]:
    """Study files and values of ``--set`` and ``--option``."""
    for name, text in YAML.items():
        yield Attack(f"study: {name}", ("run", "s.yaml", "--out", "out"), {"s.yaml": text})
        if not isinstance(text, bytes) and len(text) < 100_000 and name not in ("nothing", "an anchor alone"):
            value = "x" if name == "a word" else text
            yield Attack(f"--set: {name}", ("run", "quickstart", "--set", f"seeds={value}", "--out", "out"))
            yield Attack(f"--option: {name}", ("data", "addition", "--option", f"digits={value}", "-o", "o.jsonl"))
    for name, content in KINDS.items():
        yield Attack(f"study: {name}", ("run", "s.yaml", "--out", "out"), {"s.yaml": content})
    for setting in ("", "=", "seeds", "=1", "seeds.a=1", "cells..x=1", ".=1", "study=../x", "cells={}", "cells=1"):
        yield Attack(f"--set {setting}", ("run", "quickstart", "--set", setting, "--out", "out"))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a configuration with a value, by path."""
    if isinstance(value, dict) and value and not path.endswith(".options"):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    elif value is not None:
        yield path, value


def fields() -> Iterator[Attack]:
    """Every field of a study with values of other types."""
    full = yaml.safe_load(dump_study(parse_study(yaml.safe_load(MINI_STUDY))))
    for path, value in leaves(full):
        for text in WRONG[type(value)]:
            if path.endswith("target_modules") or (path.endswith("options") and text == "{a: 1}"):
                continue
            arguments = ("run", "s.yaml", "--set", f"{path}={text}", "--out", "out")
            yield Attack(f"{path}={text}", arguments, {"s.yaml": MINI_STUDY})
        yield Attack(f"{path}s", ("run", "s.yaml", "--set", f"{path}s=1", "--out", "out"), {"s.yaml": MINI_STUDY})


def tasks() -> Iterator[Attack]:
    """Options of tasks of other types, and files of rows."""
    for name, maker in {name: task_class(name) for name in TASKS}.items():
        hints = {key: hint for key, hint in maker.__init__.__annotations__.items() if key != "return"}  # type: ignore[misc]
        for option, hint in hints.items():
            kind = next((k for k in (bool, int, float, str) if str(hint).startswith(k.__name__)), list)
            for text in WRONG[kind] if hint != "Any" else ():
                arguments = ("data", name, "--option", f"{option}={text}", "-o", "o.jsonl")
                yield Attack(f"task {name}: {option}={text}", arguments)
        yield Attack(f"task {name}: colour", ("data", name, "--option", "colour=1", "-o", "o.jsonl"))
    for name, text in (JSONL | KINDS).items():
        for task, option, file in (
            ("jsonl", "file", "x.jsonl"),
            ("qa", "file", "x.jsonl"),
            ("memotrap", "file", "x.csv"),
        ):
            if (task, name) == ("memotrap", "half a character"):
                continue
            arguments = ("data", task, "--option", f"{option}={file}", "-o", "o.jsonl")
            yield Attack(f"rows of {task}: {name}", arguments, {file: text})
        yield Attack(f"facts: {name}", ("data", "facts", "--option", "table=x.csv", "-o", "o.jsonl"), {"x.csv": text})
        yield Attack(
            f"parquet: {name}", ("data", "qa", "--option", "file=x.parquet", "-o", "o.jsonl"), {"x.parquet": text}
        )


LONG = "n" * 300
PATHS: dict[str, tuple[str | bytes, Mapping[str, Content]]] = {
    "a file": ("there", {"there": "x"}),
    "below a file": ("there/out", {"there": "x"}),
    "a long name": (LONG, {}),
    "a long path": ("/".join(["n" * 200] * 30), {}),
    "a link to itself": ("there", {"there": loop}),
    "below a link to itself": ("there/out", {"there": loop}),
    "in /proc": ("/proc/nowhere/out", {}),
    "below a device": ("/dev/null/out", {}),
    "nothing": ("", {}),
}
MODEL = "run/cells/addition-0/model"
COMMANDS: dict[str, tuple[str | bytes, ...]] = {
    "run": ("run", "s.yaml", "--out"),
    "fit": ("fit", MODEL, "--task", "addition", "--out"),
    "arena": ("arena", MODEL, "--task", "addition", "--out"),
    "data": ("data", "addition", "--out"),
}


def paths() -> Iterator[Attack]:
    """Outputs that cannot be written, and inputs that are no such thing."""
    for (what, command), (name, (path, files)) in product(COMMANDS.items(), PATHS.items()):
        if (what, name) in (("data", "a file"), ("data", "a link to itself"), ("arena", "nothing")):
            continue  # what is replaced, and the folder itself
        yield Attack(
            f"{what} --out: {name}",
            (*command, path),
            {**files, "s.yaml": MINI_STUDY, "run/.x": None},
            opens=what in ("fit", "arena"),
        )
    for name in {**PATHS, **KINDS}:
        path, files = PATHS.get(name) or ("there", {"there": KINDS[name]})
        for command in (("report", path), ("serve", path)):
            yield Attack(f"{command[0]}: {name}", command, files)
        for what in ("detect", "steer", "export"):
            more = {"detect": ("--from", path, "12+34="), "export": ("--to", "gguf", "-o", "o.gguf")}
            more["steer"] = (*more["detect"], "--toward", "generalized")
            opening = ("export", path, *more[what]) if what == "export" else (what, MODEL, *more[what])
            yield Attack(f"{what}: {name}", opening, {**files, "run/.x": None}, opens=True)
        for what in ("doctor", "check", "detect"):
            more = {"doctor": (), "check": ("--task", "addition"), "detect": ("--from", "run", "1+2=")}
            yield Attack(f"{what} of {name}", (what, path, *more[what]), {**files, "run/.x": None}, opens=True)
    for out in ("/dev/full", "/proc/self/mem", "/proc/1/x", "/sys/x"):
        yield Attack(f"data -o {out}/x", ("data", "addition", "-o", f"{out}/x"))


def options() -> Iterator[Attack]:
    """Options and arguments that are missing, unknown, or no number."""
    numbers = {
        ("run", "quickstart"): ("--seeds", "--workers"),
        ("fit", MODEL, "--task", "addition", "-o", "o"): ("--settings", "--threads"),
        ("data", "addition", "-o", "o"): ("-n", "--seed"),
        ("steer", MODEL, "--from", "run", "--toward", "generalized", "1+2="): ("--alpha", "--gate", "--max-new-tokens"),
        ("export", "v.safetensors", "--to", "gguf", "-o", "o"): ("--alpha",),
        ("serve",): ("--port",),
    }
    for command, names in numbers.items():
        for option, value in product(names, (*NUMBERS, "-1")):
            yield Attack(f"{command[0]} {option} {value[:9]!r}", (*command, option, value))
    known = ("run", "report", "fit", "check", "arena", "tasks", "data", "doctor", "steer", "detect", "export", "serve")
    for command in known:
        yield Attack(f"{command} --colour", (command, "--colour"))
        yield Attack(f"{command} -z", (command, "-z", "x"))
        if command not in ("run", "tasks", "serve"):
            yield Attack(f"{command} alone", (command,))
    for word in ("runs", "--version-of", "", "\ud800".encode("utf-8", "surrogatepass"), "run\n", "x" * 10_000):
        yield Attack(f"command {word[:9]!r}", (word,))
    for executor in (("--executor", "cloud"), ("--address", "x:1"), ("--executor", "ray", "--workers", "2")):
        yield Attack(f"run {' '.join(executor)}", ("run", "s.yaml", "--out", "o", *executor), {"s.yaml": MINI_STUDY})
    for dtype in ("float31", "", "int8"):
        yield Attack(f"--dtype {dtype!r}", ("doctor", MODEL, "--dtype", dtype), {"run/.x": None}, opens=True)
    for layout in ("x", "blocks=", "blocks=a,mlp=b", "=", "blocks=a,attention=b,mlp=c", ","):
        yield Attack(f"--layout {layout!r}", ("doctor", MODEL, "--layout", layout), {"run/.x": None}, opens=True)


ROOTS = (studies, fields, tasks, paths, options)
