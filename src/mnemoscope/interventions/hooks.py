"""Edits of a model's states inside a context: shift, ablate, patch; the only hook here that writes.

Shapes: N examples, T tokens (columns) of a pass, L layers, D neurons, R rows of a pass, H heads, C columns so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mnemoscope.interventions.edits import Edit, as_edits
from mnemoscope.models import (
    Site,
    backbone_of,
    blocks_of,
    cached_columns,
    check_hookable,
    check_ran,
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

Positions = Literal["decision", "all", "once"]
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
Alpha = float | Sequence[float] | Tensor  # a factor, or one for each prompt (N,)
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


@contextmanager
def edited(
    model: PreTrainedModel,
    edits: Mapping[int, Tensor | Edit | tuple[Edit, ...] | Changed],
    site: Site,
    positions: Positions = "decision",
    start: int | None = None,
    gate: Gate | None = None,
    opening: Sequence[int] = (),
) -> Iterator[None]:
    """Edit the states of some layers inside the context; gradients flow back into the edits. The only hook that writes.

    ``edits``: by layer; several are added to the state before. ``positions``: ``once`` is the decision position alone.
    ``opening``: token ids that every prompt must begin with. See ``SteeringVector.apply`` for the others.
    """
    changes = {layer: given if callable(given) else as_edits(given) for layer, given in edits.items()}
    every = [one for some in changes.values() if isinstance(some, tuple) for one in some]
    prompts = next((one.prompts for one in every if one.prompts is not None), None)
    tracker = _PositionTracker(start, positions, gate, tuple(opening), prompts, len(edits))
    core, config = core_of(model), getattr(model, "generation_config", None)
    check_hookable(model)
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
        if gate:  # before the edits, so that it reads states without a shift
            hook(gate.layer, gate.site, tracker.read)
        for layer, change in changes.items():
            hook(layer, site, partial(tracker.change, _changing(change) if isinstance(change, tuple) else change))
        yield
        if not tracker.ran:
            raise InputError(NOTHING_RAN)


def _changing(edits: tuple[Edit, ...]) -> Changed:
    """What edits make of states, each computed from the states before."""
    there = cache(lambda device: [one.to(device) for one in edits])

    def change(states_NTD: Tensor) -> Tensor:
        here = [one.of_rows(len(states_NTD)) for one in there(states_NTD.device)]
        if len(here) == 1:
            return here[0].changed(states_NTD)
        return sum((one.added(states_NTD).to(states_NTD.dtype) for one in here), states_NTD)

    return change


@contextmanager
def adding(
    model: PreTrainedModel, added: Mapping[str, Callable[[Tensor], Tensor]], prompts: int | None = None
) -> Iterator[None]:
    """Add functions of modules' inputs to their outputs, by the name of the module, as an adapter that is not merged.

    A sum is made in the precision of what is added and then rounded to that of the output. ``prompts``: of every batch,
    where the functions have a factor for each.
    """

    def hook(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, args, output: (output + function(args[0])).to(output.dtype)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ran.append(True)
        _check_rows(rows_of(args, kwargs), prompts)

    ran = list[bool]()
    with ExitStack() as stack:
        stack.callback(backbone_of(model).register_forward_pre_hook(see, with_kwargs=True).remove)
        for name, function in added.items():
            stack.callback(core_of(model).get_submodule(name).register_forward_hook(hook(function)).remove)
        yield
        if added and not ran:
            raise InputError(NOTHING_RAN)


@contextmanager
def attending(model: PreTrainedModel, text_NT: Tensor | None, added_H: Mapping[int, Tensor]) -> Iterator[None]:
    """Add a number for each head, by layer, times ``text_NT`` to attention logits at columns of a left-padded batch."""
    text_RC = torch.empty(0)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal text_RC
        if text_NT is None:
            raise InputError("text: where it stands is not known inside a pass; answer by fitted.generate")
        given = args[0] if args else kwargs.get("input_ids")
        rows, columns = (kwargs["inputs_embeds"] if given is None else given).shape[:2]
        later = (cached_columns(kwargs) or 0) + columns - text_NT.shape[1]
        text_RC = nn.functional.pad(text_NT[prompts_of_rows(rows, len(text_NT)).to(text_NT.device)], (0, later))

    def add(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states_RTD, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask", "none")
        added = text_RC.to(states_RTD)[:, None, None] * added_H[layer].to(states_RTD)[:, None, None]
        queries, columns, least = states_RTD.shape[1], text_RC.shape[1], torch.finfo(added.dtype).min
        mask = added.new_ones(1, 1, queries, columns).tril(columns - queries).bool() if mask is None else mask
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise InputError("model: its attention is given no mask of queries and keys, to which numbers can be added")
        beside = mask.shape[-1] - columns  # a window has the last columns, a cache of a fixed size more than all
        added = nn.functional.pad(added, (min(beside, 0), max(beside, 0)))
        mask = torch.where(mask, added, least) if mask.dtype == torch.bool else mask + added
        return args, kwargs | {"attention_mask": mask}

    check_hookable(model)
    with ExitStack() as stack:
        stack.callback(backbone_of(model).register_forward_pre_hook(see, with_kwargs=True).remove)
        for layer in added_H:
            parts, (projection, _) = blocks_of(model)[layer].modules(), site_module(model, layer, "head")
            attention = next(part for part in parts if projection in part.children())
            stack.callback(attention.register_forward_pre_hook(partial(add, layer), with_kwargs=True).remove)
        yield
        if not text_RC.numel():
            raise InputError(NOTHING_RAN)


def factors_of(alpha: Alpha) -> Tensor:
    """A factor, or one for each prompt, as float32; InputError where one is not finite."""
    factor = torch.as_tensor(alpha, dtype=torch.float32).cpu()
    if factor.ndim > 1 or not bool(factor.isfinite().all()):
        raise InputError(f"alpha: {alpha} is neither a finite number nor one for each prompt")
    return factor


def _check_rows(rows: int, prompts: int | None, each: int = 1) -> None:
    """Raises InputError where the rows of a batch are not ``each`` of as many prompts as there are factors."""
    if prompts is not None and rows != prompts * each and not has_known_rows(rows):
        raise InputError(f"alpha: {prompts} factors for a batch of {rows} rows; allowed is one for each prompt")


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
    """Finds the columns of each pass that an edit concerns, and the prompts that a gate lets it act on."""

    fixed: int | None  # column of the decision position, if known; else it is the last column of each prompt
    positions: Positions
    gate: Gate | None
    opening: tuple[int, ...]  # token ids that every prompt must begin with
    prompts: int | None  # number of factors, where each prompt has one; a batch has ``rows_of_prompt`` rows for each
    edits: int  # number of edited layers, of which ``left`` did not run in this pass yet
    acts_N: Tensor | None = None  # the gate's decision for the prompts that are being answered
    start: int = 0  # the first edited column, in columns of the left-padded batch; ``first_column``: of this pass
    rows: int = 0  # of the batch of this pass
    first_column: int = 0
    decision_column: int | None = None  # of this pass, where it holds the decision position
    prompt_NT: Tensor | None = None
    rows_of_prompt: int = 1
    left: int = 0
    ran: bool = False  # whether any pass did

    @property
    def everywhere(self) -> bool:
        """Whether columns before the decision position are edited too."""
        return self.positions == "all"

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
            _check_rows(self.rows, self.prompts, self.rows_of_prompt)
            self._check(kwargs.get("attention_mask"), end, text_NT if past == 0 else None)
            self.start = 0 if self.everywhere else end - 1 if self.fixed is None else self.fixed
        self.first_column = max(0, self.start - past)
        decision = self.start if self.fixed is None else self.fixed
        if self.everywhere and self.fixed is None:
            decision = end - 1 if fresh else -1
        self.decision_column = decision - past if past <= decision < end else None
        if fresh and self.gate and self.decision_column is None:
            raise InputError(f"start: {decision} is not among the columns {past} .. {end - 1} of this pass")

    def ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base model: refuses a pass that left out an edited layer, or ran one again."""
        check_ran(self.left, self.edits, "steered")

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
        end, once = states_NTD.shape[1], self.positions == "once"
        none = first >= end or (once and self.decision_column is None)
        if none or (acts_N is not None and not acts_N.any()):
            return found
        end = first + 1 if once else end
        edited = edit(states_NTD[:, first:end])
        if edited.shape != states_NTD.shape:
            edited = torch.cat([states_NTD[:, :first], edited, states_NTD[:, end:]], dim=1)
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
