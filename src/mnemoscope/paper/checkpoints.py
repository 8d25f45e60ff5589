"""A training that was killed goes on where it stopped: weights, optimizers and position in one file.

The file is safetensors; nothing is unpickled. It is written at measurements, so a kill costs the steps since the last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.strict import read_bytes

FACTS = "facts"  # name of the JSON among the metadata


@dataclass
class Checkpoint:
    """The file of an unfinished training.

    Attributes:
        path: of the file.
        of: what the training depends on; a file of another training is not gone on from.
        attempt: number of the training, if several are allowed.
    """

    path: Path
    of: str
    attempt: int = 0

    def attempt_begun(self) -> int:
        """The attempt that an unfinished training is in; 0 without one."""
        return int(self._read()[1].get("attempt", 0))

    def save(self, tensors: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]) -> None:
        """Save a state; of optimizers without what depends on the step alone."""
        from safetensors.torch import save

        for number, optimizer in enumerate(optimizers):
            for place, found in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer{number}/{place}/{key}": value for key, value in found.items()}
        facts = {"of": self.of, "attempt": self.attempt, **facts}
        content = save({name: part.contiguous() for name, part in tensors.items()}, {FACTS: json.dumps(facts)})
        write_atomically(self.path, content)

    def load(self, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of this attempt, and the optimizers as they were; None where none was saved."""
        tensors, facts = self._read()
        if not facts or facts["attempt"] != self.attempt:
            return None
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                owner, _, rest = name.partition("/")
                if owner == f"optimizer{number}":
                    place, _, key = rest.partition("/")
                    state.setdefault(int(place), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return tensors, facts

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
