"""The only definition of layer and site, in every family of causal language models.

Shapes: N examples, T tokens (columns) of a pass, D neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mnemoscope.runs.errors import InputError, check_one_of

if TYPE_CHECKING:
    from mnemoscope.config import LayoutConfig

Site = Literal["block", "attention", "mlp", "neuron", "head"]
SITES: tuple[Site, ...] = ("block", "attention", "mlp", "neuron")  # that are swept
EVERY_SITE: tuple[Site, ...] = get_args(Site)


@dataclass(frozen=True, slots=True)
class Layout:
    """Attribute paths of a model's parts.

    Attributes:
        blocks: the list of blocks, from the model's root.
        attention, mlp: inside a block, the modules whose outputs are added to the residual stream: the norm where one
            comes before that sum.
        down: inside a block, the down projection, whose input are the MLP activations; "" where there is no single one
            (mixtures of experts), and site ``neuron`` does not exist.
    """

    blocks: str
    attention: str
    mlp: str
    down: str


# Paths of blocks, and of attention, MLP and down projection, by family. The first that fits is taken, so families with
# more parts come first.
_BLOCKS = ("transformer.h", "gpt_neox.layers", "model.layers", "model.decoder.layers", "model.language_model.layers")
_PARTS = (
    ("post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),  # Gemma 2 and 3, OLMo 2
    ("post_self_attn_layernorm", "post_mlp_layernorm", "mlp.down_proj"),  # GLM 4
    ("self_attn", "mlp", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma, Phi 3, Granite, Cohere, StableLM
    ("attn", "mlp", "mlp.c_proj"),  # GPT-2, GPT-Neo
    ("attn", "mlp", "mlp.fc_out"),  # GPT-J
    ("self_attn", "mlp", "mlp.fc2"),  # Phi
    ("self_attn", "mlp", "mlp.c_proj"),  # StarCoder 2
    ("attention", "mlp", "mlp.dense_4h_to_h"),  # GPT-NeoX
    ("self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),  # Falcon; BLOOM, whose parts add the residual
    ("self_attn", "fc2", "fc2"),  # OPT
    ("self_attn", "mlp", ""),  # mixtures of experts with the names of Llama
)
# Output projections of attention, inside a block: their input are the outputs of all heads, one behind the other.
_HEADS = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj"),
    *("attn.attention.out_proj", "attention.dense", "self_attention.dense"),
)
_chosen: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def use_layout(model: nn.Module, layout: Layout | LayoutConfig) -> None:
    """Set the layout of a model of no known family; InputError, which names the field, where it has no such part."""
    core = core_of(model)
    block = _first_block(core, layout.blocks)
    if block is None:
        raise InputError(f"layout.blocks: {layout.blocks!r} is no list of blocks in {type(core).__name__}")
    for name in ("attention", "mlp", "down"):
        path = getattr(layout, name)
        if _part(block, path) is None and (path or name != "down"):
            raise InputError(f"layout.{name}: a block of {type(core).__name__} has no part {path!r}")
    _chosen[core] = Layout(layout.blocks, layout.attention, layout.mlp, layout.down)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model; InputError where none fits, and none was set, or where the model is not causal."""
    core = core_of(model)
    if core not in _chosen:
        _chosen[core] = _found_layout(core)
    return _chosen[core]


def _found_layout(core: nn.Module) -> Layout:
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False) or "ForMaskedLM" in type(core).__name__:
        raise InputError(f"model: {type(core).__name__} is no causal language model (decoder only); one is wanted")
    for path in _BLOCKS:
        block = _first_block(core, path)
        for parts in _PARTS:
            if block is not None and all(_part(block, part) is not None for part in parts if part):
                return Layout(path, *parts)
    name = type(core).__name__
    raise InputError(f"model: {name} has no known block layout; say where blocks, attention, mlp and down are (layout)")


def _first_block(core: nn.Module, path: str) -> nn.Module | None:
    blocks = _part(core, path)
    return blocks[0] if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) else None


