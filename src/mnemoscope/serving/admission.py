"""What a server offers, what requests ask of it, how they are refused, and the key of their cached blocks.

A request asks by ``extra_args`` (``vllm_xargs`` over HTTP): ``steer``, ``alpha``, ``gate`` and ``read``. No vLLM here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mnemoscope.face.stored import artefacts_of, vectors_of
from mnemoscope.interventions import Binding, SteeringVector, Toward
from mnemoscope.interventions.detect import Detector
from mnemoscope.runs.errors import InputError

ENVIRONMENT = "MNEMOSCOPE_RUN"  # names what a server has
FIELDS = ("steer", "alpha", "gate", "read")
ADMITTED = "mnemoscope"  # the key of ``extra_args`` under which an admitted request is carried inside the engine
OTHER_WORDS = ("toward", "towards", "direction", "strength")  # by which somebody may ask for steering
MOST_ALPHA = 100.0  # beyond it a shift may be no number in half precision, nor may what other requests read then


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, with defaults filled in."""

    steer: Toward | None = None
    alpha: float = 1.0
    gate: float | None = None
    read: bool = False


@dataclass(frozen=True, slots=True)
class Admitted(Asked):
    """A request that can be served, as every process of the engine sees it; ``steer`` is None where alpha is 0.

    Attributes:
        decision: position of the last prompt token, from which on ``decision`` vectors act.
        start: the first position that is shifted; None where none is.
        gate_by, read_by: names of detectors.
    """

    decision: int = 0
    start: int | None = None
    gate_by: str | None = None
    read_by: str | None = None


