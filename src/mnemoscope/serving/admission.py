"""What a server offers, what requests ask of it, how they are refused, and the key of their cached blocks.

A request asks by ``extra_args`` (``vllm_xargs`` over HTTP), see ``FIELDS``. No vLLM here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mnemoscope.face.stored import artefacts_of, reader_of
from mnemoscope.interventions import Binding, Intervention, SteeringVector, Toward
from mnemoscope.interventions.adapter import Adapter
from mnemoscope.interventions.detect import Detector
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from mnemoscope.auditing.origins import Reader

ENVIRONMENT = "MNEMOSCOPE_RUN"  # names what a server has
QUANTIZATION = "quantization_config_dict_json"  # of ``hf_overrides``: how torchao quantizes, as vLLM is told
FIELDS = ("steer", "lever", "alpha", "gate", "read", "document")
TOKENS = "tokens"  # what ``read`` may be beside true, and what a report has then
ADMITTED = "mnemoscope"  # the key of ``extra_args`` under which an admitted request is carried inside the engine
OTHER_WORDS = ("toward", "towards", "direction", "strength")  # by which somebody may ask for steering
MOST_ALPHA = 100.0  # beyond it a shift may be no number in half precision, nor may what other requests read then
PASSES = 2  # over a prompt, where a gate decides before what acts on every token of it
BEFOREHAND = "what acts on every token is gated by a pass beforehand, which servers make; in Python, read first"
COPIES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of an adapter: an engine knows each strength as an adapter of its own


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, with defaults filled in."""

    steer: Toward | None = None
    alpha: float = 1.0
    gate: float | None = None
    read: bool | Literal["tokens"] = False
    lever: str | None = None
    document: str | None = None


@dataclass(frozen=True, slots=True)
class Admitted(Asked):
    """A request that can be served, as every process of the engine sees it; ``steer`` is None where alpha is 0.

    ``lever`` is the one that acts.

    Attributes:
        decision: position of the last prompt token, from which on ``decision`` vectors act.
        start: the first position that is shifted; None where none is: an adapter acts, or a gate decides beforehand.
        gate_by, read_by: names of detectors; ``has_document``: whether anything can come from one.
    """

    decision: int = 0
    start: int | None = None
    gate_by: str | None = None
    read_by: str | None = None
    has_document: bool = False

    @property
    def adapted(self) -> bool:
        """Whether an adapter acts."""
        return self.steer is not None and self.start is None and self.gate is None


