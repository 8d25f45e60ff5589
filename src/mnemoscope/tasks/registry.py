"""Built-in tasks by name, and a user's own tasks by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from mnemoscope.errors import InputError
from mnemoscope.tasks.addition import AdditionDigitsTask, AdditionTask
from mnemoscope.tasks.base import Task
from mnemoscope.tasks.cipher import CipherTask
from mnemoscope.tasks.facts import FactsTask
from mnemoscope.tasks.inference import InferenceTask
from mnemoscope.tasks.joint import JointTask
from mnemoscope.tasks.jsonl import JsonlTask

DEFAULT_PARTS: dict[str, dict[str, Any]] = {"inference": {}, "addition-digits": {}, "cipher": {}}


def _joint(
    *,
    parts: dict[str, dict[str, Any]] | None = None,
    shares: dict[str, float] | None = None,
    first: dict[str, int] | None = None,
    seed: int = 0,
) -> JointTask:
    """Several tasks for one model, each with its own stored answers.

    Args:
        parts: options of each task, by its name.
        shares: parts of the training instances, by name; they add up to 1. Default: equal.
        first: by name, how many instances of a part come before all parts are mixed.
        seed: that of every part, so that each is the task it would be alone.

    Raises:
        InputError: a part is no task to train on, or ``shares`` or ``first`` do not fit the parts.
    """
    parts = DEFAULT_PARTS if parts is None else parts
    if not isinstance(parts, dict) or not all(isinstance(o, dict | None) for o in parts.values()):
        raise InputError(f"parts: {parts!r} is not a mapping of task names to their options")
    if "joint" in parts:
        raise InputError("parts: 'joint' cannot be a part of itself")
    return JointTask({name: build_task(name, options or {}, seed) for name, options in parts.items()}, shares, first)


TASKS: dict[str, Callable[..., Task]] = {
    "inference": InferenceTask,
    "addition": AdditionTask,
    "addition-digits": AdditionDigitsTask,
    "cipher": CipherTask,
    "joint": _joint,
    "facts": FactsTask,
    "jsonl": JsonlTask,
}


def build_task(kind: str, options: dict[str, Any], seed: int) -> Task:
    """Build a task by its name in ``TASKS``, or a user's own by ``package.module:Class``.

    ``seed`` decides everything that is drawn once for the task; an option ``seed`` overrides it.

    Raises:
        InputError: the task is unknown, cannot be imported, is no task, or refuses an option or its value.
    """
    if kind not in TASKS and ":" not in kind:
        raise InputError(f"task: {kind!r} is unknown; known are {', '.join(TASKS)}, or package.module:Class")
    maker = TASKS[kind] if kind in TASKS else _imported(kind)
    accepted = inspect.signature(maker).parameters
    for option in options:
        if option not in accepted:
            allowed = ", ".join(name for name in accepted if name != "seed")
            raise InputError(f"task.options.{option}: task {kind!r} has no such option; it has {allowed}")
    if "seed" in accepted:
        options = {**options, "seed": options.get("seed", seed)}
    try:
        made = maker(**options)
    except TypeError as error:
        raise InputError(f"task.options: task {kind!r} refuses {options}: {error}") from error
    if not isinstance(made, Task):
        raise InputError(f"task: {kind!r} makes a {type(made).__name__}, which is no subclass of mnemoscope.Task")
    return made


def describe_tasks() -> dict[str, str]:
    """The first line of each task's docstring, by name."""
    return {name: (inspect.getdoc(maker) or "").splitlines()[0] for name, maker in TASKS.items()}


def _imported(path: str) -> Callable[..., Any]:
    """The user's class or function; a class with the methods of a task gets the defaults of ``Task``."""
    module, _, attribute = path.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"task: {path!r} cannot be imported ({error})") from error
    if not inspect.isclass(made) or issubclass(made, Task):
        return made
    missing = [name for name in ("training", "examples", "rephrase") if not callable(getattr(made, name, None))]
    if missing:
        raise InputError(f"task: class {path!r} lacks {', '.join(missing)}; make it a subclass of mnemoscope.Task")
    return type(made.__name__, (made, Task), {"__module__": made.__module__})
