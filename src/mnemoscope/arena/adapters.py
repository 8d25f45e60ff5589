"""Adapters (LoRA) trained on the fit lists, as other weights that a context puts into a model and takes out again.

E. Hu et al. (2021), "LoRA: low-rank adaptation of large language models", arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mnemoscope.arena.contract import Applied
from mnemoscope.arena.fitting import Loss, descend
from mnemoscope.arena.lists import Bench
from mnemoscope.behaviour import Asking
from mnemoscope.config import LoraConfig
from mnemoscope.errors import InputError
from mnemoscope.models import adapt, check_peft, core_of, in_precision, is_adapted, quick_precision
from mnemoscope.steering import Toward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 8
Deltas = Mapping[str, Tensor]  # by the name of a module's weight, what is added to it


def trained(
    bench: Bench, toward: Toward, rate: float, loss: Callable[[Asking], Loss], kept: Callable[[Asking], Loss]
) -> Deltas:
    """Train an adapter and return what it adds to each weight; the model itself is left as it was.

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
        return _deltas(adapted)
    finally:
        adapted.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(name, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name])


def _deltas(adapted: nn.Module) -> dict[str, Tensor]:
    from peft.tuners.lora import LoraLayer

    layers = ((name, module) for name, module in core_of(adapted).named_modules() if isinstance(module, LoraLayer))
    return {name: module.get_delta_weight("default").detach() for name, module in layers}


def with_weights(model: PreTrainedModel, deltas: Deltas, strength: float = 1.0) -> Applied:
    """The context in which weights are those of a merged adapter; strength 0 leaves them as they are, bit by bit."""

    @contextmanager
    def applied(start: int | None) -> Iterator[None]:
        core: Any = core_of(model)
        before = {name: core.get_submodule(name).weight for name in deltas}
        try:
            for name, weight in before.items() if strength else ():
                merged = weight.detach() + strength * deltas[name].to(weight)
                core.get_submodule(name).weight = nn.Parameter(merged, requires_grad=False)
            yield
        finally:
            for name, weight in before.items():
                core.get_submodule(name).weight = weight

    return applied
