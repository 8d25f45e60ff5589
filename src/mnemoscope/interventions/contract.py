"""What an intervention is: other words, other states in a pass, other weights beside it, or two passes that are joined.

It is data, tensors and plain values, so it can be saved, loaded, bound to its model, scaled, and sent to a server.

A method is a module of ``methods`` or ``rivals``, or one that a user allows, with ``candidates(bench, toward)``, which
fits it and returns its settings, to be chosen on tune; or with a ``direction`` (see ``shifts``), or a rule of decoding
(``joined``, see ``decoding``).

Shapes: N prompts, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from torch import Tensor

from mnemoscope.interventions.artefact import Artefact, read_artefact, tensors_file
from mnemoscope.interventions.registry import method_module, method_names
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import InterventionFacts
from mnemoscope.runs.toward import Toward

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.bench import lists
    from mnemoscope.interventions.hooks import Alpha, Gate
    from mnemoscope.interventions.words import Quoted

Bench: TypeAlias = "lists.Bench"  # what methods are fitted on
KINDS = ("words", "decoding", "vector", "adapter")  # modules of this package; others are found once they are imported
Seen: TypeAlias = Callable[[int], Any]  # of how many last columns of a pass -> what was seen there, or None
Contrast = Literal["bare", "cut"]  # with what a prompt is contrasted: its bare question, or itself without its text


@dataclass(frozen=True, kw_only=True, repr=False)
class Intervention(Artefact):
    """Base class. A kind changes words, states or weights (``prompt``, ``apply``), or joins two passes (``join``).

    Attributes:
        toward: the behaviour it is to bring about.
        method: name of the method that fitted it.
        setting: what was chosen for it, plain values.
        contrast: with what prompts are contrasted by ``join``; None: nothing is joined.
    """

    toward: Toward
    method: str = "custom"
    setting: Mapping[str, Any] = field(default_factory=dict)
    contrast: Contrast | None = None

    WHAT: ClassVar[str] = "intervention"
    FACTS: ClassVar[Any] = InterventionFacts
    KIND: ClassVar[str]  # its name in files
    passes: ClassVar[int] = 1  # of the model for each answer token
    changes_weights: ClassVar[bool] = False  # whether it is other weights, so that serving it needs them loaded
    in_one_go: ClassVar[bool] = False  # whether options are read in one pass each, because passes belong together

    def __post_init__(self) -> None:
        object.__setattr__(self, "toward", Toward.of(self.toward))

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        return f"{type(self).__name__}(to {self.toward}: {self.method}{', ' if chosen else ''}{chosen})"

    @property
    def lever(self) -> str:
        """What a user calls it: words, decoding, adapter, shift, low-rank."""
        return self.KIND

    @property
    def everywhere(self) -> bool:
        """Whether passes differ before the decision position too, so that no cached prefix serves."""
        return False

    def prompt(self, quoted: Quoted) -> str:
        """The prompt that is asked in place of another."""
        return quoted.prompt

    def apply(
        self, model: PreTrainedModel, alpha: Alpha = 1.0, start: int | None = None, gate: Gate | None = None
    ) -> AbstractContextManager[None]:
        """The context in which passes run; see ``SteeringVector.apply``. By default nothing is changed."""
        return nullcontext()

    def marked(self, text_NT: Tensor) -> Intervention:
        """The same for a batch, of whose tokens ``text_NT``, bool, are quoted texts; asked of what is ``in_one_go``."""
        return self

    def watched(self, model: PreTrainedModel) -> AbstractContextManager[Seen]:
        """The context of passes that are joined, and what tells behind each what ``join`` needs beside its logits."""
        return nullcontext(lambda columns: None)

    def join(self, mine_NMV: Tensor, other_NMV: Tensor, *seen: Any) -> Tensor:
        """Logits from those of a prompt and those of its ``contrast``; ``seen``: what was ``watched`` in either."""
        return mine_NMV

    def scaled(self, alpha: float) -> Intervention:
        """The same, so many times as strong; 0: the model itself, bit by bit. What has no strength acts or does not."""
        return self if alpha else Intervention(toward=self.toward, method=self.method)

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where it does not fit the model's layers or widths."""

    def facts(self) -> dict[str, Any]:
        """How it was fitted, and its kind."""
        return super().facts() | {"kind": self.KIND}

    @classmethod
    def check_kind(cls, facts: dict[str, Any]) -> None:
        """Take the kind out of stored fields; ValueError where it is another. Without one it is a vector."""
        if (kind := facts.pop("kind", "vector")) != cls.KIND:
            raise ValueError(f"it is {kind!r}, not {cls.KIND!r}")

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build one from its tensors and all other fields."""
        cls.check_kind(facts)
        return super().with_tensors(tensors, facts)


def load_intervention(
    path: Path, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerFast | None = None
) -> Intervention:
    """Load an intervention of any kind that was imported; see ``Artefact.load`` for errors."""
    facts, _ = read_artefact("intervention", path := tensors_file(path), InterventionFacts)
    kind, method = facts.get("kind", "vector"), facts["method"]
    if kind in KINDS:
        import_module(f"mnemoscope.interventions.{kind}")
    if kind not in KINDS or method not in method_names():
        with suppress(InputError):  # a vector of somebody's own
            method_module(method)
    known = {one.KIND: one for one in _all(Intervention) if hasattr(one, "KIND")}
    if kind not in known:
        raise InputError(f"kind: {path} is {kind!r}; known are {', '.join(sorted(known))}, and what was imported")
    return known[kind].load(path, model, tokenizer)


def _all(base: type[Intervention]) -> list[type[Intervention]]:
    return [kind for one in base.__subclasses__() for kind in (one, *_all(one))]
