"""The one path that reads states: a site, layers, offsets from the decision position, examples.

Shapes: N examples, T tokens of a left-padded batch, O offsets, L layers, D neurons, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking
from mnemoscope.behaviour.batches import prepare
from mnemoscope.models import (
    Site,
    backbone_of,
    blocks_of,
    check_hookable,
    check_ran,
    pass_inputs,
    rows_of,
    site_module,
    states_of,
    with_last_logits,
)
from mnemoscope.runs.files import write_atomically
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BYTES = 2**28  # of states that a cell keeps for its later stages, at a site


@dataclass(frozen=True, slots=True)
class States:
    """States of N examples, float32, by offset (tokens before the decision position), and their uncertainty, float64.

    Uncertainty is the entropy in nats of the next token's distribution at the decision position, and the log
    probability of its first minus that of its second choice; NaN without offset 0.
    """

    states_ONLD: np.ndarray
    uncertainty_N2: np.ndarray

    @property
    def at_decision_NLD(self) -> np.ndarray:
        """States at the first offset: by default the decision position."""
        return self.states_ONLD[0]


class _ReadEnoughError(Exception):
    """Ends a pass behind the last wanted layer."""


@contextmanager
def capturing(
    model: PreTrainedModel,
    site: Site,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] | None = (0,),
    stop: Callable[[], bool] = bool,
) -> Iterator[list[Tensor]]:
    """Capture states: every pass inside the context fills the list with one (N, O, D) tensor per layer.

    The only hook of the package that reads. It is removed when the context ends, however it ends.

    Args:
        layers: default: all.
        offsets: columns before the last one; None: all columns of a pass, in order.
        stop: whether to end a pass, and with it the context, behind the last of the layers; asked there.
    """
    check_hookable(model)
    wanted = list(range(len(blocks_of(model))) if layers is None else layers)
    states, rows = [torch.empty(0)] * len(wanted), 0
    left = 0  # layers that this pass has not reached yet

    def see(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal rows, left
        rows, left = rows_of(args, kwargs), len(wanted)

    def read(place: int, module: torch.nn.Module, inputs: Any, output: Any = None) -> None:
        nonlocal left
        left -= 1
        found_NTD = states_of(inputs if output is None else output, rows)
        if offsets is not None:
            found_NTD = found_NTD[:, [found_NTD.shape[1] - 1 - offset for offset in offsets]]
        states[place] = found_NTD.detach().clone()
        if not left and stop():
            raise _ReadEnoughError

    with suppress(_ReadEnoughError), ExitStack() as stack:
        backbone = backbone_of(model)
        stack.callback(backbone.register_forward_pre_hook(see, with_kwargs=True).remove)
        ends = backbone.register_forward_hook(lambda *_: check_ran(left, len(wanted), "captured"))
        stack.callback(ends.remove)
        for place, layer in enumerate(wanted):
            module, is_input = site_module(model, layer, site)
            register = module.register_forward_pre_hook if is_input else module.register_forward_hook
            stack.callback(register(partial(read, place)).remove)
        yield states


@torch.no_grad()
def states_at_the_end(
    model: PreTrainedModel, ids_NT: Tensor, mask_NT: Tensor, site: Site, layers: Sequence[int] | None = None
) -> np.ndarray:
    """Float32 states (N, L, D) at the last column of a left-padded batch; blocks above the last layer are not run."""
    with capturing(model, site, layers, stop=lambda: layers is not None) as states:
        backbone_of(model)(**pass_inputs(model, ids_NT, mask_NT) | {"use_cache": False})
    return stacked_states(states)[0]


def stacked_states(states: Sequence[Tensor]) -> np.ndarray:
    """Captured states as float32 (O, N, L, D); layers may lie on several devices."""
    return torch.stack([state_NOD.float().cpu() for state_NOD in states], dim=2).transpose(0, 1).numpy()


def uncertainty_of(logits_NV: Tensor) -> np.ndarray:
    """Entropy and gap of the two likeliest tokens' log probabilities, in nats; float64 (N, 2)."""
    logp_NV = logits_NV.float().log_softmax(-1)
    top_N2 = logp_NV.topk(2).values.double()
    both = [torch.special.entr(logp_NV.exp()).sum(-1).double(), top_N2[:, 0] - top_N2[:, 1]]
    return torch.stack(both, dim=1).cpu().numpy()


