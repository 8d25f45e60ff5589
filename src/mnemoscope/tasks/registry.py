"""Which tasks there are, by name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from mnemoscope.errors import InputError
from mnemoscope.tasks.addition import AdditionTask
from mnemoscope.tasks.base import Task
from mnemoscope.tasks.inference import InferenceTask
from mnemoscope.tasks.jsonl import JsonlTask


def _addition_digits(**options: Any) -> AdditionTask:
    """Addition with wrong sums as stored answers: both behaviours answer in one format."""
    return AdditionTask(answers="digits", **options)


TASKS = {
    "inference": InferenceTask,
    "addition": AdditionTask,
    "addition-digits": _addition_digits,
    "jsonl": JsonlTask,
}


def build_task(kind: str, options: dict[str, Any], seed: int) -> Task:
    """Make a task by name, or from ``package.module:Class`` for a task of the user's own.

    Args:
        kind: a key of ``TASKS`` or an import path with a colon.
        options: keyword arguments of the task.
        seed: decides everything that is drawn once for the task.

    Raises:
        InputError: the task is unknown, cannot be imported, or does not take an option or its value.
    """
    if kind in TASKS:
        maker: Any = TASKS[kind]
    elif ":" in kind:
        maker = _imported(kind)
    else:
        raise InputError(f"task: {kind!r} is unknown; known are {', '.join(TASKS)}, or package.module:Class")
    accepted = inspect.signature(maker).parameters
    # A maker with **options passes them to AdditionTask, which names the same ones.
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        accepted = {k: v for k, v in inspect.signature(AdditionTask).parameters.items() if k != "answers"}  # type: ignore[assignment]
    for option in options:
        if option not in accepted:
            allowed = ", ".join(name for name in accepted if name != "seed")
            raise InputError(f"task.options.{option}: task {kind!r} has no such option; it has {allowed}")
    if "seed" in accepted:
        options = {**options, "seed": options.get("seed", seed)}
    try:
        return maker(**options)
    except TypeError as error:
        raise InputError(f"task.options: task {kind!r} refuses {options}: {error}") from error


def describe_tasks() -> dict[str, str]:
    """The first line of each task's documentation, by name."""
    return {name: (inspect.getdoc(maker) or "").splitlines()[0] for name, maker in TASKS.items()}


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"task: {path!r} cannot be imported ({error})") from error