@dataclass(frozen=True)
class Offered:
    """What was fitted on the model that is served.

    Attributes:
        levers: by the behaviour they steer to and by name the best vector and the best adapter, the better one first.
        detectors: ``detector``, and ``lower`` at or below the first shifted layer, where they exist.
        reader: of answers.
        quantization: of the engine's weights by torchao, as JSON; None where they are whole. ``source``: its name.
    """

    levers: Mapping[Toward, Mapping[str, Intervention]]
    detectors: Mapping[str, Detector]
    reader: Reader | None = None
    quantization: str | None = None
    source: str = ""

    @classmethod
    def of(
        cls,
        levers: Mapping[Toward, Mapping[str, Intervention]],
        detector: Detector | None,
        lower: Detector | None,
        reader: Reader | None = None,
        adapters: bool = True,
    ) -> Offered:
        """Of a run's levers, the best first, detectors and reader; ``adapters``: whether the engine takes any."""
        kinds = (SteeringVector, Adapter) if adapters else (SteeringVector,)
        served: dict[Toward, dict[str, Intervention]] = {}
        for toward, named in levers.items():
            first = {kind: next((one for one in named.values() if isinstance(one, kind)), None) for kind in kinds}
            if found := {name: one for name, one in named.items() if any(one is each for each in first.values())}:
                served[toward] = found
        return cls(served, {name: one for name, one in (("detector", detector), ("lower", lower)) if one}, reader)

    @classmethod
    def open(cls, source: str | Path, binding: Binding, adapters: bool = True) -> Offered:
        """Open what was fitted on the model of a binding: a run, a cell, or the file of a vector or detector.

        Raises:
            InputError: there is nothing, it is damaged, or was fitted on another model (the field is named).
        """
        source = Path(source)
        if not source.exists():
            raise InputError(f"{ENVIRONMENT}: {source} does not exist")
        reader, alone = reader_of(source)
        found = ({}, None, None) if alone else artefacts_of(source, binding)
        offered = replace(cls.of(*found, reader, adapters), source=source.resolve().name)
        for artefact in offered.artefacts.values():
            if artefact.binding is None:
                raise InputError(f"binding: the {artefact.WHAT} of {source} does not say which model it was made on")
            artefact.binding.check(binding, f"{artefact.WHAT} of {source}")
        return offered

    @property
    def vectors(self) -> dict[Toward, SteeringVector]:
        """By direction, what acts on states."""
        every = ((toward, one) for toward, named in self.levers.items() for one in named.values())
        return {toward: one for toward, one in every if isinstance(one, SteeringVector)}

    @property
    def artefacts(self) -> dict[str, Intervention | Detector | Reader]:
        """All of them, by direction and name."""
        levers = {f"{toward}/{name}": one for toward, named in self.levers.items() for name, one in named.items()}
        return {**levers, **self.detectors, **({"reader": self.reader} if self.reader else {})}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tensors, and of where they act."""
        digest = hashlib.sha256()
        for name, artefact in self.artefacts.items():
            where = [
                str(getattr(artefact, part, "")) for part in ("site", "positions", "layer", "layers", "conflict_bias")
            ]
            digest.update("|".join([name, *where]).encode())
            for part, tensor in sorted(artefact.tensors().items()):
                digest.update(part.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def below(self, lever: Intervention | None, setting: str) -> str | None:
        """The detector for ``gate`` or ``read`` whose states a lever leaves as they are; None without one.

        A gate of what acts on every token decides in a pass beforehand, where all are as they were.
        """
        order = ("lower", "detector") if setting == "gate" and not gated_beforehand(lever) else ("detector", "lower")
        there = [name for name in order if name in self.detectors]
        if isinstance(lever, SteeringVector) and not lever.everywhere:
            gates = {name: self.detectors[name].gate(lever.toward, 0.5) for name in there}
            there = [name for name, gate in gates.items() if gate.is_below(lever.site, lever.layers[0])]
        elif lever and setting == "read":
            there = []
        return next(iter(there), None)

    def serving(self, asked: Asked) -> tuple[Intervention | None, str | None, str | None]:
        """The lever of a request, and the detectors that gate and read it; InputError where one is not there."""
        lever = self._lever(asked.steer, asked.lever) if asked.steer else None
        if isinstance(lever, Adapter) and asked.alpha not in (0, *COPIES):
            allowed = ", ".join(f"{one:g}" for one in COPIES)
            raise InputError(f"alpha: {asked.alpha:g} of an adapter; allowed are 0 and its copies, {allowed}")
        found: dict[str, str | None] = {"gate": None, "read": None}
        if asked.read == TOKENS and self.reader is None:
            raise InputError(f"read: this server has no reader for {TOKENS}; fit one with `mnemoscope fit-reader`")
        for name, wanted in (("gate", lever and asked.gate is not None), ("read", asked.read is True)):
            acting = lever if name == "gate" or asked.alpha else None
            found[name] = self.below(acting, name) if wanted else None
            if wanted and found[name] is None:
                raise InputError(f"{name}: {self._none_below(acting)}")
        return lever, found["gate"], found["read"]

    def _lever(self, toward: Toward, name: str | None) -> Intervention:
        if not (there := self.levers.get(toward, {})):
            has = ", ".join(self.levers) or "none"
            raise InputError(f"steer: this server has no vector or adapter to {toward}; it has {has}")
        if name is not None and name not in there:
            more = "" if "adapter" in there else " (an adapter where the run has one and vLLM got --enable-lora)"
            raise InputError(f"lever: {name!r} to {toward} is not served; allowed are {', '.join(there)}{more}")
        return there[name or next(iter(there))]

    def _none_below(self, lever: Intervention | None) -> str:
        if not lever or not self.detectors:
            return "this server has no detector; fit one with `mnemoscope fit` and serve its run"
        read = ", ".join(f"{one.site} {one.layer}" for one in self.detectors.values())
        where = "every token of the prompt"
        if isinstance(lever, SteeringVector) and not lever.everywhere:
            where = f"{lever.site} {lever.layers[0]} and above"
        other = "fit one with detection.fitted: true, or read first and steer in a second request"
        return f"the detector reads {read}, this {lever.lever} changes {where}; {other}"


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
    for name in ("alpha", "gate", "lever") if "steer" not in asked else ():
        if name in asked:
            raise InputError(f"{name}: {asked[name]!r} is given without steer; say which way")
    for name, most in (("alpha", MOST_ALPHA), ("gate", 1.0)):
        if name not in asked:
            continue
        value = asked[name]
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        if wrong or not 0 <= value <= most:
            raise InputError(f"{name}: {value!r} is not a number in 0 .. {most:g}")
        asked[name] = float(value)
    if not isinstance(asked.get("lever", ""), str):
        raise InputError(f"lever: {asked['lever']!r} is no name of a lever")
    if "steer" in asked:
        asked["steer"] = Toward.of(asked["steer"], "steer")
    reads = _reading(asked.pop("read", False), asked)
    return Asked(**asked, read=reads)


def _reading(read: Any, asked: Mapping[str, Any]) -> bool | Literal["tokens"]:
    """What ``read`` asks for beside the other settings."""
    document = asked.get("document")
    if read != TOKENS:
        if not isinstance(read, bool | int | float) or read not in (0, 1):  # HTTP makes true a 1
            raise InputError(f"read: {read!r} is not one of true, false, {TOKENS}")
        if document is not None:
            raise InputError(f"document: {document!r} is given without read: {TOKENS}, which alone needs it")
        return bool(read)
    if not isinstance(document, str):
        raise InputError(
            f"document: {document!r}; read: {TOKENS} needs the document of the prompt, '' where it has none"
        )
    if "steer" in asked:
        raise InputError(f"read: {TOKENS} are read of unsteered answers; leave steer out")
    return "tokens"


def gated_beforehand(lever: Intervention | None) -> bool:
    """Whether a gate of a lever decides in a pass of its own."""
    return lever is not None and lever.everywhere


def other_word(name: Any) -> bool:
    """Whether a setting's name is another word for ``steer``."""
    said = str(name).lower()
    return said != "steer" and ("steer" in said or said in OTHER_WORDS)


