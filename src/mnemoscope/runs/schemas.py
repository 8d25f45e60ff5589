"""What is read of each JSON file of a run: fields and their types, checked by ``strict.read_json`` at each reading.

More fields are allowed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import read_json
from mnemoscope.runs.toward import Direction

Site = Literal["block", "attention", "mlp", "neuron"]
Where = Literal["decision", "all"]
Number = float | None  # None: not defined


class StudyFacts(TypedDict):  # what a report reads of `study.yaml`, which `config` describes; of any version
    study: str
    cells: dict[str, Any]


class CellFacts(TypedDict):  # `cell.json`
    task: str
    label: str
    seed: int
    memory_is_conflict: bool
    documents: NotRequired[bool]
    trained: bool
    analysed: NotRequired[bool]
    weights: NotRequired[str | None]
    attempt: NotRequired[int]
    binding: NotRequired[dict[str, str] | None]


class SettingFacts(TypedDict):  # a setting that was chosen
    method: str
    site: str
    layers: list[int]
    top: float
    strength: float
    positions: Where
    alpha: NotRequired[Number]
    lever: NotRequired[str]
    passes: NotRequired[int]
    within_limits: NotRequired[bool]
    begin_alike: NotRequired[Number]


class ChosenOf(TypedDict):  # for one aim: the best method of each direction, and the settings of each method
    best: Annotated[dict[Direction, str], Field(min_length=2)]
    methods: dict[str, Annotated[dict[Direction, SettingFacts], Field(min_length=2)]]


class ChosenFacts(TypedDict):  # `records/chosen.json`
    pairs: ChosenOf
    conflict: ChosenOf
    aim: NotRequired[Literal["pairs", "conflict"]]  # runs of version 0.1 have none: pairs
    levers: NotRequired[dict[Direction, str]]  # the best methods of any kind; none: the best ones of ``aim``
    left_out: NotRequired[dict[str, str]]  # methods that cannot be had here, and why
    judged: NotRequired[list[str]]  # splits; tune as well where groups are few


class ProbeOfLayer(TypedDict):  # the probe of a layer
    layer: int
    weights: list[float]
    bias: float
    tune_accuracy: float


class ProbeFacts(TypedDict):  # `probe.json`
    site: Site
    best_layer: int
    layers: list[ProbeOfLayer]


class KnownFacts(TypedDict):  # `known.json`: of a cell, or of an arena, which also says of which model and examples
    asked: int
    known: list[str]


class WhyFacts(TypedDict):  # `no_detector.json`
    why: str


class GenerationFacts(TypedDict, total=False):  # what is kept of a model's `generation_config.json`
    bos_token_id: int | list[int]
    eos_token_id: int | list[int]
    pad_token_id: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    max_length: int


class MarkerFacts(TypedDict):  # `stages/NAME.json`: what a stage depended on, and its files with their SHA-256
    files: dict[str, str]
    digest: str
    hash: NotRequired[str]
    seconds: NotRequired[float]
    commit: NotRequired[str | None]
    dirty: NotRequired[bool | None]


class ManifestFacts(TypedDict, total=False):  # `manifest.json`
    versions: dict[str, str]
    machine: dict[str, str | int | None]


class FrameFacts(TypedDict):  # `arena/frame.json`
    schema: int
    model: str
    weights: str
    task: str
    examples: str
    sizes: dict[str, float]
    prompting: dict[str, bool | str | None]
    asked: int
    known: int
    dtype: NotRequired[str]
    order: list[str]
    lists: dict[str, int]
    gates: list[str]
    no_gate: NotRequired[str | None]
    by_answers: NotRequired[float | None]


class AuditFacts(TypedDict):  # `audit/frame.json`
    schema: int
    model: str
    weights: str
    items: str
    sizes: dict[str, float | str | None]
    form: dict[str, int | str]
    prompting: dict[str, bool | str | None]
    dtype: str


class ArtefactFacts(TypedDict):  # the JSON beside the tensors of a vector or detector
    digest: dict[str, str] | str  # of its tensors and facts; a text: of the tensors alone, by an earlier version
    task: str
    commit: str
    binding: dict[str, str] | None  # fields of a `Binding`
    prompting: dict[str, bool | str | None]
    card: dict[str, Any] | None  # fields of a `Card`


class InterventionFacts(ArtefactFacts):  # the JSON of an intervention of any kind
    toward: Literal["generalized", "memorized"]  # as they are written, and no other word for them
    method: str
    kind: NotRequired[str]  # none: a vector, by an earlier version
    setting: NotRequired[dict[str, Any]]


class VectorFacts(InterventionFacts):  # the JSON of a vector
    site: Literal["block", "attention", "mlp", "neuron", "head"]
    edits: NotRequired[list[str]]  # none: shifts and low-rank shifts, by an earlier version
    positions: Where
    layers: list[int]
    top: float
    strength: float
    unit: NotRequired[Literal["norm", "spread"]]
    begin_alike: float
    opening: list[int]


class DetectorFacts(ArtefactFacts):  # the JSON of a detector
    site: Site
    layer: int
    conflict_bias: Number


class ReaderFacts(ArtefactFacts):  # the JSON of a reader of answers
    layers: list[int]
    whole_form: str
    bare_form: str
    figures: dict[str, float]


def read_chosen(path: Path) -> ChosenFacts:
    """Read `chosen.json`; InputError where a field is wrong, or the best method is not among the others."""
    found = read_json(path, ChosenFacts)
    for aim, of_aim in (("pairs", found["pairs"]), ("conflict", found["conflict"])):
        for direction, method in (*of_aim["best"].items(), *found.get("levers", {}).items()):
            if method not in of_aim["methods"]:
                raise InputError(f"{path}: {aim}.best.{direction} is {method!r}, which is not among its methods")
        for method in of_aim["methods"]:
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,49}", method):  # it is part of a file's name
                raise InputError(f"{path}: {aim}.methods has {method!r}, which is no method")
    return found
