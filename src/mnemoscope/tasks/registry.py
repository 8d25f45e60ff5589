"""Built-in tasks by name, and a user's own tasks by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_type_hints

from mnemoscope.runs.errors import InputError, meant
from mnemoscope.runs.strict import checked
from mnemoscope.tasks.base import Task

TASKS = {  # where the class of each built-in task is
    "inference": "mnemoscope.paper.inference:InferenceTask",
    "addition": "mnemoscope.paper.stored:AdditionTask",
    "addition-digits": "mnemoscope.paper.stored:AdditionDigitsTask",
    "cipher": "mnemoscope.paper.stored:CipherTask",
    "joint": "mnemoscope.tasks.joint:JointTask",
    "facts": "mnemoscope.tasks.facts:FactsTask",
    "memotrap": "mnemoscope.tasks.memotrap:MemotrapTask",
    "pararel": "mnemoscope.tasks.pararel:PararelTask",
    "qa": "mnemoscope.tasks.qa:QATask",
    "jsonl": "mnemoscope.tasks.jsonl:JsonlTask",
}


# Columns of the two answers beside a question and a passage: the passage's, and memory's.
TWO_ANSWERS = (("context_answer", "memory_answer"), ("passage_answer", "memory_answer"), ("generalized", "memorized"))
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
        known = f"known are {', '.join(TASKS)}, files (.jsonl, .csv, .parquet, .json), or package.module:Class"
        raise InputError(f"task: {kind!r} is unknown; {known}{meant(kind, TASKS)}")
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
            has = f"it has {allowed}{meant(option, accepted)}"
            raise InputError(f"task.options.{option}: task {kind!r} has no such option; {has}")
        if option in hints:
            checked(value, hints[option], f"task.options.{option}")
    if "seed" in accepted:
        options = {"seed": seed, **options}
    try:
        return maker(**options)
    except TypeError as error:
        raise InputError(f"task.options: task {kind!r} refuses {options}: {error}") from error


def described_task(name: str) -> tuple[str, dict[str, Any]]:
    """The kind and options of what a user names: a kind itself, a class (whose code may then run), or a file of rows.

    A file is a task by its columns: questions with passages and two answers are ``qa``, others ``jsonl``. Raises
    InputError where the kind is unknown, or there is no such file.
    """
    from mnemoscope.tasks.tables import columns_of, is_file_of_rows

    if not is_file_of_rows(name):
        allow_code(*[name] if ":" in name else [])  # it is the user who names it
        check_allowed(name)
        return name, {}
    if not Path(name).is_file():
        raise InputError(f"task: the file {name} does not exist{meant(name, map(str, Path(name).parent.glob('*.*')))}")
    columns = columns_of(name)
    answers = next((two for two in TWO_ANSWERS if set(two) <= set(columns)), None)
    passage = next((one for one in ("passage", "context") if one in columns), None)
    if "question" not in columns or passage is None or answers is None:
        return "jsonl", {"file": name}
    return "qa", {"file": name, "context": passage, "context_answer": answers[0], "memory_answer": answers[1]}


def named_task(named: Any, options: dict[str, Any], seed: int = 0) -> Task:
    """The task that a user names: one itself, or what ``described_task`` takes; errors as it, and as ``build_task``."""
    if isinstance(named, Task):
        return named
    kind, given = described_task(str(named))
    return build_task(kind, given | options, seed)


def describe_tasks() -> dict[str, str]:
    """The first line of each task's docstring, by name."""
    return {name: (inspect.getdoc(task_class(name)) or "").splitlines()[0] for name in TASKS}


def task_class(name: str) -> type[Task]:
    """The class of a built-in task."""
    return resolve_name(TASKS[name])


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
