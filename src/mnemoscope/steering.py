"""Steering vectors: a sparse shift per layer that turns a model towards one behaviour while it answers.

Shapes: N examples, T tokens (columns) of a pass, L layers, D neurons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.errors import InputError
from mnemoscope.models import (
    PLAINLY,
    SITES,
    Site,
    backbone_of,
    blocks_of,
    cache_in,
    cached_columns,
    context_length,
    core_of,
    end_ids,
    forked,
    prompts_of_rows,
    rows_of,
    site_module,
    site_width,
    states_of,
    with_states,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.contrast import Contrast

Toward = Literal["generalized", "memorized"]
Positions = Literal["decision", "all"]
_Edit = Callable[[Tensor], Tensor]  # states (N, T, D) from the decision position on -> other states
# (model, ids (N, T), mask of all columns (N, .), cache of those before or None) -> bool (N,), whether to act; the last
# column is the decision position. Whatever it asks the model is answered without a shift.
Gate = Callable[["PreTrainedModel", Tensor, Tensor, Any], Tensor]
# True while a gate asks a model: what it hears then is answered without any shift, whoever applies it.
_ASKING: ContextVar[bool] = ContextVar("asking", default=False)
OPPOSITE: dict[Toward, Toward] = {"generalized": "memorized", "memorized": "generalized"}


@dataclass(frozen=True, slots=True)
class Binding:
    """What a vector was made on; a vector is refused where any of it differs.

    Attributes:
        model_type: the configuration's ``model_type``.
        weights: SHA-256 of all parameters, by name.
        tokenizer: SHA-256 of the fast tokenizer.
    """

    model_type: str
    weights: str
    tokenizer: str

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Binding:
        """Fingerprint a model and its tokenizer (reads every weight once)."""
        digest = hashlib.sha256()
        for name, weight in sorted(model.named_parameters()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        words = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["model"], sort_keys=True)
        return cls(core_of(model).config.model_type, digest.hexdigest(), hashlib.sha256(words.encode()).hexdigest())

    @staticmethod
    def check(bound: Binding | None, found: Binding, what: str) -> None:
        """Raises InputError where a model is not the one that ``what`` was made on; the field that differs is named."""
        for name, value in asdict(found).items():
            made_on = getattr(bound, name, None)
            if made_on != value:
                raise InputError(f"{name}: the {what} was made on {made_on}, this model has {value}; force overrides")


@dataclass(frozen=True)
class SteeringVector:
    """A shift for one direction of turning.

    Attributes:
        toward: the behaviour it turns to.
        shifts: float32 (D,) per 0-based layer; layers without a shift are absent.
        site: where in a layer the shift is added.
        positions: ``decision``: from the decision position on, every decoded token included; ``all``: everywhere.
        method, task, top, strength: how it was made; for the reader.
        binding: the model it was made on, or None.
        commit: version of the code that made it.
        chat: whether the prompts it was made of were put by a chat template.
    """

    toward: Toward
    shifts: Mapping[int, Tensor]
    site: Site = "block"
    positions: Positions = "decision"
    method: str = "custom"
    task: str = ""
    top: float = 1.0
    strength: float = 1.0
    binding: Binding | None = None
    commit: str = ""
    chat: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("toward", self.toward, tuple(OPPOSITE)),
            ("site", self.site, SITES),
            ("positions", self.positions, ("decision", "all")),
        ):
            if value not in allowed:
                raise InputError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        kept = {layer: shift.float() for layer, shift in sorted(self.shifts.items()) if bool(shift.any())}
        for layer, shift in kept.items():
            if shift.ndim != 1 or not bool(shift.isfinite().all()):
                raise InputError(f"shifts: layer {layer} has shape {tuple(shift.shape)} or a value that is not finite")
        object.__setattr__(self, "shifts", kept)

    @classmethod
    def from_contrast(
        cls, contrast: Contrast, *, toward: Toward, top: float = 0.1, strength: float = 1.0, relative: bool = False
    ) -> SteeringVector:
        """The neuron-wise mean difference on the ``top`` share of all neurons by |rho|.

        The paper's shift is ``alpha * sign(rho) * |NMD|``, which equals ``alpha * NMD`` where labels are balanced
        (arXiv 2412.18497; ``cov(h, y) = NMD / 2``). With ``relative`` each layer's shift is scaled instead to
        ``strength`` times the root mean square norm of that layer's states, so that no layer decides alone.

        Raises:
            ValueError: ``top`` is not in (0, 1].
        """
        shift_LD = np.where(contrast.top_neurons(top), contrast.nmd_LD, 0.0)
        if relative:
            shift_LD = scaled_to(shift_LD, contrast.state_norm_L)
        vector = cls(toward, {}, contrast.site, top=top, strength=strength)  # type: ignore[arg-type]
        sign = 1.0 if toward == "generalized" else -1.0
        return replace(vector.with_dense(sign * strength * shift_LD), method="nmd-relative" if relative else "nmd")

    @property
    def layers(self) -> list[int]:
        """The layers that are shifted, ascending."""
        return list(self.shifts)

    def dense(self, layers: int, neurons: int) -> np.ndarray:
        """All shifts as a float32 array (L, D), zero where there is none."""
        shift_LD = np.zeros((layers, neurons), np.float32)
        for layer, shift in self.shifts.items():
            shift_LD[layer] = shift.numpy()
        return shift_LD

    def with_dense(self, shift_LD: np.ndarray) -> SteeringVector:
        """The same vector with other shifts."""
        return replace(
            self, shifts={layer: torch.from_numpy(row.astype(np.float32)) for layer, row in enumerate(shift_LD)}
        )

    def __mul__(self, factor: float) -> SteeringVector:
        if factor < 0:
            return -(self * -factor)
        scaled = {layer: shift * factor for layer, shift in self.shifts.items()}
        return replace(self, shifts=scaled, strength=self.strength * factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        """The opposite shift; it turns to the other behaviour."""
        return replace(
            self, toward=OPPOSITE[self.toward], shifts={layer: -shift for layer, shift in self.shifts.items()}
        )

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """Both shifts at once; keeps this vector's direction of turning.

        Raises:
            InputError: site, positions or the model they are bound to differ.
        """
        for name in ("site", "positions", "binding"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(f"{name}: {getattr(self, name)!r} and {getattr(other, name)!r} cannot be added")
        summed = {
            layer: sum(v.shifts[layer] for v in (self, other) if layer in v.shifts)
            for layer in {*self.shifts, *other.shifts}
        }
        return replace(self, shifts=summed, method=f"{self.method}+{other.method}")  # type: ignore[arg-type]

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + replace(-other, method=other.method)

    @contextmanager
    def apply(
        self,
        model: PreTrainedModel,
        alpha: float | Sequence[float] | Tensor = 1.0,
        start: int | None = None,
        gate: Gate | None = None,
    ) -> Iterator[None]:
        """Shift the model's states inside the context; use any forward pass or ``generate`` in it.

        Args:
            alpha: factor on the shift, or one for each prompt of the batch (N,); what ``generate`` makes of a prompt,
                beams or several samples, shares its factor. 0 leaves the model untouched, bit by bit.
            start: column of the decision position in the left-padded batch. Default: the last column of each prompt. An
                uncached pass that begins with the prompt of the pass before counts as its continuation.
            gate: decides for every prompt, before it is answered, whether it is steered at all (see ``detect.Gate``);
                costs one more pass over the prompts. What it lets through is untouched, bit by bit.

        Raises:
            InputError: a layer or the width does not exist in this model, or alpha is not finite.
        """
        factor = torch.as_tensor(alpha, dtype=torch.float32)
        if factor.ndim > 1 or not bool(factor.isfinite().all()):
            raise InputError(f"alpha: {alpha} is neither a finite number nor one for each prompt")
        self._check_shape(model)
        if not factor.any() or not self.shifts:
            yield
            return
        scaled = {layer: factor[..., None] * shift_D for layer, shift_D in self.shifts.items()}
        with shifted(model, scaled, self.site, self.positions, start, gate):
            yield

    def _check_shape(self, model: PreTrainedModel) -> None:
        count = len(blocks_of(model))
        for layer, shift in self.shifts.items():
            if not 0 <= layer < count:
                raise InputError(f"layers: {layer} is not in 0 .. {count - 1} of this model")
            width = site_width(model, layer, self.site)
            if len(shift) != width:
                raise InputError(f"shifts: {len(shift)} neurons in layer {layer}; this model has {width}")

    def bound_to(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> SteeringVector:
        """The same vector, bound to the model it was made on."""
        return replace(self, binding=Binding.of(model, tokenizer))

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors, one float32 tensor per layer) and the JSON beside it."""
        from safetensors.torch import save_file

        facts = {k: v for k, v in self.__dict__.items() if k not in ("shifts", "binding")}
        facts |= {"layers": self.layers, "binding": asdict(self.binding) if self.binding else None}
        save_file({f"layer.{layer}": shift.contiguous() for layer, shift in self.shifts.items()}, path)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(
        cls,
        path: Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        force: bool = False,
    ) -> SteeringVector:
        """Read a vector, and check that it was made on this model where one is given.

        Args:
            force: accept a vector made on another model; its shape must fit all the same.

        Raises:
            InputError: the files are missing or corrupted, or the model is another (the field that differs is named).
        """
        from safetensors.torch import load_file

        try:
            facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            shifts = {int(name.split(".")[1]): shift for name, shift in load_file(path).items()}
            if facts.pop("layers") != sorted(shifts):
                raise ValueError("its layers are not those of the JSON beside it")
            binding = facts.pop("binding")
            vector = cls(shifts=shifts, binding=Binding(**binding) if binding else None, **facts)
        except InputError:
            raise
        except Exception as error:  # safetensors raises its own kinds for a broken file
            raise InputError(f"vector: {path} cannot be read ({str(error).splitlines()[0]})") from error
        if model is not None and tokenizer is not None:
            if not force:
                Binding.check(vector.binding, Binding.of(model, tokenizer), "vector")
            vector._check_shape(model)
        return vector