@dataclass(frozen=True)
class Offered:
    """What was fitted on the model that is served.

    Attributes:
        vectors: by the behaviour they steer to.
        detectors: ``detector``, and ``lower`` at or below the first shifted layer, where they exist.
    """

    vectors: Mapping[Toward, SteeringVector]
    detectors: Mapping[str, Detector]

    @classmethod
    def of(cls, vectors: Mapping[Toward, SteeringVector], detector: Detector | None, lower: Detector | None) -> Offered:
        """Of a run's vectors and detectors."""
        return cls(vectors, {name: one for name, one in (("detector", detector), ("lower", lower)) if one})

    @classmethod
    def open(cls, source: str | Path, binding: Binding) -> Offered:
        """Open what was fitted on the model of a binding: a run, a cell, or the file of a vector or detector.

        Raises:
            InputError: there is nothing, it is damaged, or was fitted on another model (the field is named).
        """
        source = Path(source)
        if not source.exists():
            raise InputError(f"{ENVIRONMENT}: {source} does not exist")
        levers, *detectors = artefacts_of(source, binding, only_vectors=True)
        offered = cls.of(vectors_of(levers), *detectors)
        for artefact in offered.artefacts.values():
            if artefact.binding is None:
                raise InputError(f"binding: the {artefact.WHAT} of {source} does not say which model it was made on")
            artefact.binding.check(binding, artefact.WHAT)
        return offered

    @property
    def artefacts(self) -> dict[str, SteeringVector | Detector]:
        """All of them, by direction and name."""
        return dict([*self.vectors.items(), *self.detectors.items()])

    @property
    def digest(self) -> str:
        """SHA-256 of all tensors, and of where they act."""
        digest = hashlib.sha256()
        for name, artefact in self.artefacts.items():
            where = [str(getattr(artefact, part, "")) for part in ("site", "positions", "layer", "conflict_bias")]
            digest.update("|".join([name, *where]).encode())
            for part, tensor in sorted(artefact.tensors().items()):
                digest.update(part.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def below(self, vector: SteeringVector | None, setting: str) -> str | None:
        """The detector for ``gate`` or ``read`` whose states a vector leaves as they are; None without one."""
        order = ("lower", "detector") if setting == "gate" else ("detector", "lower")
        there = [name for name in order if name in self.detectors]
        if vector:
            gates = {name: self.detectors[name].gate(vector.toward, 0.5) for name in there if not vector.everywhere}
            there = [name for name, gate in gates.items() if gate.is_below(vector.site, vector.layers[0])]
        return next(iter(there), None)

    def serving(self, asked: Asked) -> tuple[SteeringVector | None, str | None, str | None]:
        """The vector of a request, and the detectors that gate and read it; InputError where one is not there."""
        vector = self.vectors.get(asked.steer) if asked.steer else None
        if asked.steer and not vector:
            there = ", ".join(self.vectors) or "none"
            raise InputError(f"steer: this server has no vector to {asked.steer}; it has {there}")
        found: dict[str, str | None] = {"gate": None, "read": None}
        for name, wanted in (("gate", vector and asked.gate is not None), ("read", asked.read)):
            shifts = vector if name == "gate" or asked.alpha else None
            found[name] = self.below(shifts, name) if wanted else None
            if wanted and found[name] is None:
                raise InputError(f"{name}: {self._none_below(shifts)}")
        return vector, found["gate"], found["read"]

    def _none_below(self, vector: SteeringVector | None) -> str:
        if not vector or not self.detectors:
            return "this server has no detector; fit one with `mnemoscope fit` and serve its run"
        read = ", ".join(f"{one.site} {one.layer}" for one in self.detectors.values())
        where = "every token of the prompt" if vector.everywhere else f"{vector.site} {vector.layers[0]} and above"
        other = "fit one with detection.fitted: true, or read first and steer in a second request"
        return f"the detector reads {read}, this vector shifts {where}; {other}"


def parse(extra_args: Mapping[str, Any] | None) -> Asked | None:
    """What a request asks for; None where it asks for nothing.

    Raises InputError where a value is not allowed, a field is missing, or a name is near to one of ours or another word
    for steering.
    """
    given = extra_args or {}
    if ADMITTED in given:
        raise InputError(f"{ADMITTED}: is set by the server alone; allowed are {', '.join(FIELDS)}")
    for name in given:
        near = get_close_matches(str(name).lower(), FIELDS, 1, cutoff=0.8)
        meant = near[0] if near else "steer" if other_word(name) else None
        if name not in FIELDS and meant:
            raise InputError(f"{name}: is no setting; did you mean {meant}?")
    asked = {name: given[name] for name in FIELDS if given.get(name) is not None}
    if not any(name in given for name in FIELDS):
        return None
    for name, most in (("alpha", MOST_ALPHA), ("gate", 1.0)):
        if name not in asked:
            continue
        value = asked[name]
        if "steer" not in asked:
            raise InputError(f"{name}: {value!r} is given without steer; say which way")
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        if wrong or not 0 <= value <= most:
            raise InputError(f"{name}: {value!r} is not a number in 0 .. {most:g}")
        asked[name] = float(value)
    if "steer" in asked:
        asked["steer"] = Toward.of(asked["steer"], "steer")
    read = asked.pop("read", False)
    if not isinstance(read, bool | int | float) or read not in (0, 1):  # HTTP makes true a 1
        raise InputError(f"read: {read!r} is not one of true, false")
    return Asked(**asked, read=bool(read))


def other_word(name: Any) -> bool:
    """Whether a setting's name is another word for ``steer``."""
    said = str(name).lower()
    return said != "steer" and ("steer" in said or said in OTHER_WORDS)


def refuse_unoffered(given: Mapping[str, Any]) -> None:
    """Raises InputError for a request that asks a server that has nothing; other plugins may use the other names."""
    for name in ("steer", ADMITTED):
        if name in given:
            raise InputError(f"{name}: this server has no vectors; start it with {ENVIRONMENT}=RUN")


def admit(asked: Asked, offered: Offered, prompt: Sequence[int] | None, length: int) -> Admitted:
    """Check a request against what the server has and how its prompt begins.

    Args:
        prompt: token ids, None where the prompt is given as embeddings.
        length: of the prompt, in tokens.

    Raises InputError where it cannot be served as asked; the field is named.
    """
    vector, gate_by, read_by = offered.serving(asked)
    if vector and prompt is None:
        raise InputError("steer: the prompt is given as embeddings; give it as text or tokens")
    if vector and prompt is not None and tuple(prompt[: len(vector.opening)]) != vector.opening:
        raise InputError(
            "steer: the prompt is not formatted by the chat template, as those were that the vector was fitted on; use "
            "the chat route with the same system message"
        )
    given = asdict(asked) if asked.alpha else {"read": asked.read}
    start = None if not vector or not asked.alpha else 0 if vector.everywhere else length - 1
    return Admitted(
        **given, decision=length - 1, start=start, gate_by=gate_by if asked.alpha else None, read_by=read_by
    )


def key_of_block(extra_args: Mapping[str, Any] | None, end: int) -> tuple[str, str] | None:
    """The key of a cached block that ends before position ``end``; None where no shift touched it.

    Blocks before the first shifted position have none, so what unsteered requests computed of a prompt is used. The key
    holds that position: the same tokens, as the answer to one prompt and as part of another, are not the same values.
    """
    facts = (extra_args or {}).get(ADMITTED)
    if not facts or facts["start"] is None or end <= facts["start"]:
        return None
    return ADMITTED, json.dumps([facts[name] for name in ("steer", "alpha", "gate", "start")])
