"""A training that was killed goes on where it stopped: weights, optimizers and position in one file.

The file is safetensors; nothing is unpickled. It is written at measurements, and as seldom as keeps the cost below
``SHARE`` of the training, so a kill costs at most a few measurements.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.strict import read_bytes

SHARE = 0.05  # part of the time of a training, at most, that saving takes
FACTS = "facts"  # name of the JSON among the metadata


@dataclass
class Checkpoint:
    """The file of an unfinished training.

    Attributes:
        path: of the file.
        of: what the training depends on; a file of another training is not gone on from.
        attempt: number of the training, if several are allowed.
        share: part of the time of a training, at most, that saving takes.
    """

    path: Path
    of: str
    attempt: int = 0
    share: float = SHARE
    _next: float = field(default=0.0, repr=False)

    def attempt_begun(self) -> int:
        """The attempt that an unfinished training is in; 0 without one."""
        facts = self._read()[1]
        return int(facts["attempt"]) if facts else 0

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save a state, unless the last one was saved a short while ago."""
        from safetensors.torch import save

        began = time.monotonic()
        if began < self._next:
            return
        facts = {"of": self.of, "attempt": self.attempt, **facts}
        content = save({name: part.contiguous() for name, part in tensors.items()}, {FACTS: json.dumps(facts)})
        write_atomically(self.path, content)
        ended = time.monotonic()
        self._next = ended + (ended - began) / self.share

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of this attempt; None where none was saved."""
        tensors, facts = self._read()
        return (tensors, facts) if facts and facts["attempt"] == self.attempt else None

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not self.path.is_file():
            return {}, {}
        content = read_bytes(self.path, "training")
        try:
            length = int.from_bytes(content[:8], "little")
            facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][FACTS])
            return (load(content), facts) if facts["of"] == self.of else ({}, {})
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"training: {self.path} is damaged; delete it to train from the beginning") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """The state of an optimizer, by name; what depends on the step alone is left out."""
    state = optimizer.state_dict()["state"]
    return {f"{name}/{place}/{key}": value for place, found in state.items() for key, value in found.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, name: str, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        owner, _, rest = full.partition("/")
        if owner == name:
            place, _, key = rest.partition("/")
            state.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