def find_vector(
    source: Path, toward: Toward, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, force: bool = False
) -> SteeringVector:
    """The vector of a file, of a cell's folder or of a run that was made on this model and turns to ``toward``.

    Of a folder it is the one of the method that was best on the tune split for pairs.

    Raises:
        InputError: there is none, it turns the other way, or every one was made on another model.
    """
    if source.is_file():
        vector = SteeringVector.load(source, model, tokenizer, force)
        if vector.toward != toward:
            raise InputError(f"toward: the vector in {source} turns to {vector.toward}, not to {toward}")
        return vector
    cells = [source] if (source / "vectors").is_dir() else sorted((source / "cells").glob("*/"))
    refused: InputError | None = None
    for cell in cells:
        chosen = cell / "records" / "chosen.json"
        if not chosen.is_file():
            continue
        method = json.loads(chosen.read_text())["pairs"]["best"][f"to_{toward}"]
        try:
            return SteeringVector.load(cell / "vectors" / f"to_{toward}-{method}.safetensors", model, tokenizer, force)
        except InputError as error:
            refused = error
    raise refused or InputError(f"from: {source} is neither a vector nor a folder of a run that has chosen vectors")


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int = 20
) -> list[str]:
    """What a model says behind each prompt, by plain greedy ``generate``; see ``continued``."""
    ids_NT, _, width = continued(model, tokenizer, inputs, max_new_tokens)
    return tokenizer.batch_decode(ids_NT[:, width:], skip_special_tokens=True)


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: Any, max_new_tokens: int
) -> tuple[Tensor, Tensor, int]:
    """Prompts with what a model says behind them, by plain greedy ``generate``.

    Args:
        inputs: prompts as a left-padded batch, ``input_ids`` and ``attention_mask`` (``Asking.padded``).

    Returns:
        ids (N, T), their mask (N, T), in which what follows an end of text is 0, and how many columns are the prompts.

    Raises:
        InputError: the prompts leave no room for another token in what the model reads.
    """
    width, limit = inputs.input_ids.shape[1], context_length(model)
    if width >= limit:
        raise InputError(f"prompt: {width} tokens leave no room for an answer; the model reads at most {limit}")
    ends = end_ids(model, tokenizer)
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=min(max_new_tokens, limit - width),
        do_sample=False,
        **PLAINLY,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends_NT = torch.isin(output[:, width:], torch.tensor(ends, dtype=torch.long, device=output.device)).long()
    # The end itself belongs to what was said.
    said_NT = (ends_NT.cumsum(1) - ends_NT) == 0
    return output, torch.cat([inputs.attention_mask, said_NT.long()], dim=1), width


