"""What the JSON API takes and gives."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mnemoscope.bench import Answered, Turning, Watched
from mnemoscope.plain import known, plain
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from mnemoscope.contrast import Contrast

LONGEST_PROMPT, LONGEST_ANSWER = 8000, 200  # characters
NAMELESS = "asked"  # item of a question that somebody typed
STRONGEST = 8.0  # factor on a vector
Toward = Literal["generalized", "memorized"]
Text = Annotated[str, Field(max_length=LONGEST_ANSWER)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Read(BaseModel):
    """Read from files, which may hold more than is shown."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class QuestionIn(_Shape):
    """A prompt, with its two revealing answers where they are known; those of the run's own come with an item."""

    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    memorized: Text | None = None
    generalized: Text | None = None
    item: Text = ""
    family: Text = ""

    def example(self) -> Example | None:
        """As the library knows it; None without answers.

        Raises:
            InputError: only one answer is given, or both are the same.
        """
        if not self.memorized and not self.generalized:
            return None
        return Example(
            self.item or NAMELESS,
            self.prompt,
            "conflict",
            self.item or NAMELESS,
            self.family or NAMELESS,
            memorized=self.memorized,
            generalized=self.generalized,
        )


class TurningIn(_Shape):
    """How the model is turned."""

    toward: Toward
    method: Text
    alpha: float = Field(1.0, ge=0, le=STRONGEST)
    layers: list[Annotated[int, Field(ge=0, le=4096)]] | None = Field(None, min_length=1, max_length=512)
    neurons: int | None = Field(None, ge=1, le=2**24)

    def turning(self) -> Turning:
        """As the library knows it."""
        layers = tuple(sorted(set(self.layers))) if self.layers is not None else None
        return Turning(self.toward, self.method, self.alpha, layers, self.neurons)


class AskIn(_Shape):
    """A question, put to the model by itself or turned."""

    question: QuestionIn
    turning: TurningIn | None = None


class RephraseIn(_Shape):
    """An item of the run's own, to be put in other words than the prompt's."""

    item: Text
    prompt: str = Field("", max_length=LONGEST_PROMPT)
    seed: int = Field(0, ge=0, le=2**31)


class ReadingOut(_Shape):
    """What the detector says; probabilities by layer, the first is layer 0."""

    p_memorized: float | None
    p_memorized_by_layer: list[float | None]
    p_conflict: float | None
    unlike: bool
    layer: int


class AnswerOut(_Shape):
    """What the model makes of a prompt; probabilities are those of the whole answers, null without them."""

    behaviour: Literal["memorized", "generalized", "other"] | None
    said: str
    p_memorized: float | None
    p_generalized: float | None
    reading: ReadingOut | None

    @classmethod
    def of(cls, answered: Answered) -> AnswerOut:
        """For JSON."""
        reading = answered.reading
        return cls(
            behaviour=answered.behaviour,
            said=answered.said,
            p_memorized=known(answered.p_memorized),
            p_generalized=known(answered.p_generalized),
            reading=ReadingOut(
                p_memorized=known(float(reading.p_memorized_N[0])),
                p_memorized_by_layer=[known(p) for p in reading.p_memorized_NL[0].tolist()],
                p_conflict=known(float(reading.p_conflict_N[0])),
                unlike=bool(reading.unlike_N[0]),
                layer=reading.layer,
            )
            if reading
            else None,
        )


class QuestionOut(_Shape):
    """A phrasing of an item."""

    prompt: str
    memorized: str
    generalized: str
    item: str
    family: str

    @classmethod
    def of(cls, example: Example) -> QuestionOut:
        """For JSON."""
        return cls(
            prompt=example.prompt,
            memorized=str(example.memorized),
            generalized=str(example.generalized),
            item=example.item,
            family=example.family,
        )


class PairOut(_Shape):
    """Two phrasings of one item, that answered from memory first."""

    memorized: QuestionOut
    generalized: QuestionOut


