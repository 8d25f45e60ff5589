"""What an intervention is: other words, other states in a pass, other weights beside it, or two passes that are joined.

It is data, tensors and plain values, so it can be saved, loaded, bound to its model, scaled, and sent to a server.

Shapes: N prompts, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor

from mnemoscope.interventions.artefact import Artefact, read_artefact
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import InterventionFacts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.interventions.hooks import Gate

Toward = Literal["generalized", "memorized"]
OPPOSITE: dict[Toward, Toward] = {"generalized": "memorized", "memorized": "generalized"}
Applied = Callable[[int | None], AbstractContextManager[Any]]  # the decision column, None: the last of each prompt
Contrast = Literal["bare", "cut"]  # with what a prompt is contrasted: its bare question, or itself without its text
SENTENCE_END = re.compile(r"""[.!?]["']?\s+""")


@dataclass(frozen=True, slots=True)
class Quoted:
    """A prompt in three parts: before the text that it quotes, the text with its label, and behind it.

    ``text`` is empty where the prompt is a bare question; else it ends in white space.
    """

    before: str
    text: str
    behind: str

    @classmethod
    def of(cls, prompt: str, bare: str | None) -> Quoted:
        """The parts of a prompt, found by its bare question; without one all of it stands behind."""
        if bare is None or bare == prompt:
            return cls("", "", prompt)
        end = next((n for n, (a, b) in enumerate(zip(prompt[::-1], bare[::-1], strict=False)) if a != b), len(bare))
        end = min(end, len(bare), len(prompt))
        begin = len(bare) - end
        if prompt[:begin] != bare[:begin]:  # something else stands before the bare question, as solved ones do
            return cls._above(prompt, len(prompt) - end)
        before, text, behind = prompt[:begin], prompt[begin : len(prompt) - end], prompt[len(prompt) - end :]
        if text.startswith("\n"):  # lines belong to the text with their ends
            before, text, behind = f"{before}\n", text[1:] + "\n", behind.removeprefix("\n")
        whole = cls._whole(text)
        return cls(before, text[:whole], text[whole:] + behind)

    @staticmethod
    def _whole(text: str) -> int:
        """Where a text ends: with its last whole line, else its last sentence; what follows leads to the answer."""
        line = text.rfind("\n") + 1
        return line or max((end.end() for end in SENTENCE_END.finditer(text)), default=0)

    @classmethod
    def _above(cls, prompt: str, shared: int) -> Quoted:
        """What stands above the line on which the bare question begins, or before it on one line.

        ``shared``: where what the prompt has in common with the bare question begins; less than two words are chance.
        """
        while 0 < shared < len(prompt) and not prompt[shared - 1].isspace():  # amid a word
            shared += 1
        if len(prompt[shared:].split()) < 2:
            return cls("", "", prompt)
        place = prompt.rfind("\n", 0, len(prompt[:shared].rstrip(" "))) + 1 or shared
        if not prompt[:place].endswith("\n") and prompt[:place].rstrip()[-1:] not in '.!?:"':  # amid a sentence
            return cls("", "", prompt)
        return cls("", prompt[:place], prompt[place:])

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.before + self.text + self.behind

    def with_text(self, text: str) -> str:
        """The prompt that quotes another text, with the white space of this one behind it."""
        space = self.text[len(self.text.rstrip()) :] or "\n"
        return f"{self.before}{text.rstrip()}{space}{self.behind}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Intervention(Artefact):
    """Base class. A kind changes words, states or weights (``prompt``, ``apply``), or joins two passes (``join``).

    Attributes:
        toward: the behaviour it is to bring about.
        method: name of the method that fitted it.
        setting: what was chosen for it, plain values.
        contrast: with what prompts are contrasted by ``join``; None: nothing is joined.

    Class attributes:
        KIND: its name in files.
        passes: of the model for each answer token.
        changes_weights: whether it is other weights, so that serving it needs them loaded.
        in_one_go: whether options are read in one pass each, because passes belong together.
    """

    toward: Toward
    method: str = "custom"
    setting: Mapping[str, Any] = field(default_factory=dict)
    contrast: Contrast | None = None

    WHAT: ClassVar[str] = "intervention"
    FACTS: ClassVar[Any] = InterventionFacts
    KIND: ClassVar[str]
    passes: ClassVar[int] = 1
    changes_weights: ClassVar[bool] = False
    in_one_go: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.toward not in OPPOSITE:
            raise InputError(f"toward: {self.toward!r} is not one of {', '.join(OPPOSITE)}")

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        return f"{type(self).__name__}(to {self.toward}: {self.method}{', ' if chosen else ''}{chosen})"

    @property
    def everywhere(self) -> bool:
        """Whether passes differ before the decision position too, so that no cached prefix serves."""
        return False

    def prompt(self, quoted: Quoted) -> str:
        """The prompt that is asked in place of another."""
        return quoted.prompt

    def apply(
        self,
        model: PreTrainedModel,
        alpha: float | Sequence[float] | Tensor = 1.0,
        start: int | None = None,
        gate: Gate | None = None,
    ) -> AbstractContextManager[None]:
        """The context in which passes run; see ``SteeringVector.apply``. By default nothing is changed."""
        return nullcontext()

    def join(self, mine_NMV: Tensor, other_NMV: Tensor) -> Tensor:
        """Logits from those of a prompt and those of its ``contrast``."""
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
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build one from its tensors and all other fields."""
        kind = facts.pop("kind", cls.KIND)
        if kind != cls.KIND:
            raise ValueError(f"it is {kind!r}, not {cls.KIND!r}")
        return super().with_tensors(tensors, facts)


def load_intervention(
    path: Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    force: bool = False,
) -> Intervention:
    """Load an intervention of any kind that was imported; see ``Artefact.load`` for errors."""
    facts, _ = read_artefact("intervention", path, InterventionFacts, force)
    kind = facts.get("kind", "vector")
    known = {one.KIND: one for one in _all(Intervention) if hasattr(one, "KIND")}
    if kind not in known:
        raise InputError(f"kind: {path} is {kind!r}; known are {', '.join(sorted(known))}, and what was imported")
    return known[kind].load(path, model, tokenizer, force)


def _all(base: type[Intervention]) -> list[type[Intervention]]:
    return [kind for one in base.__subclasses__() for kind in (one, *_all(one))]
