"""The curve of a training that is over, from its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnemoscope.emergence.curve import PICTURE, Curve
from mnemoscope.emergence.measuring import Watcher
from mnemoscope.errors import InputError
from mnemoscope.models import load_model
from mnemoscope.report.emergence import draw_curve
from mnemoscope.tasks import SPLITS, named_task

WEIGHTS = ["*.safetensors", "*.json", "*.txt", "*.model"]  # what of a repository is fetched; nothing is unpickled


def measure_checkpoints(
    checkpoints: Sequence[str],
    task: str,
    options: Mapping[str, Any],
    out: Path,
    opening: Mapping[str, Any],
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """Ask each checkpoint, in the order of their steps; yields rows, and writes the table and the picture after each.

    Args:
        checkpoints: folders (of adapters too), or hub ids with ``@`` and a revision. The last number in the name of a
            folder, or in the revision, is its step; without one its place in the list.
        opening: ``dtype`` and ``device_map``; ``how``: arguments of ``Watcher``.

    Raises:
        InputError: a checkpoint cannot be opened, two have one step, or the task has nothing to ask.
    """
    if how.get("split", "tune") not in SPLITS:
        raise InputError(f"split: {how['split']!r} is not one of {', '.join(SPLITS)}")
    steps = [step_of(name, place) for place, name in enumerate(checkpoints)]
    twice = next((name for step, name in zip(steps, checkpoints, strict=True) if steps.count(step) > 1), None)
    if twice is not None:
        raise InputError(
            f"checkpoints: two of them are of step {step_of(twice, 0)}; give names that end in their steps"
        )
    made, curve = named_task(task, dict(options)), Curve()
    for step, name in sorted(zip(steps, checkpoints, strict=True)):
        watcher = Watcher(*load_model(fetched(name), **opening), made, **how)
        curve.add(step, watcher.measure())
        curve.save(out)
        draw_curve(curve.table, out / PICTURE)
        yield curve.rows[-1]


def step_of(name: str, place: int) -> int:
    """The step in the name of a checkpoint, or its place."""
    last = name.rpartition("@")[2] if "@" in name else Path(name).name
    numbers = re.findall(r"\d+", last)
    return int(numbers[-1]) if numbers and ("@" in name or Path(name).exists()) else place


def fetched(name: str) -> str:
    """A folder with a checkpoint; that of a revision is fetched from the hub. InputError where that fails."""
    repository, at, revision = name.partition("@")
    if Path(name).exists() or not at:
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repository, revision=revision, allow_patterns=WEIGHTS)
    except Exception as error:  # the hub's client has many kinds, and those of its HTTP library
        raise InputError(f"checkpoints: {name} cannot be fetched ({str(error).splitlines()[0]})") from error
