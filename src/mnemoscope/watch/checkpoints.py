"""The curve of a training that is over, from its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnemoscope.models import load_model, shapes_of
from mnemoscope.report.emergence import draw_curve
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.tasks import named_task
from mnemoscope.watch.curve import PICTURE, Curve
from mnemoscope.watch.measuring import Asked, Watcher

COMMIT = re.compile(r"[0-9a-f]{7,40}")
WEIGHTS = ["*.safetensors", "*.json", "*.txt", "*.model"]  # what of a repository is fetched; nothing is unpickled


def measure_checkpoints(
    checkpoints: Sequence[str], task: Any, options: Mapping[str, Any], out: Path, opening: Mapping[str, Any], **how: Any
) -> Iterator[dict[str, Any]]:
    """Ask each checkpoint, in the order of their steps; yields rows, and writes the table and the picture after each.

    Args:
        checkpoints: folders (of adapters too), the output folder of a trainer, or hub ids with ``@`` and a revision.
            The last number in the name is the step; where none has a number, the place in the list.
        opening: ``dtype``, ``device_map`` and ``tokenizer``; ``how``: fields of ``Asked``.

    Raises:
        InputError: a checkpoint cannot be opened, two have one step, some have none, they are of different
            architectures, or the task has nothing to ask.
    """
    asked = Asked(**how)
    names = [one for name in checkpoints for one in _in_folder(name)]
    steps = steps_of(names)
    folders = [fetched(name) for name in names]
    known = [(name, shapes) for name, folder in zip(names, folders, strict=True) if (shapes := shapes_of(folder))]
    for name, shapes in known:  # names and shapes of weights
        if shapes != known[0][1]:
            raise InputError(f"checkpoints: {name} holds other weights than {known[0][0]}; give those of one training")
    made, curve, before_LD = named_task(task, dict(options)), Curve(), None
    for step, folder in sorted(zip(steps, folders, strict=True)):
        watcher = Watcher(*load_model(folder, **opening), made, asked)
        watcher.direction_LD = before_LD
        curve.add(step, watcher.measure())
        before_LD = watcher.direction_LD
        curve.save(out)
        draw_curve(curve.table, out / PICTURE)
        yield curve.rows[-1]


def _in_folder(name: str) -> list[str]:
    """The checkpoints in the output folder of a trainer, or a checkpoint itself."""
    inside = [str(path) for path in sorted(Path(name).glob("checkpoint-*")) if path.is_dir()]
    return inside or [name]


def steps_of(names: Sequence[str]) -> list[int]:
    """The step of each checkpoint by its name, or their places; InputError where some have none, or two the same."""
    steps = [_step_of(name) for name in names]
    if None in steps and any(step is not None for step in steps):
        name = names[steps.index(None)]
        raise InputError(f"checkpoints: {name} does not end in its step, and others do; give all steps, or none")
    found = [n if step is None else step for n, step in enumerate(steps)]
    twice = next((step for step in found if found.count(step) > 1), None)
    if twice is not None:
        raise InputError(f"checkpoints: two of them are of step {twice}; give names that end in their steps")
    return found


def _step_of(name: str) -> int | None:
    """The step in the name of a checkpoint; a commit's hash has none."""
    last = name.rpartition("@")[2] if "@" in name else Path(name).name if Path(name).exists() else ""
    numbers = re.findall(r"\d+", last)
    return int(numbers[-1]) if numbers and (last.isdigit() or not COMMIT.fullmatch(last)) else None


def fetched(name: str) -> str:
    """A folder with a checkpoint; that of a revision is fetched from the hub. InputError where that fails."""
    repository, at, revision = name.partition("@")
    if Path(name).exists() or not at:
        return name
    from huggingface_hub import snapshot_download

    with refusing(f"checkpoints: {name} cannot be fetched"):
        return snapshot_download(repository, revision=revision, allow_patterns=WEIGHTS)
