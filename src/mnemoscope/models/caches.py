"""Key-value caches: names across versions of the library, selected rows, storage behind a prefix.

Shapes: N examples, H heads, T tokens (columns), W neurons of a head, R rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from mnemoscope.models.layout import core_of
from mnemoscope.runs.errors import InputError


def cache_argument(model: nn.Module) -> str:
    """Name of the cache argument of a model's forward; the library renamed it."""
    return "cache" if "cache" in arguments_of(model) else "past_key_values"


def arguments_of(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    return _arguments(type(core_of(model)).forward)


@lru_cache(maxsize=16)  # every pass asks
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def bytes_of(cache: Any) -> int:
    """Bytes of the keys and values of a cache."""
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(found.nbytes for found in states if found is not None)


def cached_columns(kwargs: dict[str, Any]) -> int | None:
    """Number of columns in the cache that a pass is given, from its keyword arguments; None without a cache."""
    cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
    return None if cache is None else int(cache.get_seq_length())


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, in storage with room for more columns.

    The library's layer copies everything to add a column. This one writes the column behind the others, into storage
    that shallow copies share: each copy of a prefix starts where the prefix ends, and one copy can be in use at a time.
    Under autograd it copies as the library does, since a graph may need the old values.
    """

    def __init__(self, layer: DynamicLayer, columns: int) -> None:
        super().__init__()
        self.device, self.is_initialized = layer.keys.device, True
        self.room: tuple[Tensor, Tensor] | None = (_roomy(layer.keys, columns), _roomy(layer.values, columns))
        self._hold(layer.get_seq_length())

    def _hold(self, columns: int) -> None:
        assert self.room is not None
        self.keys, self.values = self.room[0].narrow(2, 0, columns), self.room[1].narrow(2, 0, columns)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns; see the library's ``DynamicLayer.update``."""
        past = self.get_seq_length()
        columns = past + key_states.shape[-2]
        if self.room is None or torch.is_grad_enabled() or columns > self.room[0].shape[-2]:
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)
        self._hold(columns)
        self.keys.narrow(2, past, columns - past).copy_(key_states)
        self.values.narrow(2, past, columns - past).copy_(value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in new storage with as much room."""
        if self.room is None:
            super().batch_select_indices(indices)
            return
        past = self.get_seq_length()
        self.room = (self.room[0].index_select(0, indices), self.room[1].index_select(0, indices))
        self._hold(past)


def _roomy(states_NHTW: Tensor, columns: int) -> Tensor:
    """The states, followed by empty columns."""
    rows, heads, past, width = states_NHTW.shape
    storage = states_NHTW.new_empty((rows, heads, past + columns, width))
    storage[:, :, :past] = states_NHTW
    return storage


def make_room(cache: Any, columns: int) -> bool:
    """Give a cache room for more columns, in place; returns whether every layer has it (sliding windows do not)."""
    cache.layers = [RoomyLayer(layer, columns) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def select_rows(cache: Any, rows_R: Tensor | None) -> Any:
    """A cache of some rows (None: all) that passes can extend; the original stays as it is.

    With all rows the two may share storage, so only the latest copy may be extended (see ``RoomyLayer``). InputError
    where a layer holds a recurrent state, which passes change in place.
    """
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states"):
            raise InputError(f"model: its cache has a {type(layer).__name__}; only caches of attention can be shared")
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    if rows_R is not None:
        for layer in copied.layers:  # which may lie on several devices
            layer.batch_select_indices(rows_R.to(layer.keys.device))
    return copied


def forked(cache: Any) -> Any:
    """A copy of a cache that a pass may extend; storage is shared where possible."""
    if all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return select_rows(cache, None)
    return copy.deepcopy(cache)  # caches of a fixed size are written in place