def read_states(
    asking: Asking,
    examples: Sequence[Example],
    site: Site,
    offsets: Sequence[int] = (0,),
    kept: KeptStates | None = None,
) -> States:
    """States of examples at positions counted back from the decision position; each context is read once, if at all.

    Args:
        offsets: tokens before the decision position, smaller than every context's length.
        kept: states at the decision position that need not be read again; others are added to it.
    """
    if kept is None or tuple(offsets) != (0,):
        return _read(asking, examples, site, offsets)
    known = kept.get(site, examples)
    missing = [n for n in range(len(examples)) if n not in known]
    fresh = _read(asking, unknown := [examples[n] for n in missing], site, offsets)
    if missing:
        kept.add(site, unknown, fresh.at_decision_NLD, fresh.uncertainty_N2)
    if not known:
        return fresh
    known |= dict(zip(missing, zip(fresh.at_decision_NLD, fresh.uncertainty_N2, strict=True), strict=True))
    states_NLD, uncertainty_N2 = map(np.stack, zip(*(known[n] for n in range(len(examples))), strict=True))
    return States(states_NLD[None], uncertainty_N2)


@torch.no_grad()
def _read(asking: Asking, examples: Sequence[Example], site: Site, offsets: Sequence[int]) -> States:
    states_ONLD, uncertainty_N2 = np.empty((len(offsets), 0)), np.full((len(examples), 2), np.nan)
    for batch in prepare(asking, examples):
        inputs = pass_inputs(asking.model, batch.ids_NT, batch.mask_NT) | {"use_cache": False}
        with capturing(asking.model, site, offsets=offsets) as states:
            if 0 in offsets:
                logits_NV = with_last_logits(asking.model, inputs).logits[:, -1]
                uncertainty_N2[batch.examples_N] = uncertainty_of(logits_NV)
            else:
                backbone_of(asking.model)(**inputs)  # no head where no logits are needed
        found_ONLD = stacked_states(states)
        if not states_ONLD.size:
            states_ONLD = np.empty((len(offsets), len(examples), *found_ONLD.shape[2:]), np.float32)
        states_ONLD[:, batch.examples_N] = found_ONLD
    return States(states_ONLD, uncertainty_N2)


@dataclass
class KeptStates:
    """States at the decision position, in files of a cell's folder, for later stages, also in another process.

    Once ``most_bytes`` are kept at a site nothing is added any more, and missing states are read again.
    """

    folder: Path
    most_bytes: int = MOST_BYTES
    _index: dict[tuple[str, bytes], tuple[Path, int]] = field(default_factory=dict)  # by site and example, a file's row

    def __post_init__(self) -> None:
        for path in self._files():
            self._enter(path)

    def add(self, site: Site, examples: Sequence[Example], states_NLD: np.ndarray, uncertainty_N2: np.ndarray) -> None:
        """Keep states, float32, of examples that are not kept yet; one file for each call."""
        from safetensors.numpy import save

        keys = [_key(example) for example in examples]
        fresh = [n for n, key in enumerate(keys) if (site, key) not in self._index]
        room = self.most_bytes - sum(path.stat().st_size for path in self._files(site))
        if not fresh or len(fresh) * states_NLD[0].nbytes > room:
            return
        kept = {"states": states_NLD[fresh].astype(np.float32), "uncertainty": uncertainty_N2[fresh].astype(np.float64)}
        content = save(kept | {"keys": np.array([[*keys[n]] for n in fresh], np.uint8)})
        if len(content) <= room:
            # Processes that keep states of one cell at a time must not replace each other's file.
            self._enter(write_atomically(self.folder / f"{site}-{uuid4().hex}.safetensors", content))

    def get(self, site: Site, examples: Sequence[Example]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """State (L, D) and uncertainty (2,) of each example that is kept, by its index."""
        from safetensors.numpy import load_file

        rows: dict[Path, list[tuple[int, int]]] = defaultdict(list)
        for n, example in enumerate(examples):
            path, row = self._index.get((site, _key(example)), (None, 0))
            if path:
                rows[path].append((n, row))
        files = ((load_file(path), places) for path, places in rows.items())
        return {n: (file["states"][row], file["uncertainty"][row]) for file, places in files for n, row in places}

    def _files(self, site: str = "*") -> list[Path]:
        """Finished files, not those that another process is writing, whose names begin with a dot."""
        return sorted(path for path in self.folder.glob(f"{site}-*.safetensors") if path.name[0] != ".")

    def _enter(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            keys = file.get_tensor("keys")
        site = path.name.split("-")[0]
        self._index |= {(site, key.tobytes()): (path, row) for row, key in enumerate(keys)}


def _key(example: Example) -> bytes:
    """Digest of an example's context: its prompt, and answers that may begin alike."""
    parts = (example.prompt, *example.options)
    return hashlib.blake2b("".join(f"{len(part)}:{part}" for part in parts).encode(), digest_size=16).digest()
