"""Adapters (LoRA) trained on the fit lists, which a context puts beside a model's weights and takes out again.

They are judged as they were trained, beside the weights: merged into those of bfloat16, much of a small change is lost.

E. Hu et al. (2021), "LoRA: low-rank adaptation of large language models", arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import linear

from mnemoscope.arena.contract import Applied
from mnemoscope.arena.fitting import Loss, descend
from mnemoscope.arena.lists import Bench
from mnemoscope.behaviour import Asking
from mnemoscope.config import LoraConfig
from mnemoscope.errors import InputError
from mnemoscope.models import adapt, check_peft, core_of, in_precision, is_adapted, quick_precision
from mnemoscope.steering import Toward, adding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 8
Adapter = Mapping[str, tuple[Tensor, Tensor]]  # by the name of a module, see ``_parts``


def trained(
    bench: Bench, toward: Toward, rate: float, loss: Callable[[Asking], Loss], kept: Callable[[Asking], Loss]
) -> Adapter:
    """Train an adapter and return it; the model itself is left as it was.

    Args:
        loss, kept: made of the adapted model's ``Asking``: for wanted answers, and for those that should stay.

    Raises:
        InputError: peft is missing, or the model holds an adapter already.
    """
    check_peft("lora, dpo")
    model = bench.asking.model
    if is_adapted(model) or hasattr(model, "peft_config"):
        raise InputError("lora, dpo: the model holds an adapter already; give it without one, or merged")
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    precision = quick_precision(model)
    adapted = adapt(model, LoraConfig(rank=RANK), bench.config.seed)
    try:
        asking = replace(bench.lists.asking, model=adapted)
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        with in_precision(adapted, precision):
            descend(bench.lists, toward, parameters, loss(asking), rate, kept(asking))
        return _parts(adapted)
    finally:
        adapted.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(name, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name])


def _parts(adapted: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each module A (K, I) and B (O, K) times the adapter's scale: its output gets ``B A input``."""
    from peft.tuners.lora import LoraLayer

    layers = ((name, module) for name, module in core_of(adapted).named_modules() if isinstance(module, LoraLayer))
    return {
        name: (
            module.lora_A["default"].weight.detach().clone(),
            module.scaling["default"] * module.lora_B["default"].weight.detach(),
        )
        for name, module in layers
    }


def with_adapter(model: PreTrainedModel, adapter: Adapter, strength: float = 1.0) -> Applied:
    """The context in which an adapter is added to its modules' outputs; strength 0 changes nothing, bit by bit."""

    def through(down_KI: Tensor, up_OK: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda inputs: strength * linear(linear(inputs.to(down_KI.dtype), down_KI), up_OK)

    return lambda start: adding(model, {name: through(*parts) for name, parts in adapter.items() if strength})