def scaled_to(shift_LD: np.ndarray, norm_L: np.ndarray) -> np.ndarray:
    """Each layer's shift scaled to a norm; a layer without a shift keeps none."""
    found_L = np.linalg.norm(shift_LD, axis=1)
    return shift_LD * np.divide(norm_L, found_L, out=np.zeros_like(found_L), where=found_L > 0)[:, None]


def shifted(
    model: PreTrainedModel,
    shifts: Mapping[int, Tensor],
    site: Site,
    positions: Positions,
    start: int | None = None,
    gate: Gate | None = None,
) -> AbstractContextManager[None]:
    """Add a (D,) tensor, or one for each prompt (N, D), to the states of each layer named.

    Gradients flow back into the tensors.

    See ``SteeringVector.apply`` for ``start`` and ``gate``.
    """
    tracker = _PositionTracker(start, everywhere=positions == "all", gate=partial(gate, model) if gate else None)
    return _edited(model, site, tracker, {layer: _adding(shift_D) for layer, shift_D in shifts.items()})


def ablated(
    model: PreTrainedModel, means: Mapping[int, Tensor], chosen: Mapping[int, Tensor], site: Site
) -> AbstractContextManager[None]:
    """Hold the chosen neurons at their mean from the decision position on, so that they tell nothing any more.

    Args:
        means: float32 (D,) per layer.
        chosen: bool (D,) for the same layers.
    """

    def holding(mean_D: Tensor, chosen_D: Tensor) -> _Edit:
        return lambda states_NTD: torch.where(chosen_D.to(states_NTD.device), mean_D.to(states_NTD), states_NTD)

    edits = {layer: holding(mean_D, chosen[layer]) for layer, mean_D in means.items()}
    return _edited(model, site, _PositionTracker(None, everywhere=False), edits)


