"""What a request asks for, how it is refused, and the key that keeps its cached blocks apart. Imports no vLLM.

A request asks by ``extra_args`` (``vllm_xargs`` over HTTP): ``steer``, ``alpha``, ``gate`` and ``read``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mnemoscope.face.fitted import known_behaviour
from mnemoscope.interventions import SteeringVector, Toward
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.serving.offered import Offered

FIELDS = ("steer", "alpha", "gate", "read")
ADMITTED = "mnemoscope"  # the key of ``extra_args`` under which an admitted request is carried inside the engine
OTHER_WORDS = ("toward", "towards", "direction", "strength")  # by which somebody may ask for steering
MOST_ALPHA = 100.0  # beyond it a shift may be no number in half precision, nor may what other requests read then
# What vLLM itself and its models take there; names that are near to ours, and are none of these, are refused.
OF_VLLM = (
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_cache_report_mode",
    "session_id",
    "ngram_size",
    "window_size",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, with defaults filled in."""

    steer: Toward | None = None
    alpha: float = 1.0
    gate: float | None = None
    read: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that can be served, as every process of the engine sees it.

    Attributes:
        asked: its settings; ``steer`` is None where alpha is 0.
        decision: position of the last prompt token, from which on ``decision`` vectors act.
        start: the first position that is shifted; None where none is.
        vector: digest of the vector; ``gate_by``, ``read_by``: names of detectors.
        key: of its cached blocks from ``start`` on; None where nothing is shifted.
        detectors: digests of the detectors, by name.
    """

    asked: Asked
    decision: int
    start: int | None = None
    vector: str | None = None
    gate_by: str | None = None
    read_by: str | None = None
    key: str | None = None
    detectors: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """As JSON; ``of`` reads it back."""
        return asdict(self)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Admitted:
        """From ``facts``."""
        return cls(**{**facts, "asked": Asked(**facts["asked"])})


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
        if name not in FIELDS and name not in OF_VLLM and meant:
            raise InputError(f"{name}: is no setting; did you mean {meant}?")
    if not any(name in given for name in FIELDS):
        return None
    toward = None if given.get("steer") is None else _behaviour(given["steer"])
    for name in ("alpha", "gate"):
        if given.get(name) is not None and toward is None:
            raise InputError(f"{name}: {given[name]!r} is given without steer; say which way")
    alpha = 1.0 if given.get("alpha") is None else _number("alpha", given["alpha"], MOST_ALPHA)
    gate = None if given.get("gate") is None else _number("gate", given["gate"], 1.0)
    read = given.get("read")
    if not (read is None or (isinstance(read, bool | int | float) and read in (0, 1))):  # HTTP makes true a 1
        raise InputError(f"read: {read!r} is not one of true, false")
    return Asked(toward, alpha, gate, bool(read))


def other_word(name: Any) -> bool:
    """Whether a setting's name is another word for ``steer``."""
    said = str(name).lower()
    return said != "steer" and ("steer" in said or said in OTHER_WORDS)


def served_by(asked: Asked, offered: Offered) -> tuple[SteeringVector | None, str | None, str | None]:
    """The vector of a request, and the names of the detectors that gate and read it; InputError without one."""
    vector = offered.vector(asked.steer) if asked.steer else None
    gate_by = offered.gate_for(vector) if vector and asked.gate is not None else None
    read_by = offered.reader_for(vector if asked.alpha else None) if asked.read else None
    return vector, gate_by, read_by


def admit(asked: Asked, offered: Offered, prompt: Sequence[int] | None, length: int) -> Admitted:
    """Check a request against what the server has and how its prompt begins.

    Args:
        prompt: token ids, None where the prompt is given as embeddings.
        length: of the prompt, in tokens.

    Raises InputError where it cannot be served as asked; the field is named.
    """
    vector, gate_by, read_by = served_by(asked, offered)
    decision, start, key = length - 1, None, None
    if vector and prompt is None:
        raise InputError("steer: the prompt is given as embeddings; give it as text or tokens")
    if vector and prompt is not None and tuple(prompt[: len(vector.opening)]) != vector.opening:
        raise InputError(
            "steer: the prompt is not formatted by the chat template, as those were that the vector was fitted on; use "
            "the chat route with the same system message"
        )
    if asked.alpha == 0:
        asked, vector, gate_by = Asked(read=asked.read), None, None
    digest = None
    if vector and asked.steer:
        start = 0 if vector.positions == "all" else decision
        digest = offered.digests[asked.steer]
        parts = [digest, asked.alpha, asked.gate, gate_by and offered.digests[gate_by], start]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    digests = {name: offered.digests[name] for name in (gate_by, read_by) if name}
    return Admitted(asked, decision, start, digest, gate_by, read_by, key, digests)


def key_of_block(extra_args: Mapping[str, Any] | None, end: int) -> tuple[str, str] | None:
    """The key of a cached block that ends before position ``end``; None where no shift touched it.

    Blocks before the first shifted position have none, so what unsteered requests computed of a prompt is used. The key
    holds that position: the same tokens, as the answer to one prompt and as part of another, are not the same values.
    """
    facts = (extra_args or {}).get(ADMITTED)
    if not facts or facts["key"] is None or end <= facts["start"]:
        return None
    return ADMITTED, facts["key"]


def _behaviour(value: Any) -> Toward:
    try:
        return known_behaviour(value)
    except (InputError, TypeError):
        allowed = "generalized, memorized; of documents: context, memory"
        raise InputError(f"steer: {value!r} is not one of {allowed}") from None


def _number(name: str, value: Any, most: float) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or not 0 <= value <= most:
        raise InputError(f"{name}: {value!r} is not a number in 0 .. {most:g}")
    return float(value)
