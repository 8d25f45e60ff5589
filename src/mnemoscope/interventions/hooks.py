"""Edits of a model's states inside a context: shift, ablate, patch; the only hook that writes.

Shapes: N examples, T tokens (columns) of a pass, L layers, D neurons, R rows of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mnemoscope.interventions.edits import Edit, Shift, as_edits
from mnemoscope.models import (
    Site,
    backbone_of,
    cached_columns,
    check_hookable,
    core_of,
    has_known_rows,
    prompts_of_rows,
    rows_of,
    site_module,
    states_of,
    with_states,
)
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Positions = Literal["decision", "all"]
# Options of ``generate`` that read a prompt in parts, or with guesses behind it: no pass ends at the decision position.
_NEED_START = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")
_ROWS = ("num_beams", "num_return_sequences")  # options that make several rows of a prompt
NOTHING_RAN = (
    "model: no pass of it ran inside the context, so nothing was steered; a copy that was compiled before does not see "
    "what is applied later (compile inside the context, or call the model itself)"
)
_MISSING = object()
# Of attributes that contexts have set, by object and name: the value before all, then those of the contexts.
_held: dict[tuple[int, str], list[tuple[object, Any]]] = {}
Changed = Callable[[Tensor], Tensor]  # states (N, T, D) from the decision position on -> other states


@dataclass(frozen=True)
class Gate:
    """Decides, in the pass that reads a prompt, whether its shift acts.

    It reads at ``site`` and ``layer``, at or below the first shift; ``acts``: states (N, D) -> bool (N,).
    """

    site: Site
    layer: int
    acts: Callable[[Tensor], Tensor]

    def is_below(self, site: Site, layer: int) -> bool:
        """Whether a pass reaches a shift there after the states that this gate reads."""
        order: tuple[Site, ...] = ("head", "attention", "neuron", "mlp", "block")  # within a layer
        return (self.layer, order.index(self.site)) <= (layer, order.index(site))


def shifted(
    model: PreTrainedModel,
    edits: Mapping[int, Tensor | Edit | tuple[Edit, ...]],
    site: Site,
    positions: Positions,
    start: int | None = None,
    gate: Gate | None = None,
    opening: Sequence[int] = (),
    factor: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Add edits to the states of some layers; gradients flow back into them.

    ``edits``: a tensor is a shift, (D,) or one for each prompt (N, D). ``factor``: on all of them, or one for each
    prompt (N,). ``opening``: token ids that every prompt must begin with. See ``SteeringVector.apply`` for the others.
    """
    tracker = _PositionTracker(start, everywhere=positions == "all", gate=gate, opening=tuple(opening))
    by_layer = {layer: as_edits(given) for layer, given in edits.items()}
    parts = {layer: [_adding(one, factor) for one in some] for layer, some in by_layer.items()}
    shifts = (one.shift_D for some in by_layer.values() for one in some if isinstance(one, Shift))
    rows = [len(shift) for shift in shifts if shift.ndim == 2]
    rows += [len(factor)] if factor is not None and factor.ndim == 1 else []
    tracker.prompts = next(iter(rows), None)
    return _edited(model, site, tracker, {layer: _summed(some) for layer, some in parts.items()})


def edited(
    model: PreTrainedModel,
    edits: Mapping[int, Changed],
    site: Site,
    positions: Positions = "decision",
    start: int | None = None,
) -> AbstractContextManager[None]:
    """Replace states of some layers by functions of them, which may be learned: gradients flow back.

    ``edits``: by layer, states (N, T, D) from the decision position on, or of all tokens, -> other states.
    """
    return _edited(model, site, _PositionTracker(start, everywhere=positions == "all"), edits)


def ablated(
    model: PreTrainedModel, means: Mapping[int, Tensor], chosen: Mapping[int, Tensor], site: Site
) -> AbstractContextManager[None]:
    """Mean-ablate neurons from the decision position on; by layer: ``means`` float32 (D,), ``chosen`` bool (D,)."""

    def holding(mean_D: Tensor, chosen_D: Tensor) -> Changed:
        return lambda states_NTD: torch.where(chosen_D.to(states_NTD.device), mean_D.to(states_NTD), states_NTD)

    edits = {layer: holding(mean_D, chosen[layer]) for layer, mean_D in means.items()}
    return _edited(model, site, _PositionTracker(None, everywhere=False), edits)


def patched(model: PreTrainedModel, layer: int, states_ND: Tensor, site: Site) -> AbstractContextManager[None]:
    """Patch a layer's states at the decision position, and only there, with those of another run, row by row."""
    tracker = _PositionTracker(None, everywhere=False)

    def patch(states_NTD: Tensor) -> Tensor:
        if tracker.decision_column is None:
            return states_NTD
        return torch.cat([states_ND[:, None].to(states_NTD), states_NTD[:, 1:]], dim=1)

    return _edited(model, site, tracker, {layer: patch})