def refuse_unoffered(given: Mapping[str, Any]) -> None:
    """Raises InputError for a request that asks a server that has nothing; other plugins may use the other names."""
    for name in ("steer", ADMITTED):
        if name in given:
            raise InputError(f"{name}: this server has no vectors; start it with {ENVIRONMENT}=RUN")


def admit(
    asked: Asked,
    offered: Offered,
    prompt: Sequence[int] | None,
    length: int,
    words: str | None = None,
    deciding: bool = False,
) -> Admitted:
    """Check a request against what the server has and how its prompt begins.

    Args:
        prompt: token ids, None where the prompt is given as embeddings.
        length: of the prompt, in tokens; ``words``: what it says, asked of one with a document.
        deciding: whether this is the pass beforehand, in which a gate decides and nothing acts.

    Raises InputError where it cannot be served as asked; the field is named.
    """
    lever, gate_by, read_by = offered.serving(asked)
    if lever and prompt is None:
        raise InputError("steer: the prompt is given as embeddings; give it as text or tokens")
    opening = lever.opening if isinstance(lever, SteeringVector) else ()
    if prompt is not None and tuple(prompt[: len(opening)]) != opening:
        raise InputError(
            "steer: the prompt is not formatted by the chat template, as those were that the vector was fitted on; use "
            "the chat route with the same system message"
        )
    document, said = ("".join((text or "").split()) for text in (asked.document, words))  # as tokens keep no blanks
    if document not in said:
        raise InputError(f"document: {asked.document[:60] if asked.document else ''!r} is not in the prompt")
    given = asdict(asked) | {"lever": lever.lever if lever else None} if asked.alpha else {"read": asked.read}
    start = None
    if asked.gate is not None and gated_beforehand(lever) and not deciding:
        raise InputError(f"gate: {BEFOREHAND}")
    if isinstance(lever, SteeringVector) and asked.alpha and not deciding:
        start = 0 if lever.everywhere else length - 1
    given |= {"gate_by": gate_by if asked.alpha else None, "read_by": read_by, "document": None}
    return Admitted(**given, decision=length - 1, start=start, has_document=bool(document))


def key_of_block(extra_args: Mapping[str, Any] | None, end: int) -> tuple[str, str] | None:
    """The key of a cached block that ends before position ``end``; None where no shift touched it.

    Blocks before the first shifted position have none, so what unsteered requests computed of a prompt is used. The key
    holds that position: the same tokens, as the answer to one prompt and as part of another, are not the same values.
    """
    facts = (extra_args or {}).get(ADMITTED)
    if not facts or facts["start"] is None or end <= facts["start"]:
        return None
    return ADMITTED, json.dumps([facts[name] for name in ("steer", "alpha", "gate", "start")])
