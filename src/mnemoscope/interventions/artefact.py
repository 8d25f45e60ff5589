"""The base of vectors and detectors: the model they were fitted on, format of prompts, card, files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BeforeValidator
from torch import Tensor

from mnemoscope.behaviour import PLAIN, Prompting
from mnemoscope.models import core_of, merged_weights
from mnemoscope.models.opening import ADAPTED
from mnemoscope.runs.digests import facts_digest, inside, intact, is_there
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.files import plain, write_atomically
from mnemoscope.runs.schemas import ArtefactFacts, read_chosen
from mnemoscope.runs.strict import read_bytes, read_json, validated

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Not its padding and truncation, which every call may change.
TOKENIZING = ("model", "added_tokens", "normalizer", "pre_tokenizer")
Figure = Annotated[int | float, BeforeValidator(lambda value: math.nan if value is None else value)]  # JSON has null


@dataclass(frozen=True, slots=True)
class Binding:
    """Fingerprint of the model that an artefact was fitted on; any other is refused."""

    model_type: str  # of the configuration
    weights: str  # SHA-256 of the exact bytes of all parameters, by name, with an adapter (LoRA) merged into them
    tokenizer: str  # SHA-256 of the fast tokenizer's parts in ``TOKENIZING``
    dtype: str = ""  # of the parameters; a model that is opened in another one is compared by what both round to
    rounded: str = ""  # as ``weights``, rounded to bfloat16
    half: str = ""  # the same, but rounded to float16 before

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Binding:
        """Fingerprint a model and its tokenizer, reading every weight; InputError where one is not in memory."""
        digests, kinds = [hashlib.sha256() for _ in range(3)], set()
        for name, weight in sorted(merged_weights(model), key=itemgetter(0)):
            if weight.is_meta:
                raise InputError(f"device_map: {name} is not in memory; use devices that hold the whole model")
            whole = weight.detach()
            kinds.add(str(whole.dtype).removeprefix("torch."))
            forms = whole, whole.to(torch.bfloat16), whole.to(torch.float16).to(torch.bfloat16)
            for digest, form in zip(digests, forms, strict=True):
                digest.update(f"{name} {tuple(form.shape)}".encode())
                digest.update(form.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        words = json.dumps({part: parts.get(part) for part in TOKENIZING}, sort_keys=True)
        tokens = hashlib.sha256(words.encode()).hexdigest()
        exact, *rounded = (digest.hexdigest() for digest in digests)
        return cls(core_of(model).config.model_type, exact, tokens, ",".join(sorted(kinds)), *rounded)

    def has_weights_of(self, other: Binding) -> bool:
        """Whether the weights are the same, byte by byte, or where the precision is another, once they are rounded."""
        if self.dtype == other.dtype:
            return self.weights == other.weights
        return bool({self.rounded, self.half} & {other.rounded, other.half})

    def check(self, found: Binding, what: str, hint: str = "") -> None:
        """Raises InputError where another model was ``found``; the field that differs is named."""
        for name in ("model_type", "weights", "tokenizer"):
            mine, value = getattr(self, name), getattr(found, name)
            if not (self.has_weights_of(found) if name == "weights" else mine == value):
                raise InputError(f"{name}: the {what} was made on {mine}, this model has {value}{hint}")


@dataclass(frozen=True)
class Card:
    """Figures of the test split and their origin; None or empty where not measured.

    A rate has ``estimate``, ``low``, ``high`` (95 %) and ``n``.
    """

    fitted_on: str  # study, task and model
    shift: dict[str, Figure] | None = None  # share of test prompts that change to the target behaviour
    control: dict[str, str | Figure] | None = None  # the strongest one: ``name``, ``estimate`` (mean of draws)
    cost: dict[str, Figure] = field(default_factory=dict)  # change in accuracy of each list that should not be affected
    divergence: dict[str, Figure] = field(default_factory=dict)  # KL in nats a token on neutral text, by dose
    auroc: dict[str, Figure] | None = None  # of a detector, with ``input_only`` beside it
    pairs: int = 0  # of the fit split, as ``groups``
    groups: int = 0
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that made it
    proven: dict[str, str] = field(default_factory=dict)  # by engine, what ``mnemoscope doctor --server`` has shown

    def __str__(self) -> str:
        beside, strongest = (self.auroc or {}).get("input_only"), self.control or {}
        doses = ", ".join(f"{kl:.4f} at {dose}" for dose, kl in self.divergence.items())
        lines = [
            f"fitted on {self.fitted_on}: {self.pairs} pairs of {self.groups} groups",
            self.shift and f"test shift {_interval(self.shift)}",
            strongest and f"strongest control of the same norm: {strongest['name']} {strongest['estimate']:.3f}",
            self.auroc and f"test AUROC {_interval(self.auroc)}" + (f"; input only {beside:.3f}" if beside else ""),
            self.cost and "cost, change in accuracy: " + ", ".join(f"{k} {v:+.3f}" for k, v in self.cost.items()),
            doses and f"divergence on neutral text, nats a token: {doses} times the vector",
            self.versions and "made with " + ", ".join(map(" ".join, self.versions.items())),
            *(f"proven on {engine}: {shown}" for engine, shown in self.proven.items()),
        ]
        return "\n".join(line for line in lines if line)


def _interval(rate: dict[str, float]) -> str:
    low, high = (rate.get(end, math.nan) for end in ("low", "high"))
    interval = "no interval, as groups are few" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
    return f"{rate['estimate']:.3f} {interval}, n = {rate['n']:.0f}"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Base class of what two files store: ``.safetensors`` the fields in ``STORED``, ``.json`` the others."""

    task: str = ""  # label of the task it was fitted on
    binding: Binding | None = None  # the model it was fitted on
    prompting: Prompting = PLAIN  # the format of prompts there
    commit: str = ""  # version of the code that made it
    card: Card | None = None  # its figures on the test split

    WHAT: ClassVar[str] = "artefact"
    STORED: ClassVar[tuple[str, ...]] = ()
    DTYPE: ClassVar[torch.dtype] = torch.float32  # of its tensors
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
        facts = json.loads(json.dumps(plain(self.facts()), allow_nan=False))
        digests = {"tensors": hashlib.sha256(content).hexdigest(), "facts": facts_digest(facts)}
        text = json.dumps(facts | {"digest": digests}, indent=1, sort_keys=True, allow_nan=False) + "\n"
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

        ``force`` accepts another model of the same shape, and an artefact of an earlier version, whose facts have no
        digest.

        Raises:
            InputError: the files are missing or damaged (a digest differs), the model is another (the field that
                differs is named), or it is given without its tokenizer.
        """
        from safetensors.torch import load

        facts, content = read_artefact(cls.WHAT, path := tensors_file(Path(path)), cls.FACTS, force)
        with refusing(f"{cls.WHAT}: {path} cannot be read"):
            facts["prompting"] = _stored_prompting(facts["prompting"])
            stored = load(content)
            if other := {str(tensor.dtype) for tensor in stored.values() if tensor.dtype != cls.DTYPE}:
                raise ValueError(f"its tensors are {', '.join(sorted(other))}, and were saved as {cls.DTYPE}")
            made = cls.with_tensors(stored, facts)
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
            self.binding.check(found or Binding.of(model, tokenizer), self.WHAT, "; force overrides")
        self.check_shape(model)


def read_artefact(
    what: str, path: Path, kind: Any = ArtefactFacts, force: bool = False
) -> tuple[dict[str, Any], bytes]:
    """Facts and tensors of an artefact, once the digests of both are found to be right; see ``Artefact.load``."""
    with refusing(f"{what}: {path} cannot be read"):
        content = read_bytes(path, what)
        facts: dict[str, Any] = {**read_json(path.with_suffix(".json"), kind)}
        digests = facts.pop("digest")
        if isinstance(digests, str):  # of the tensors alone
            if not force:
                raise ValueError("an earlier version wrote it, without a digest of its facts; fit again, or force")
            digests = {"tensors": digests, "facts": facts_digest(facts)}
        for part, found in (("tensors", hashlib.sha256(content).hexdigest()), ("facts", facts_digest(facts))):
            if digests[part] != found:
                raise ValueError(f"the digest of its {part} differs: one of its two files was changed")
        for name, kind in (("binding", Binding | None), ("card", Card | None)):
            facts[name] = validated(facts[name], kind, f"{path.with_suffix('.json')}: {name}")
    return facts, content


def tensors_file(path: Path) -> Path:
    """Where the tensors of an artefact are: an adapter is a folder, which may be named as its file would be."""
    folder = path.with_suffix("") if path.suffix == ".safetensors" else path
    return folder / ADAPTED if (folder / "adapter_config.json").is_file() else path


def chosen_paths(cell: Path) -> dict[tuple[str, str], Path]:
    """By direction and method, the tensors of all that was chosen in a cell, for the aim of its study."""
    chosen: Any = read_chosen(intact(cell / "records" / "chosen.json"))
    aim, folder = chosen.get("aim", "pairs"), cell / "vectors"  # runs of version 0.1 have no aim
    found = {}
    for method, directions in chosen[aim]["methods"].items():
        for direction in directions:
            # Runs of version 0.2 have a vector for either aim.
            names = (f"{direction}-{method}-{aim}.safetensors", f"{direction}-{method}.safetensors")
            there = [name for name in names if is_there(inside(folder, name))]
            found[direction, method] = tensors_file(inside(folder, (there or names[1:])[0]))
    return found


def best_paths(cell: Path, levers: bool = False) -> dict[str, Path]:
    """By direction, the file of a cell's best vector for the aim of its study; ``levers``: of all that was tried."""
    chosen: Any = read_chosen(intact(cell / "records" / "chosen.json"))
    best = chosen[chosen.get("aim", "pairs")]["best"] | (chosen.get("levers", {}) if levers else {})
    paths = chosen_paths(cell)
    return {direction: intact(paths[direction, method]) for direction, method in best.items()}


def _stored_prompting(facts: Mapping[str, Any]) -> Prompting:
    """The prompting that an artefact stores; the beginning of replies is not stored, so the user must give it."""
    return Prompting(facts["chat"], facts["system"], split=_unknown_reply if facts["begun"] else None)


def _unknown_reply(prompt: str) -> tuple[str, str]:
    raise InputError("reply: replies were begun where this was fitted; give the beginning of this one (reply, --reply)")