@contextmanager
def adding(model: PreTrainedModel, added: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Add functions of modules' inputs to their outputs, by the name of the module, as an adapter that is not merged.

    A sum is made in the precision of what is added and then rounded to that of the output.
    """

    def hook(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, args, output: (output + function(args[0])).to(output.dtype)

    ran = list[bool]()
    with ExitStack() as stack:
        stack.callback(backbone_of(model).register_forward_pre_hook(lambda *_: ran.append(True)).remove)
        for name, function in added.items():
            stack.callback(core_of(model).get_submodule(name).register_forward_hook(hook(function)).remove)
        yield
        if added and not ran:
            raise InputError(NOTHING_RAN)


@contextmanager
def _edited(
    model: PreTrainedModel, site: Site, tracker: _PositionTracker, edits: Mapping[int, Changed]
) -> Iterator[None]:
    """Edit the states of some layers inside the context: the only hook of the package that writes."""
    core, config = core_of(model), getattr(model, "generation_config", None)
    check_hookable(model)
    tracker.edits = len(edits)
    with ExitStack() as stack:

        def hook(layer: int, at: Site, function: Callable[..., Any]) -> None:
            module, is_input = site_module(model, layer, at)
            register = module.register_forward_pre_hook if is_input else module.register_forward_hook
            stack.callback(register(function).remove)

        if config is not None:
            # With a cache of fixed size ``generate`` compiles its steps on a GPU once, without later hooks.
            stack.enter_context(_replaced(config, "disable_compile", True))
        # The base model is what every way of calling passes through, with a language-modelling head or without.
        stack.callback(backbone_of(model).register_forward_pre_hook(tracker.see, with_kwargs=True).remove)
        stack.callback(backbone_of(model).register_forward_hook(tracker.ends).remove)
        if (tracker.finds_start or tracker.prompts) and hasattr(core, "generate"):
            stack.enter_context(_replaced(core, "generate", _watched(core, tracker)))
        if tracker.gate:  # before the edits, so that it reads states without a shift
            hook(tracker.gate.layer, tracker.gate.site, tracker.read)
        for layer, edit in edits.items():
            hook(layer, site, partial(tracker.change, edit))
        yield
        if not tracker.ran:
            raise InputError(NOTHING_RAN)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object inside the context; contexts of one object may end in any order."""
    key, mine = (id(owner), name), (object(), value)
    held = _held.setdefault(key, [(None, owner.__dict__.get(name, _MISSING))])
    held.append(mine)
    setattr(owner, name, value)
    try:
        yield
    finally:
        held.remove(mine)
        left = held[-1][1]
        if len(held) == 1:
            del _held[key]
        if left is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, left)


def _watched(core: Any, tracker: _PositionTracker) -> Callable[..., Any]:
    """``core.generate``: refuses options under which no pass shows the decision position, counts rows of a prompt."""
    generate = core.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        described = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or core.generation_config
        option = {name: kwargs.get(name, getattr(described, name, None)) for name in (*_NEED_START, *_ROWS)}
        for name in _NEED_START if tracker.finds_start else ():
            if option[name]:
                raise InputError(f"start: with {name} say where the decision position is: apply(model, start=COLUMN)")
        tracker.rows_of_prompt = max(1, *(option[name] or 1 for name in _ROWS))
        try:
            return generate(*args, **kwargs)
        finally:
            tracker.rows_of_prompt = 1

    return watched


