"""The base of vectors and detectors: the model they were fitted on, format of prompts, card, files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import PLAIN, Prompting
from mnemoscope.errors import InputError
from mnemoscope.files import plain, write_atomically
from mnemoscope.models import core_of, merged_weights
from mnemoscope.schemas import ArtefactFacts, read_chosen
from mnemoscope.strict import read_bytes, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Not its padding and truncation, which every call may change.
TOKENIZING = ("model", "added_tokens", "normalizer", "pre_tokenizer")


@dataclass(frozen=True, slots=True)
class Binding:
    """Fingerprint of the model that an artefact was fitted on; any other is refused.

    Attributes:
        model_type: the configuration's ``model_type``.
        weights: SHA-256 of all parameters, by name, rounded to bfloat16, so that it is the same in that precision, and
            with an adapter (LoRA) beside the weights or merged into them.
        tokenizer: SHA-256 of the fast tokenizer's parts in ``TOKENIZING``.
        half: as ``weights``, but rounded to float16 before, for models that are opened in float16.
    """

    model_type: str
    weights: str
    tokenizer: str
    half: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Binding:
        """Fingerprint a model and its tokenizer, reading every weight; InputError where one is not in memory."""
        digest, half = hashlib.sha256(), hashlib.sha256()
        for name, weight in sorted(merged_weights(model), key=itemgetter(0)):
            if weight.is_meta:
                raise InputError(f"device_map: {name} is not in memory; use devices that hold the whole model")
            for known, first in ((digest, weight.detach()), (half, weight.detach().to(torch.float16))):
                rounded = first.to(torch.bfloat16).cpu().contiguous()
                known.update(name.encode())
                known.update(rounded.view(torch.uint8).numpy().data)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        words = json.dumps({part: parts.get(part) for part in TOKENIZING}, sort_keys=True)
        tokens = hashlib.sha256(words.encode()).hexdigest()
        return cls(core_of(model).config.model_type, digest.hexdigest(), tokens, half.hexdigest())

    def check(self, found: Binding, what: str) -> None:
        """Raises InputError where another model was ``found``; the field that differs is named."""
        for name in ("model_type", "weights", "tokenizer"):
            if name == "weights" and {self.weights, self.half} & {found.weights, found.half}:
                continue
            if (mine := getattr(self, name)) != (value := getattr(found, name)):
                raise InputError(f"{name}: the {what} was made on {mine}, this model has {value}; force overrides")


@dataclass(frozen=True)
class Card:
    """Figures of the test split and their origin; None or empty where not measured.

    Attributes:
        fitted_on: study, task and model.
        shift: share of test prompts that change to the target behaviour: ``estimate``, ``low``, ``high`` (95 %), ``n``.
        control: the strongest control of the same norm: ``name`` and ``estimate``, mean over its draws.
        cost: change in accuracy of each list that steering should not affect.
        divergence: mean KL in nats a token on neutral text, by multiple of the vector.
        auroc: of a detector: ``estimate``, ``low``, ``high``, ``n``, and ``input_only`` beside it.
        pairs, groups: of the fit split.
        versions: of the libraries that made it.
    """

    fitted_on: str
    shift: dict[str, float] | None = None
    control: dict[str, Any] | None = None
    cost: dict[str, float] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    auroc: dict[str, float] | None = None
    pairs: int = 0
    groups: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        beside = (self.auroc or {}).get("input_only")
        doses = ", ".join(f"{kl:.4f} at {dose}" for dose, kl in self.divergence.items())
        lines = [
            f"fitted on {self.fitted_on}: {self.pairs} pairs of {self.groups} groups",
            self.shift and f"test shift {_interval(self.shift)}",
            self.control
            and f"strongest control of the same norm: {self.control['name']} {self.control['estimate']:.3f}",
            self.auroc and f"test AUROC {_interval(self.auroc)}" + (f"; input only {beside:.3f}" if beside else ""),
            self.cost and "cost, change in accuracy: " + ", ".join(f"{k} {v:+.3f}" for k, v in self.cost.items()),
            doses and f"divergence on neutral text, nats a token: {doses} times the vector",
            self.versions and "made with " + ", ".join(map(" ".join, self.versions.items())),
        ]
        return "\n".join(line for line in lines if line)


def _interval(rate: dict[str, float]) -> str:
    low, high = (rate.get(end, math.nan) for end in ("low", "high"))
    return f"{rate['estimate']:.3f} [{low:.3f}, {high:.3f}], n = {rate['n']:.0f}"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Base class of what is stored in two files: ``.safetensors``, the fields in ``STORED``, and ``.json``, the others.

    Attributes:
        task: label of the task it was fitted on.
        binding: the model it was fitted on, or None.
        prompting: the format of prompts there.
        commit: version of the code that made it.
        card: its figures on the test split, or None.
    """

    task: str = ""
    binding: Binding | None = None
    prompting: Prompting = PLAIN
    commit: str = ""
    card: Card | None = None

    WHAT: ClassVar[str] = "artefact"
    STORED: ClassVar[tuple[str, ...]] = ()
    FACTS: ClassVar[Any] = ArtefactFacts  # the fields of its JSON

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in self.STORED}

    def facts(self) -> dict[str, Any]:
        """All other fields as JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.STORED}
        found |= {name: asdict(found[name]) if found[name] else None for name in ("binding", "card")}
        return found | {"prompting": self.prompting.facts}

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build one from its tensors and all other fields."""
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        return cls(**arrays, **facts)

    def check_shape(self, model: PreTrainedModel) -> None:
        """Raises InputError where the model has other layers or widths."""
        raise NotImplementedError

    def bound_to(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Self:
        """The same artefact, bound to the model it was fitted on, so that it can be saved and loaded."""
        return replace(self, binding=Binding.of(model, tokenizer))

    def save(self, path: str | Path) -> list[Path]:
        """Write ``path`` (safetensors) and the JSON beside it, each atomically; returns the two paths."""
        from safetensors.torch import save

        path = Path(path)
        content = save({name: tensor.contiguous() for name, tensor in self.tensors().items()})
        facts = plain(self.facts() | {"digest": hashlib.sha256(content).hexdigest()})
        text = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False) + "\n"
        return [write_atomically(path, content), write_atomically(path.with_suffix(".json"), text.encode())]

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        force: bool = False,
    ) -> Self:
        """Load one, and check that it was fitted on this model where one is given.

        ``force`` accepts another model of the same shape.

        Raises:
            InputError: the files are missing or damaged, the model is another (the field that differs is named), or it
                is given without its tokenizer.
        """
        from safetensors.torch import load

        path = Path(path)
        with readable(cls.WHAT, path):
            content = read_bytes(path, cls.WHAT)
            facts: dict[str, Any] = {**read_json(path.with_suffix(".json"), cls.FACTS)}
            if facts.pop("digest") != hashlib.sha256(content).hexdigest():
                raise ValueError("its digest is not that of the JSON beside it: one of the two files was changed")
            for name, kind in (("binding", Binding), ("card", Card)):
                facts[name] = kind(**facts[name]) if facts[name] else None
            facts["prompting"] = stored_prompting(facts["prompting"])
            made = cls.with_tensors(load(content), facts)
        made.check(model, tokenizer, force)
        return made

    def check(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerFast | None,
        force: bool = False,
        found: Binding | None = None,
    ) -> None:
        """Raises InputError where it was not fitted on this model, whose binding may be ``found``, if one is given."""
        if (model is None) != (tokenizer is None) and not force:
            why = "give both, or neither; force takes a model alone and checks its shape only"
            raise InputError(f"model, tokenizer: {why}")
        if model is None:
            return
        if not force and tokenizer is not None:
            if self.binding is None:
                raise InputError(f"binding: the {self.WHAT} does not say which model it was made on; force overrides")
            self.binding.check(found or Binding.of(model, tokenizer), self.WHAT)
        self.check_shape(model)


def best_paths(cell: Path) -> dict[str, Path]:
    """By direction, the file of a cell's best vector for the aim of its study."""
    chosen: Any = read_chosen(cell / "records" / "chosen.json")
    aim = chosen.get("aim", "pairs")  # runs of version 0.1 have no other
    tail = "" if aim == "pairs" else f"-{aim}"
    return {d: cell / "vectors" / f"{d}-{method}{tail}.safetensors" for d, method in chosen[aim]["best"].items()}


def stored_prompting(facts: Mapping[str, Any]) -> Prompting:
    """The prompting that an artefact stores; the beginning of replies is not stored, so the user must give it."""
    asked = Prompting(facts["chat"], facts["system"])
    return replace(asked, split=_unknown_reply) if facts["begun"] else asked


def _unknown_reply(prompt: str) -> tuple[str, str]:
    raise InputError("reply: replies were begun where this was fitted; give the beginning of this one (reply, --reply)")


@contextmanager
def readable(what: str, path: Path) -> Iterator[None]:
    """Raise one InputError for every error that a missing or damaged file causes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors raises its own kinds for a broken file
        raise InputError(f"{what}: {path} cannot be read ({str(error).splitlines()[0]})") from error
