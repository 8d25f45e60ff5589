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
from mnemoscope.strict import read_json
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
        InputError: a checkpoint cannot be opened, two have one step, they are of different architectures, or the task
            has nothing to ask.
    """
    if how.get("split", "tune") not in SPLITS:
        raise InputError(f"split: {how['split']!r} is not one of {', '.join(SPLITS)}")
    steps = [step_of(name, place) for place, name in enumerate(checkpoints)]
    twice = next((name for step, name in zip(steps, checkpoints, strict=True) if steps.count(step) > 1), None)
    if twice is not None:
        raise InputError(
            f"checkpoints: two of them are of step {step_of(twice, 0)}; give names that end in their steps"
        )
    _check_alike(checkpoints)
    made, curve = named_task(task, dict(options)), Curve()
    before_LD = None
    for step, name in sorted(zip(steps, checkpoints, strict=True)):
        watcher = Watcher(*load_model(fetched(name), **opening), made, **how)
        watcher.direction_LD = before_LD
        curve.add(step, watcher.measure())
        before_LD = watcher.direction_LD
        curve.save(out)
        draw_curve(curve.table, out / PICTURE)
        yield curve.rows[-1]


def step_of(name: str, place: int) -> int:
    """The step in the name of a checkpoint, or its place."""
    last = name.rpartition("@")[2] if "@" in name else Path(name).name
    numbers = re.findall(r"\d+", last)
    return int(numbers[-1]) if numbers and ("@" in name or Path(name).exists()) else place


def _check_alike(names: Sequence[str]) -> None:
    """Raises InputError where folders hold models of different shapes; what is fetched later is not looked at."""
    shapes = {name: _shape_of(Path(name)) for name in names}
    known = {name: shape for name, shape in shapes.items() if shape}
    first, *others = known.items() if known else [("", "")]
    for name, shape in others:
        if shape != first[1]:
            raise InputError(
                f"checkpoints: {name} holds {shape}, and {first[0]} {first[1]}; give those of one training"
            )


def _shape_of(folder: Path) -> str:
    """The architecture in the configuration of a folder, in words; an adapter's is that of the model it names."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        facts = read_json(adapter, dict[str, Any])
        return f"an adapter ({facts.get('peft_type')}) of {facts.get('base_model_name_or_path')}"
    if not (folder / "config.json").is_file():
        return ""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        return f"a {config.model_type} of {config.num_hidden_layers} layers x {config.hidden_size}"
    except (OSError, ValueError, KeyError, AttributeError):
        return ""  # opening it says what is wrong


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
