"""The vectors and detectors that a server has. Imports no vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mnemoscope.face.fitted import artefacts_of
from mnemoscope.interventions import Artefact, Binding, Gate, SteeringVector, Toward
from mnemoscope.interventions.detect import Detector
from mnemoscope.models import load_model
from mnemoscope.runs.errors import InputError


@dataclass(frozen=True)
class Offered:
    """What was fitted on the model that is served.

    Attributes:
        source: the run, cell or file that they come from.
        binding: of the model.
        vectors: by the behaviour they steer to.
        detectors: ``detector``, and ``lower`` at or below the first shifted layer, where they exist.
    """

    source: Path
    binding: Binding
    vectors: Mapping[Toward, SteeringVector]
    detectors: Mapping[str, Detector]

    @classmethod
    def open(cls, source: str | Path, binding: Binding) -> Offered:
        """Open what was fitted on the model of a binding.

        Raises:
            InputError: there is nothing, it is damaged, or was fitted on another model (the field is named).
        """
        source = Path(source)
        if not source.exists():
            raise InputError(f"MNEMOSCOPE_RUN: {source} does not exist")
        vectors, detector, lower = artefacts_of(source, binding)
        named = {"detector": detector, "lower": lower}
        detectors = {name: one for name, one in named.items() if one}
        for artefact in (*vectors.values(), *detectors.values()):
            if artefact.binding is None:
                raise InputError(f"binding: the {artefact.WHAT} of {source} does not say which model it was made on")
            artefact.binding.check(binding, artefact.WHAT)
        return cls(source, binding, vectors, detectors)

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of the tensors, and of where they act, by direction and detector."""
        return {name: _digest(artefact) for name, artefact in (*self.vectors.items(), *self.detectors.items())}

    def vector(self, toward: Toward) -> SteeringVector:
        """The vector that steers to a behaviour; InputError without one."""
        if toward not in self.vectors:
            raise InputError(
                f"steer: this server has no vector to {toward}; it has {', '.join(self.vectors) or 'none'}"
            )
        return self.vectors[toward]

    def gate_for(self, vector: SteeringVector) -> str:
        """The detector that decides in the pass that a vector shifts; InputError without one."""
        if vector.positions == "all":
            raise InputError(
                "gate: this vector shifts every token of the prompt, before a detector has read its end; read first, "
                "and steer in a second request, or serve a vector with positions: decision"
            )
        if not self.detectors:
            raise InputError("gate: this server has no detector; fit one with `mnemoscope fit` and serve its run")
        found = self._below(vector, ("lower", "detector"))
        if found is None:
            raise InputError(f"gate: {self._too_high(vector)}")
        return found

    def reader_for(self, vector: SteeringVector | None) -> str:
        """The detector that reads a prompt; of a steered one, one that the shift does not reach; InputError without."""
        if not self.detectors:
            raise InputError("read: this server has no detector; fit one with `mnemoscope fit` and serve its run")
        if vector is None:
            return next(iter(self.detectors))
        found = None if vector.positions == "all" else self._below(vector, ("detector", "lower"))
        if found is None:
            raise InputError(f"read: {self._too_high(vector)}, or read without steer")
        return found

    def _below(self, vector: SteeringVector, order: tuple[str, ...]) -> str | None:
        """The first of some detectors whose states a vector leaves as they are."""
        there = ((name, self.detectors[name]) for name in order if name in self.detectors)
        first = vector.layers[0]
        return next(
            (name for name, d in there if Gate(d.site, d.layer, lambda x: x).is_below(vector.site, first)), None
        )

    def _too_high(self, vector: SteeringVector) -> str:
        read = ", ".join(f"{d.site} {d.layer}" for d in self.detectors.values())
        first = f"{vector.site} {vector.layers[0]}"
        return (
            f"the detector reads {read}, which this vector shifts from {first} on; fit one with detection.fitted: true"
        )


def binding_of(folder: str) -> Binding:
    """Fingerprint of the checkpoint that is served, which is opened for it once, in the precision it was saved in."""
    return Binding.of(*load_model(folder, dtype="auto"))


def _digest(artefact: Artefact) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(artefact.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    where = [str(getattr(artefact, name, "")) for name in ("site", "positions", "layer", "conflict_bias")]
    digest.update("|".join(where).encode())
    return digest.hexdigest()