@dataclass
class _PositionTracker:
    """Finds the columns of each pass that an edit concerns, and the prompts that a gate lets it act on.

    Attributes:
        fixed: column of the decision position, if known; else it is the last column of each prompt.
        opening: token ids that every prompt must begin with.
        acts_N: the gate's decision for the prompts that are being answered.
        start: the first edited column, in columns of the left-padded batch; ``first_column``: of this pass.
        rows: of the batch of this pass.
        decision_column: of this pass, where it holds the decision position.
        prompts: number of factors, where each prompt has one; a batch has ``rows_of_prompt`` rows for each.
        edits: number of edited layers, of which ``left`` did not run in this pass yet.
        ran: whether any pass did.
    """

    fixed: int | None
    everywhere: bool
    gate: Gate | None = None
    opening: tuple[int, ...] = ()
    acts_N: Tensor | None = None
    start: int = 0
    rows: int = 0
    first_column: int = 0
    decision_column: int | None = None
    prompt_NT: Tensor | None = None
    prompts: int | None = None
    rows_of_prompt: int = 1
    edits: int = 0
    left: int = 0
    ran: bool = False

    @property
    def finds_start(self) -> bool:
        """Whether the decision position is the last column of a prompt."""
        return self.fixed is None and (not self.everywhere or self.gate is not None)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model: finds the columns of this pass."""
        self.left, self.ran = self.edits, True
        self.rows, cached = rows_of(args, kwargs), cached_columns(kwargs)
        past = cached or 0
        text_NT = args[0] if args else kwargs.get("input_ids")
        ids_NT = kwargs["inputs_embeds"][..., 0] if text_NT is None else text_NT
        end, is_set = past + ids_NT.shape[1], self.everywhere or self.fixed is not None
        # A pass that begins before the decision position is another prompt, on a cache of what both begin with.
        another = 0 < past <= self.start and not is_set
        continues = past > 0
        if self.prompt_NT is not None and cached is None:  # an empty cache always begins a prompt
            columns = self.prompt_NT.shape[1]
            continues = ids_NT.shape[1] > columns and torch.equal(ids_NT[:, :columns], self.prompt_NT)
        fresh = self.prompt_NT is None or another or not continues
        if fresh:
            self.prompt_NT, self.acts_N = ids_NT, None
            rows = self.rows if self.prompts is None else self.prompts * self.rows_of_prompt
            if self.rows != rows and not has_known_rows(self.rows):
                raise InputError(
                    f"alpha: {self.prompts} factors for a batch of {self.rows} rows; allowed is one for each prompt"
                )
            self._check(kwargs.get("attention_mask"), end, text_NT if past == 0 else None)
            self.start = (self.fixed or 0) if is_set else end - 1
        self.first_column = max(0, self.start - past)
        decision = self.start
        if self.everywhere and self.fixed is None:
            decision = end - 1 if fresh else -1
        self.decision_column = decision - past if past <= decision < end else None
        if fresh and self.gate and self.decision_column is None:
            raise InputError(f"start: {decision} is not among the columns {past} .. {end - 1} of this pass")

    def ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base model: refuses a pass that left out an edited layer, or ran one again."""
        if self.left > 0:
            raise InputError(f"model: {self.left} of {self.edits} steered layers did not run in this pass")
        if self.left < 0:
            raise InputError(f"model: {self.edits} steered layers ran {self.edits - self.left} times in this pass")

    def read(self, module: nn.Module, inputs: Any, output: Any = None) -> None:
        """Hook of the gate's site: decides in passes that hold the decision position."""
        if self.gate is not None and self.decision_column is not None:
            states_NTD = states_of(inputs if output is None else output, self.rows)
            self.acts_N = self.gate.acts(states_NTD[:, self.decision_column].detach())

    def change(self, edit: Changed, module: nn.Module, inputs: Any, output: Any = None) -> Any:
        """Hook of an edited site: changes its output, or its input, from the first column of this pass on."""
        self.left -= 1
        found = inputs if output is None else output
        states_NTD, first, acts_N = states_of(found, self.rows), self.first_column, self.acts_N
        if first >= states_NTD.shape[1] or (acts_N is not None and not acts_N.any()):
            return found
        edited = edit(states_NTD[:, first:])
        if first:
            edited = torch.cat([states_NTD[:, :first], edited], dim=1)
        if acts_N is not None:
            acts_R = acts_N[prompts_of_rows(len(states_NTD), len(acts_N)).to(acts_N.device)].to(states_NTD.device)
            edited = torch.where(acts_R[:, None, None], edited, states_NTD)
        return with_states(found, edited)

    def _check(self, mask: Any, columns: int, text_NT: Tensor | None) -> None:
        """Refuse prompts that end in padding, and ``text_NT`` that does not begin with the opening."""
        # A mask of other columns than those of the passes belongs to a cache that is not seen here.
        known = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == columns
        if self.finds_start and known and not bool(mask[:, -1].all()):
            raise InputError(
                "padding: a prompt of this batch ends in padding, so its last token is not where the others' are; pad "
                "on the left (tokenizer.padding_side = 'left')"
            )
        for row, ids in enumerate(text_NT.tolist() if self.opening and text_NT is not None else ()):
            first = int(mask[row].argmax()) if known else 0
            if tuple(ids[first : first + len(self.opening)]) != self.opening:
                raise InputError(
                    f"chat: prompt {row} of the batch is not formatted by the chat template, as those were that the "
                    "vector was fitted on; use Fitted.inputs, or apply_chat_template with the same system message"
                )


_Added = Callable[[Tensor], Tensor]  # states (N, T, D) -> what is added to them


def _summed(parts: Sequence[_Added]) -> Changed:
    """Add all parts to the states, each computed from the states before."""

    def add(states_NTD: Tensor) -> Tensor:
        return sum((part(states_NTD) for part in parts), states_NTD)

    return add


def _adding(edit: Edit, factor: Tensor | None) -> _Added:
    """An edit times a factor or one for each prompt; each prompt's rows follow one another."""
    if isinstance(edit, Shift):
        shift = edit.shift_D if factor is None else factor[..., None] * edit.shift_D
        placed = cache(shift.to)

        def constant(states_NTD: Tensor) -> Tensor:
            here = placed(states_NTD.device, states_NTD.dtype)
            return here if here.ndim == 1 else _of_rows(here, states_NTD)[:, None]

        return constant
    there = cache(lambda device: (edit.to(device), torch.ones(()) if factor is None else factor.to(device)))

    def added(states_NTD: Tensor) -> Tensor:
        here, of_prompts = there(states_NTD.device)
        rows = of_prompts if of_prompts.ndim == 0 else _of_rows(of_prompts, states_NTD)[:, None, None]
        return (rows * here.added(states_NTD)).to(states_NTD.dtype)

    return added


def _of_rows(of_prompts: Tensor, states_NTD: Tensor) -> Tensor:
    """Values of prompts for each row of a pass."""
    return of_prompts[prompts_of_rows(len(states_NTD), len(of_prompts)).to(of_prompts.device)]