def patched(model: PreTrainedModel, layer: int, states_ND: Tensor, site: Site) -> AbstractContextManager[None]:
    """Put the states of another run in place of a layer's own at the decision position, row by row of the batch.

    Later positions are left alone, so the patch is all that the answer can know of the other run.
    """
    tracker = _PositionTracker(None, everywhere=False)

    def patch(states_NTD: Tensor) -> Tensor:
        if not tracker.in_prompt:
            return states_NTD
        return torch.cat([states_ND[:, None].to(states_NTD), states_NTD[:, 1:]], dim=1)

    return _edited(model, site, tracker, {layer: patch})


@contextmanager
def _edited(
    model: PreTrainedModel, site: Site, tracker: _PositionTracker, edits: Mapping[int, _Edit]
) -> Iterator[None]:
    """Change the states of each layer named, from the tracked position on.

    The only hook of the package that writes. It is gone when the context ends, however it ends.
    """
    handles = []
    try:
        # The base model is what every way of calling passes through, with a language-modelling head or without.
        handles.append(backbone_of(model).register_forward_pre_hook(tracker.see, with_kwargs=True))
        if tracker.gate:
            # What a gate asks goes through every block, so none may be left out as untouched.
            handles.append(blocks_of(model)[0].register_forward_pre_hook(_look_on))
        for layer, edit in edits.items():
            module, is_input = site_module(model, layer, site)
            register = module.register_forward_pre_hook if is_input else module.register_forward_hook
            handles.append(register(_editor(edit, tracker, is_input)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _PositionTracker:
    """Knows, in every pass, from which column on states are shifted.

    ``start`` counts columns from the beginning of the padded sequence, so it survives the KV cache.
    """

    fixed: int | None
    everywhere: bool
    gate: Callable[[Tensor, Tensor, Any], Tensor] | None = None
    acts_N: Tensor | None = None  # what the gate says of the prompts that are being answered
    start: int = 0
    rows: int = 0  # of the batch of this pass
    first_column: int = 0
    in_prompt: bool = False  # whether this pass holds the decision position
    prompt_NT: Tensor | None = field(default=None)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model: reads how much of the sequence came before."""
        if _ASKING.get():
            return
        self.rows = rows_of(args, kwargs)
        ids_NT = args[0] if args else kwargs.get("input_ids")
        if ids_NT is None:
            ids_NT = kwargs["inputs_embeds"][..., 0]
        past = cached_columns(kwargs)
        columns = ids_NT.shape[1]
        fresh = self.prompt_NT is None or (past == 0 and not self._continues(ids_NT))
        if fresh:
            self.prompt_NT = ids_NT
        if self.everywhere or self.fixed is not None:
            self.start = self.fixed or 0
        elif fresh:
            self.start = past + columns - 1
        self.first_column = max(0, self.start - past)
        self.in_prompt = past <= self.start
        if fresh and self.gate:
            self._ask(self.gate, args, kwargs, past, columns)

    def _ask(
        self,
        gate: Callable[[Tensor, Tensor, Any], Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        past: int,
        columns: int,
    ) -> None:
        ids_NT = args[0] if args else kwargs.get("input_ids")
        if ids_NT is None:
            raise InputError("gate: it reads prompts as token ids; this pass has embeddings only")
        mask_NT = _mask_of_columns(kwargs.get("attention_mask"), past + columns)
        if mask_NT is None:
            mask_NT = ids_NT.new_ones(ids_NT.shape[0], past + columns)
        last = past + columns if self.everywhere or self.fixed is None else self.fixed + 1
        if last <= past:
            raise InputError(f"start: {last - 1} lies before the columns that this pass reads, from {past} on")
        token = _ASKING.set(True)
        try:
            # A pass adds to the cache it is given, and this one is to leave no trace.
            known = forked(cache_in(kwargs)) if past else None
            self.acts_N = gate(ids_NT[:, : last - past], mask_NT[:, :last], known).to(ids_NT.device)
        finally:
            _ASKING.reset(token)

    def _continues(self, ids_NT: Tensor) -> bool:
        prompt = self.prompt_NT
        assert prompt is not None
        longer = ids_NT.shape[0] == prompt.shape[0] and ids_NT.shape[1] > prompt.shape[1]
        return longer and bool(torch.equal(ids_NT[:, : prompt.shape[1]], prompt))


def _look_on(module: nn.Module, inputs: Any) -> None:
    """A hook that changes nothing."""


def _mask_of_columns(mask: Any, columns: int) -> Tensor | None:
    """Which columns hold tokens, int64 (N, T), from whatever mask a pass is given; None where all do.

    For caches of a fixed size the library makes masks of queries by keys beforehand; the last query sees every token
    where attention is not confined to a window.

    Raises:
        InputError: every layer's attention is confined.
    """
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise InputError("gate: no layer of this model attends to all tokens; use it with another kind of cache")
        mask = mask["full_attention"]
    if mask is None or mask.ndim == 2:
        return mask
    seen_NT = mask[:, 0, -1, :columns]
    return (seen_NT if seen_NT.dtype == torch.bool else seen_NT == 0).long()


def _adding(shift: Tensor) -> _Edit:
    """Add a shift (D,) to all rows, or (N, D) row by row; each prompt's rows follow one another."""
    placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def add(states_NTD: Tensor) -> Tensor:
        key = (states_NTD.device, states_NTD.dtype)
        here = placed.get(key)
        if here is None:
            here = placed[key] = shift.to(*key)
        if here.ndim == 1:
            return states_NTD + here
        return states_NTD + here[prompts_of_rows(len(states_NTD), len(here)).to(here.device)][:, None]

    return add


def _editor(edit: _Edit, tracker: _PositionTracker, is_input: bool) -> Callable[..., Any]:
    """A hook that changes a module's output, or its input, from the tracked column on."""

    def moved(states_NTD: Tensor) -> Tensor:
        first, acts_N = tracker.first_column, tracker.acts_N
        if _ASKING.get() or first >= states_NTD.shape[1] or (acts_N is not None and not acts_N.any()):
            return states_NTD
        edited = edit(states_NTD[:, first:])
        if first:
            edited = torch.cat([states_NTD[:, :first], edited], dim=1)
        if acts_N is None:
            return edited
        acts_R = acts_N[prompts_of_rows(len(states_NTD), len(acts_N)).to(acts_N.device)].to(states_NTD.device)
        return torch.where(acts_R[:, None, None], edited, states_NTD)

    def on_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        return with_states(output, moved(states_of(output, tracker.rows)))

    def on_input(module: nn.Module, inputs: Any) -> Any:
        return with_states(inputs, moved(states_of(inputs, tracker.rows)))

    return on_input if is_input else on_output
