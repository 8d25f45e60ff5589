"""Steering vectors: a sparse shift per layer that turns a model towards one behaviour while it answers.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mnemoscope.errors import InputError
from mnemoscope.models import SITES, Site, blocks_of, site_width
from mnemoscope.steering.binding import Binding, check_both, only_accepted, reading
from mnemoscope.steering.hooks import Gate, Positions, shifted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.contrast import Contrast

Toward = Literal["generalized", "memorized"]
OPPOSITE: dict[Toward, Toward] = {"generalized": "memorized", "memorized": "generalized"}


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
        system: what the system message said there; None: what the template says.
        begun: whether the beginning of the reply was given there.
        begin_alike: share of the prompts it was made of whose two answers begin with the same tokens. These were taken
            as given: the decision position is the last of them, where ``apply`` starts at the last token of the prompt.
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
    system: str | None = None
    begun: bool = False
    begin_alike: float = 0.0

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
                pass without any cache that begins with the prompt of the pass before counts as its continuation, and
                so does whatever is read on a cache that holds the decision position (the next turn of a talk needs a
                context of its own); a prompt that is read in several passes (``prefill_chunk_size``) or with guesses
                behind it (an assistant, prompt lookup) needs this said, and ``generate`` is refused without.
            gate: decides for every prompt, before it is answered, whether it is steered at all (see ``detect.Gate``);
                costs one more pass over the prompts. What it lets through is untouched, bit by bit.

        Raises:
            InputError: a layer or the width does not exist in this model, alpha is not finite, or, in a pass, a prompt
                is padded on the right.
        """
        factor = torch.as_tensor(alpha, dtype=torch.float32).cpu()  # as shifts are, until they meet their layer
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
            InputError: the files are missing or corrupted, the model is another (the field that differs is named), or
                it is given without its tokenizer.
        """
        from safetensors.torch import load_file

        check_both(model, tokenizer, force)

        with reading("vector", path):
            facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            shifts = {int(name.split(".")[1]): shift for name, shift in load_file(path).items()}
            if facts.pop("layers") != sorted(shifts):
                raise ValueError("its layers are not those of the JSON beside it")
            binding = facts.pop("binding")
            vector = cls(shifts=shifts, binding=Binding(**binding) if binding else None, **facts)
        if model is not None:
            if tokenizer is not None and not force:
                Binding.check(vector.binding, Binding.of(model, tokenizer), "vector")
            vector._check_shape(model)
        return vector


def find_vector(
    source: Path, toward: Toward, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, force: bool = False
) -> SteeringVector:
    """The vector of a file, of a cell's folder or of a run that was made on this model and turns to ``toward``.

    Of a folder it is the one of the method that was best on the tune split for pairs.

    Raises:
        InputError: there is none, it turns the other way, or every one was made on another model, or several cells
            have one for this model.
    """
    if source.is_file():
        vector = SteeringVector.load(source, model, tokenizer, force)
        if vector.toward != toward:
            raise InputError(f"toward: the vector in {source} turns to {vector.toward}, not to {toward}")
        return vector
    cells = [source] if (source / "vectors").is_dir() else sorted((source / "cells").glob("*/"))
    paths: dict[Path, Path] = {}
    for cell in cells:
        chosen = cell / "records" / "chosen.json"
        if chosen.is_file():
            method = json.loads(chosen.read_text())["pairs"]["best"][f"to_{toward}"]
            paths[cell] = cell / "vectors" / f"to_{toward}-{method}.safetensors"
    return only_accepted(
        paths,
        lambda path: SteeringVector.load(path, model, tokenizer, force),
        f"from: {source} is neither a vector nor a folder of a run that has chosen vectors",
    )


def scaled_to(shift_LD: np.ndarray, norm_L: np.ndarray) -> np.ndarray:
    """Each layer's shift scaled to a norm; a layer without a shift keeps none."""
    found_L = np.linalg.norm(shift_LD, axis=1)
    return shift_LD * np.divide(norm_L, found_L, out=np.zeros_like(found_L), where=found_L > 0)[:, None]
