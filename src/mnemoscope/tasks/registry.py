"""Built-in tasks by name, and a user's own tasks by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_type_hints

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import checked
from mnemoscope.tasks.base import Task

TASKS = {  # where the class of each built-in task is
    "inference": "mnemoscope.paper.inference:InferenceTask",
    "addition": "mnemoscope.paper.stored:AdditionTask",
    "addition-digits": "mnemoscope.paper.stored:AdditionDigitsTask",
    "cipher": "mnemoscope.paper.stored:CipherTask",
    "joint": "mnemoscope.paper.joint:JointTask",
    "facts": "mnemoscope.tasks.facts:FactsTask",
    "memotrap": "mnemoscope.tasks.memotrap:MemotrapTask",
    "pararel": "mnemoscope.tasks.pararel:PararelTask",
    "qa": "mnemoscope.tasks.qa:QATask",
    "jsonl": "mnemoscope.tasks.jsonl:JsonlTask",
}


_allowed: set[str] = set()  # import paths whose code this process may run


def allow_code(*paths: str) -> None:
    """Allow this process to import tasks and methods of a user's own: ``package.module:Class``, ``package.module``.

    Importing runs their code, so a path has to come from the user, in Python or at the command line; nothing that is
    read from a file allows one.
    """
    _allowed.update(paths)


def allowed_code() -> tuple[str, ...]:
    """The paths that ``allow_code`` was called with, for processes that work for this one."""
    return tuple(sorted(_allowed))


def check_allowed(kind: str) -> None:
    """Raises InputError for what is neither a task's name in ``TASKS`` nor an allowed import path."""
    if kind not in TASKS and ":" not in kind:
        raise InputError(f"task: {kind!r} is unknown; known are {', '.join(TASKS)}, or package.module:Class")
    if kind not in TASKS and kind not in _allowed:
        how = f"if you trust it, --allow-code {kind} at the command line, mnemoscope.allow_code in Python"
        raise InputError(f"task: {kind!r} is no built-in task, and importing it would run its code; {how}")


def build_task(kind: str, options: dict[str, Any], seed: int) -> Task:
    """Build a task by its name in ``TASKS``, or a user's own by a path that ``allow_code`` has allowed.

    ``seed`` decides everything that is drawn once for the task; an option ``seed`` overrides it. Raises InputError
    where the task is unknown, is not allowed, cannot be imported, is no task, or refuses an option or its value.
    """
    check_allowed(kind)
    maker: Callable[..., Task] = task_class(kind) if kind in TASKS else _imported(kind)
    accepted, hints = inspect.signature(maker).parameters, get_type_hints(maker) if kind in TASKS else {}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    for option, value in options.items():
        if option not in accepted:
            allowed = ", ".join(name for name in accepted if name != "seed")
            raise InputError(f"task.options.{option}: task {kind!r} has no such option; it has {allowed}")
        if option in hints:
            checked(value, hints[option], f"task.options.{option}")
    if "seed" in accepted:
        options = {"seed": seed, **options}
    try:
        return maker(**options)
    except TypeError as error:
        raise InputError(f"task.options: task {kind!r} refuses {options}: {error}") from error


def named_task(named: Any, options: dict[str, Any], seed: int = 0) -> Task:
    """The task that a user names: one itself, its name, the path of a JSONL file, or a class (whose code is run).

    Raises InputError as ``build_task``, and where there is no such file.
    """
    if isinstance(named, Task):
        return named
    name = str(named)
    if name.endswith(".jsonl"):
        return build_task("jsonl", {"file": name, **options}, seed)
    allow_code(name)
    return build_task(name, options, seed)


def describe_tasks() -> dict[str, str]:
    """The first line of each task's docstring, by name."""
    return {name: (inspect.getdoc(task_class(name)) or "").splitlines()[0] for name in TASKS}


def task_class(name: str) -> type[Task]:
    """The class of a built-in task."""
    found: type[Task] = resolve_name(TASKS[name])
    return found


def _imported(path: str) -> type[Task]:
    """The user's class; one with the methods of a task gets the defaults of ``Task``."""
    try:
        made = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"task: {path!r} cannot be imported ({error})") from error
    if not inspect.isclass(made):
        raise InputError(f"task: {path!r} is no class; a subclass of mnemoscope.Task is wanted")
    if issubclass(made, Task):
        return made
    missing = [name for name in ("training", "examples", "rephrase") if not callable(getattr(made, name, None))]
    if missing:
        raise InputError(f"task: class {path!r} lacks {', '.join(missing)}; make it a subclass of mnemoscope.Task")
    return type(made.__name__, (made, Task), {"__module__": made.__module__})
