"""What the JSON API takes and returns; undefined numbers are null."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mnemoscope.config.model import Frozen
from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Reading
from mnemoscope.runs.files import plain
from mnemoscope.tasks import Example

NAMELESS = "asked"  # item of a question that somebody typed
STRONGEST = 8.0  # factor on a vector
Number = Annotated[float | None, BeforeValidator(plain)]


class Question(Frozen):
    """A prompt, with its two revealing answers where they are known; ``item`` and ``family`` if it is of the run."""

    prompt: str = Field(min_length=1)
    memorized: str | None = None
    generalized: str | None = None
    item: str = ""
    family: str = ""

    @classmethod
    def of(cls, example: Example) -> Question:
        """The question that an example of kind ``conflict`` asks."""
        return cls(**{name: getattr(example, name) for name in cls.model_fields})

    def example(self) -> Example | None:
        """As an example of kind ``conflict``, None without answers; InputError for one answer, or two equal ones."""
        if not self.memorized and not self.generalized:
            return None
        item, family, both = self.item or NAMELESS, self.family or NAMELESS, (self.memorized, self.generalized)
        return Example(item, self.prompt, "conflict", item, family, "test", *both)


Pair = dict[Toward, Question]  # two phrasings of one item, by the behaviour that answers them


class Steering(Frozen):
    """Which vector steers the model: a method of the run, and a factor ``alpha``.

    Of its layers only some, and of its neurons the highest ranked, can be shifted; null: as the vector has them.
    """

    toward: Toward
    method: str
    alpha: float = Field(1.0, ge=0, le=STRONGEST)
    layers: list[Annotated[int, Field(ge=0, le=4096)]] | None = Field(None, min_length=1, max_length=512)
    neurons: int | None = Field(None, ge=1, le=2**24)


class Asked(Frozen):
    """A question, answered without steering or steered."""

    question: Question
    steering: Steering | None = None


class DetectorReading(Frozen):
    """P(memorized) at the decision position: by layer from layer 0, and at ``layer``, which is the verdict."""

    p_memorized: Number
    p_memorized_by_layer: list[Number]
    p_conflict: Number
    unlike: bool
    layer: int

    @classmethod
    def first_of(cls, found: Reading) -> DetectorReading:
        """The reading of the first prompt."""
        names = ("p_memorized", "p_memorized_by_layer", "p_conflict", "unlike")
        return cls(layer=found.layer, **{name: getattr(found, name)[0].tolist() for name in names})


class Answer(Frozen):
    """The text that a model answers with, and the probabilities of both whole answers, without what closes them.

    Null are behaviour and probabilities where the prompt came without answers, probabilities where a lever changes the
    prompt or joins two passes, the reading where there is no detector.
    """

    behaviour: Literal["memorized", "generalized", "other"] | None = None
    said: str
    p_memorized: Number = None
    p_generalized: Number = None
    reading: DetectorReading | None = None


class About(Frozen):
    """A question about a document ("" for none), and how many tokens its answer may have."""

    ask: str = Field(min_length=1)
    document: str = ""
    tokens: int = Field(48, ge=1, le=256)


class ReadPart(Frozen):
    """Characters of an answer: a token, or a name or number, which has a verdict; probabilities of each origin."""

    start: int
    end: int
    document: Number
    memory: Number
    neither: Number
    unlike: bool = False
    verdict: str = ""
    text: str = ""


class ReadSoFar(Frozen):
    """An answer as far as it is written, and where its parts come from; ``line``: the shares in words."""

    answer: str
    tokens: list[ReadPart]
    parts: list[ReadPart]
    shares: dict[str, Number]
    line: str


class LeverFacts(Frozen):
    """A lever of a cell, of vectors with what they shift; ``free``: any layers and number of neurons can be taken."""

    lever: str
    best: bool
    site: str = ""
    layers: list[int] = Field([])
    neurons: int = 0
    strength: float = 1.0
    free: bool = False


class OpenedFacts(Frozen):
    """An opened cell: how many layers its model has, the two vectors of each method, whether it has a detector, and a
    reader of answers.

    ``documents``: whether its task quotes some. ``auroc``: of test prompts by P(memorized), with ``low``, ``high``
    (95 %) and ``n``, and beside it ``input_only``, by the input alone.
    """

    layers: int
    documents: bool
    detects: bool
    reads: bool = False
    auroc: dict[str, Number] | None = None
    methods: dict[str, dict[Toward, LeverFacts]]


class NeuronMap(Frozen):
    """Statistics of every neuron at the contrast's site, by layer, on the fit pairs."""

    site: str
    pairs: int
    nmd: list[list[Number]]
    rho: list[list[Number]]
    p_family_wise: list[list[Number]]


class Watched(Frozen):
    """One neuron on tune pairs: means, ranks (1 is the largest magnitude), and a drawing (SVG).

    ``alone``: shares of phrasings steered to each behaviour by shifting it alone by ``times`` its mean difference.
    """

    layer: int
    neuron: int
    pairs: int
    mean_generalized: Number
    mean_memorized: Number
    rank_nmd: int
    rank_rho: int
    alone: list[dict[Toward | Literal["times"], Number]]
    drawing: str


class Look(Frozen):
    """A step of a look at a neuron: the share that is done, from 0 to 1, and with the last step the result."""

    share: float
    result: Watched | None = None


class RunFacts(Frozen):
    """A run: its study, the cells that can be opened, and once it is finished the numbers of ``fit --json`` by task.

    ``damaged``: what is wrong with its results, if anything.
    """

    run: str
    cells: list[str]
    study: str | None = None
    finished: bool = False
    tasks: dict[str, dict[str, Any]] = Field({})
    damaged: str | None = None


class Refusal(Frozen):
    """The body of every error: the field, and what is wrong with it."""

    error: dict[Literal["field", "message"], str]
