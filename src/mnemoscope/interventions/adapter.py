"""Adapters (LoRA) that a context puts beside a model's weights and takes out again; in files, folders as peft has them.

They are judged as they were trained, beside the weights: merged into those of bfloat16, much of a small change is lost.

E. Hu et al. (2021), "LoRA: low-rank adaptation of large language models", arXiv 2106.09685.

Shapes: N prompts, I inputs and O outputs of a module, K rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn.functional import linear

from mnemoscope.behaviour import Asking
from mnemoscope.interventions.contract import Bench, Intervention, Toward
from mnemoscope.interventions.hooks import Alpha, Gate, adding, factors_of
from mnemoscope.models import adapt, check_peft, core_of, in_precision, is_adapted, prompts_of_rows, quick_precision
from mnemoscope.models.opening import ADAPTED
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mnemoscope.interventions.learning import Asked, Lesson
    from mnemoscope.interventions.sources import Labels

RANK, RATES = 8, (1e-3, 3e-4)
STRENGTHS = (0.25, 0.5, 1.0)  # of an adapter once it is trained
Loss = Callable[[Asking, "Asked"], Tensor]
PEFT = "base_model.model."  # before the name of a module, in peft's files


@dataclass(frozen=True, kw_only=True, repr=False)
class Adapter(Intervention):
    """What is added to the outputs of modules, as an adapter that is not merged.

    ``parts``: by the name of a module A (K, I) and B (O, K) times the adapter's scale: its output gets ``B A input``.
    """

    parts: Mapping[str, tuple[Tensor, Tensor]]
    strength: float = 1.0

    KIND: ClassVar[str] = "adapter"
    STORED: ClassVar[tuple[str, ...]] = ("parts",)
    changes_weights: ClassVar[bool] = True
    everywhere = True

    def apply(
        self, model: PreTrainedModel, alpha: Alpha = 1.0, start: int | None = None, gate: Gate | None = None
    ) -> AbstractContextManager[None]:
        """The context in which it is added; strength or alpha 0 changes nothing, bit by bit."""
        if gate is not None:
            raise InputError("gate: an adapter acts before the prompt is read; give one alpha for each prompt, 0 or 1")
        factor = self.strength * factors_of(alpha)

        def through(down_KI: Tensor, up_OK: Tensor) -> Callable[[Tensor], Tensor]:
            def added(inputs: Tensor) -> Tensor:
                found = linear(linear(inputs.to(down_KI.dtype), down_KI), up_OK)
                if factor.ndim == 0:
                    return float(factor) * found
                rows_R = factor[prompts_of_rows(len(found), len(factor))].to(found.device)
                return rows_R.view(-1, *[1] * (found.ndim - 1)) * found

            return added

        parts = {name: through(*both) for name, both in self.parts.items() if factor.any()}
        return adding(model, parts, len(factor) if factor.ndim else None)

    def scaled(self, alpha: float) -> Adapter:
        """The same with another strength."""
        return replace(self, strength=self.strength * alpha)

    def tensors(self) -> dict[str, Tensor]:
        """Two tensors a module, named as in peft, with the strength in them."""
        return {
            f"{PEFT}{name}.lora_{side}.weight": tensor
            for name, (down_KI, up_OK) in self.parts.items()
            for side, tensor in (("A", down_KI), ("B", self.strength * up_OK))
        }

    def facts(self) -> dict[str, Any]:
        """How it was fitted; its tensors hold the strength."""
        return super().facts() | {"strength": 1.0}

    def save(self, path: str | Path) -> list[Path]:
        """Write a folder that peft opens: tensors, our JSON, peft's configuration; ``path`` names it or its tensors."""
        path = Path(path).parent if Path(path).name == ADAPTED else Path(path)
        folder = path.with_suffix("") if path.suffix == ".safetensors" else path
        folder.mkdir(parents=True, exist_ok=True)
        rank = max((len(down_KI) for down_KI, _ in self.parts.values()), default=RANK)
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
        described |= {"r": rank, "lora_alpha": rank, "target_modules": sorted(self.parts)}
        content = (json.dumps(described, indent=1) + "\n").encode()
        return [*super().save(folder / ADAPTED), write_atomically(folder / "adapter_config.json", content)]

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build one from stored tensors; KeyError where one of two is missing."""
        cls.check_kind(facts)
        names = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
        both = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
        return cls(parts={name.removeprefix(PEFT): pair for name, pair in both.items()}, **facts)


def adapters(bench: Bench, method: str, toward: Toward, loss: Loss | None = None) -> list[Intervention]:
    """Adapters trained at each of ``RATES``, each at every one of ``STRENGTHS``; of a fit at the first rate alone.

    ``loss``: of the adapted model and a batch of wanted answers; default: their negative log probability, as of those
    that should stay, where these are not ``held``. Raises InputError where peft is missing, or the model holds an
    adapter already.
    """
    found = list[Intervention]()
    for rate in RATES[:1] if bench.tried.low_rank else RATES:
        whole = trained(bench, method, toward, rate, loss=loss)
        found += [replace(whole, strength=one, setting={"rate": rate, "strength": one}) for one in STRENGTHS]
    return found


def again(bench: Bench, one: Adapter, several: Sequence[Labels], loss: Loss | None = None) -> list[Adapter]:
    """The same trained on other labels or answers, one by one."""
    rate, strength = one.setting["rate"], one.setting["strength"] * one.setting.get("scaled", 1.0)  # as in its tensors
    return [trained(bench, one.method, one.toward, rate, labels, loss).scaled(strength) for labels in several]


def trained(
    bench: Bench, method: str, toward: Toward, rate: float, labels: Labels | None = None, loss: Loss | None = None
) -> Adapter:
    """Train an adapter, as answered or on other labels; the model itself is left as it was."""
    from mnemoscope.config import LoraConfig  # who uses adapters needs neither YAML nor statistics
    from mnemoscope.interventions.learning import Asked, descend, held, log_p, wanted_batches
    from mnemoscope.interventions.sources import ANSWERED

    check_peft("lora, dpo")
    model, labels = bench.asking.model, labels or ANSWERED
    if is_adapted(model) or hasattr(model, "peft_config"):
        raise InputError("lora, dpo: the model holds an adapter already; give it without one, or merged")
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    precision, lists = quick_precision(model), bench.lists
    adapted = adapt(model, LoraConfig(rank=RANK), bench.seed)
    try:
        lists = replace(lists, asking=replace(lists.asking, model=adapted))
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

        def cost(asking: Asking, asked: Asked) -> Tensor:
            return -log_p(asking, [asked]).mean()

        def lesson(of: Loss, asked: Asked) -> Lesson:
            return lambda _: of(lists.asking, asked)

        with in_precision(adapted, precision):
            wanted = [lesson(loss or cost, asked) for asked in wanted_batches(lists, toward, labels)]
            if lists.held:
                kept = held(lists, toward, nullcontext)
            else:
                kept = [lesson(cost, Asked.first(batch)) for batch in lists.kept[toward]]
            descend(parameters, rate, lambda: None, (wanted, kept), lists.steps)
        parts = _parts(adapted)
    finally:
        adapted.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(name, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name])
    return Adapter(toward=toward, method=method, parts=parts, setting={"rate": rate})


def _parts(adapted: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    from peft.tuners.lora import LoraLayer

    layers = ((name, module) for name, module in core_of(adapted).named_modules() if isinstance(module, LoraLayer))
    return {
        name: (
            module.lora_A["default"].weight.detach().clone(),
            module.scaling["default"] * module.lora_B["default"].weight.detach(),
        )
        for name, module in layers
    }
