"""Tasks: data on which the answer reveals whether a model memorized or generalized."""

from mnemoscope.tasks.base import (
    KINDS,
    SPLITS,
    Example,
    Instance,
    Kind,
    Side,
    Split,
    Task,
    answer_of,
    as_bare,
    draw,
    draws,
    examples_digest,
)
from mnemoscope.tasks.registry import (
    TASKS,
    allow_code,
    allowed_code,
    build_task,
    check_allowed,
    describe_tasks,
    described_task,
    named_task,
)
