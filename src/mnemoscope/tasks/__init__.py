"""Tasks: data on which the answer itself reveals whether a model remembered or generalized."""

from mnemoscope.tasks.base import (
    KINDS,
    SPLITS,
    Example,
    Instance,
    Kind,
    Split,
    Task,
    answer_of,
    assign_splits,
    check_groups,
    draw,
    draws,
    keeps_key,
)
from mnemoscope.tasks.registry import TASKS, build_task, describe_tasks

__all__ = [
    "KINDS",
    "SPLITS",
    "TASKS",
    "Example",
    "Instance",
    "Kind",
    "Split",
    "Task",
    "answer_of",
    "assign_splits",
    "build_task",
    "check_groups",
    "describe_tasks",
    "draw",
    "draws",
    "keeps_key",
]