class NeuronsOut(_Shape):
    """Statistics of every neuron at a site, by layer; null where one is not defined."""

    site: str
    pairs: int
    nmd: list[list[float | None]]
    rho: list[list[float | None]]
    p_family_wise: list[list[float | None]]

    @classmethod
    def of(cls, found: Contrast) -> NeuronsOut:
        """A contrast as JSON has it."""
        return cls(
            site=found.site,
            pairs=found.pairs,
            nmd=table(found.nmd_LD),
            rho=table(found.rho_LD),
            p_family_wise=table(found.p_family_wise_LD),
        )


class EstimateOut(_Read):
    """A number with its 95 % interval; null where it is not defined."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int


class ChosenOut(_Read):
    """The setting of a vector; ``alpha`` is the paper's, of method nmd only."""

    method: str
    site: str
    layers: list[int]
    positions: str
    top: float
    strength: float
    alpha: float | None


class TurnedOut(_Read):
    """What the best vector of a direction does to test pairs, beside its strongest control."""

    chosen: ChosenOut
    pairs: EstimateOut
    other: EstimateOut
    strongest_control: str | None
    control: EstimateOut | None
    collateral: dict[str, EstimateOut]


class TaskOut(_Read):
    """The first numbers of a task."""

    pairs: int
    test_pairs: int
    to_generalized: TurnedOut
    to_memorized: TurnedOut
    differ: EstimateOut
    read: EstimateOut
    detect_auroc: EstimateOut | None = None


class RunOut(_Read):
    """A run: its study, the cells that can be opened, and its first numbers by task once it has come to its end."""

    run: str
    study: str | None
    finished: bool
    cells: list[str]
    tasks: dict[str, TaskOut]


class RowOut(_Read):
    """A number of two runs, in words."""

    task: str
    what: str
    first: str
    second: str


class VectorOut(_Read):
    """A vector of a cell; ``free``: any layers and any number of neurons can be taken of it."""

    site: str
    layers: list[int]
    neurons: int
    strength: float
    free: bool
    best: bool


class MethodOut(_Read):
    """A method with its two vectors."""

    method: str
    generalized: VectorOut
    memorized: VectorOut


class CellOut(_Read):
    """An opened cell: what its model can be turned with."""

    run: str
    cell: str
    layers: int
    detects: bool
    methods: list[MethodOut]


class AloneOut(_Read):
    """Shares of the other phrasings that a neuron turns when it alone is shifted by so many times its difference."""

    times: float
    generalized: float | None
    memorized: float | None


class WatchedOut(_Read):
    """What is shown of a neuron; the drawing is SVG."""

    layer: int
    neuron: int
    pairs: int
    mean_generalized: float | None
    mean_memorized: float | None
    rank_nmd: int
    rank_rho: int
    alone: list[AloneOut]
    drawing: str

    @classmethod
    def of(cls, neuron: Watched, drawing: str, layer: int, number: int) -> WatchedOut:
        """For JSON."""
        return cls(
            layer=layer,
            neuron=number,
            pairs=len(neuron.generalized_P),
            mean_generalized=known(float(neuron.generalized_P.mean())),
            mean_memorized=known(float(neuron.memorized_P.mean())),
            rank_nmd=neuron.rank_nmd,
            rank_rho=neuron.rank_rho,
            alone=[
                AloneOut(times=times, generalized=known(turned["generalized"]), memorized=known(turned["memorized"]))
                for times, turned in neuron.alone.items()
            ],
            drawing=drawing,
        )


class JobOut(_Shape):
    """Work that takes a while."""

    job: str
    state: Literal["running", "done", "failed", "cancelled"]
    share: float
    result: WatchedOut | None = None
    error: str = ""


class Problem(BaseModel):
    """What is wrong with a request."""

    field: str
    message: str


class ErrorOut(BaseModel):
    """The body of every error."""

    error: Problem


def first_numbers(brief: dict[str, Any]) -> dict[str, TaskOut]:
    """What ``report.brief`` says of each task; nothing of one that another version has written."""
    found = {}
    for name, task in brief.items():
        with suppress(ValidationError):
            found[name] = TaskOut.model_validate(plain(task))
    return found


def table(values: Any) -> list[list[float | None]]:
    """An array (L, D) for JSON, to five digits."""
    return [[known(float(f"{v:.5g}")) for v in row] for row in values.tolist()]