def _part(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def core_of(model: nn.Module) -> Any:
    """The transformers model itself, inside of adapters (peft) too."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def check_hookable(model: nn.Module) -> None:
    """Raises InputError for a compiled model, or one with a compiled part, which skips hooks that it did not see."""
    for name, module in model.named_modules():
        of_forward = hasattr(module.forward, "_torchdynamo_orig_callable")
        if of_forward or getattr(module, "_compiled_call_impl", None) or type(module).__name__ == "OptimizedModule":
            what = f"its part {name!r} is" if name else "it is"
            raise InputError(f"model: {what} compiled, so hooks would not run; give the model as it was before")


def backbone_of(model: nn.Module) -> Any:
    """The module that holds the blocks, without the language-modelling head."""
    return core_of(model).get_submodule(layout_of(model).blocks.rpartition(".")[0])


def width_of(model: nn.Module) -> int:
    """Neurons of the residual stream."""
    return int(core_of(model).config.get_text_config().hidden_size)


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The L blocks of a model, first to last."""
    return core_of(model).get_submodule(layout_of(model).blocks)


def site_module(model: nn.Module, layer: int, site: Site) -> tuple[nn.Module, bool]:
    """The module whose output is the site in a layer, and whether it is its *input* (sites ``neuron`` and ``head``).

    ``layer`` is 0-based, negative values count from the last. InputError where the layer or site does not exist.
    """
    layout, blocks = layout_of(model), blocks_of(model)
    if not -len(blocks) <= layer < len(blocks):
        raise InputError(f"layer: {layer} is not in {-len(blocks)} .. {len(blocks) - 1}")
    check_one_of("site", site, EVERY_SITE)
    paths = {"attention": [layout.attention], "mlp": [layout.mlp], "neuron": [layout.down], "head": _HEADS}
    parts = [blocks[layer]] if site == "block" else [_part(blocks[layer], path) for path in paths[site]]
    module = next((part for part in parts if part is not None), None)
    if module is None:  # in hybrids; neurons where the MLPs of a layer are several
        raise InputError(f"site: {site!r} does not exist in layer {layer} of {type(core_of(model)).__name__}")
    return module, site in ("neuron", "head")


def site_width(model: nn.Module, layer: int, site: Site) -> int:
    """Neurons of a site in a layer; raises InputError where the layer or site does not exist."""
    module, is_input = site_module(model, layer, site)
    if not is_input:
        return width_of(model)
    # A linear layer names it; GPT-2's transposed one has it as the first size of its weight.
    weight: Any = module.weight
    return int(getattr(module, "in_features", 0) or weight.shape[0])


def heads_of(model: nn.Module, layer: int) -> tuple[int, int]:
    """Attention heads of a layer, and the numbers each of them gives; InputError where they are not found."""
    heads = int(core_of(model).config.get_text_config().num_attention_heads)
    width, rest = divmod(site_width(model, layer, "head"), heads)
    if rest:
        raise InputError(f"site: 'head' has {heads} heads, which do not divide {heads * width + rest} numbers")
    return heads, width


def check_ran(left: int, total: int, what: str) -> None:
    """Raises InputError where of ``total`` hooked layers some are ``left`` behind a pass, or ran again."""
    if left > 0:
        raise InputError(f"model: {left} of {total} {what} layers did not run in this pass")
    if left < 0:
        raise InputError(f"model: {total} {what} layers ran {total - left} times in this pass")


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Batch size of a pass through the backbone."""
    ids = args[0] if args else kwargs.get("input_ids")
    return len(kwargs["inputs_embeds"] if ids is None else ids)


def states_of(value: Any, rows: int | None = None) -> Tensor:
    """The (N, T, D) states in the output of a module, a tensor or the first entry of a tuple.

    ``rows`` is N, for modules to which some families (OPT) give all rows as one.
    """
    states = value[0] if isinstance(value, tuple) else value
    if states.ndim == 2 and rows is not None:
        return states.view(rows, -1, states.shape[-1])
    if states.ndim != 3:
        raise InputError(f"layout: a part gives {tuple(states.shape)}; allowed are states, (prompts, tokens, neurons)")
    return states


def with_states(value: Any, states_NTD: Tensor) -> Any:
    """The output of a module, with other states."""
    before = value[0] if isinstance(value, tuple) else value
    states = states_NTD.view(before.shape) if before.ndim == 2 else states_NTD
    return (states, *value[1:]) if isinstance(value, tuple) else states
