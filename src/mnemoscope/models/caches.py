"""Key-value caches: one name for what the library renamed, rows of them, and room behind a prefix.

Shapes: N examples, H heads, T tokens (columns), W neurons of a head, R rows.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from mnemoscope.models.layout import core_of


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its key-value cache; the library renamed it."""
    return "cache" if "cache" in arguments_of(model) else "past_key_values"


def arguments_of(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    return _arguments(type(core_of(model)).forward)


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def bytes_of(cache: Any) -> int:
    """What a cache's keys and values take."""
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(found.nbytes for found in states if found is not None)


def cached_columns(kwargs: dict[str, Any]) -> int:
    """How many columns of the sequence came before a pass, from the keyword arguments of the pass."""
    cache = cache_in(kwargs)
    return 0 if cache is None else int(cache.get_seq_length())


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The key-value cache that a pass is given, or None, from its keyword arguments."""
    return kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, in storage with room for columns to come.

    The library's layer copies all it holds to add a column. This one writes the column behind the others, into storage
    that shallow copies of the layer share: each copy of a prefix starts again where the prefix ends. One copy can be in
    use at a time. Under autograd it copies like the library's, since a graph may still need what it holds.
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
            self.room = None  # what is held from now on is no part of it
            return super().update(key_states, value_states, *args, **kwargs)
        self._hold(columns)
        self.keys.narrow(2, past, columns - past).copy_(key_states)
        self.values.narrow(2, past, columns - past).copy_(value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen rows, in storage of their own with as much room."""
        if self.room is None:
            super().batch_select_indices(indices)
            return
        past = self.get_seq_length()
        self.room = (self.room[0].index_select(0, indices), self.room[1].index_select(0, indices))
        self._hold(past)


def _roomy(states_NHTW: Tensor, columns: int) -> Tensor:
    """The same states, followed by columns that hold nothing yet."""
    rows, heads, past, width = states_NHTW.shape
    storage = states_NHTW.new_empty((rows, heads, past + columns, width))
    storage[:, :, :past] = states_NHTW
    return storage


def make_room(cache: Any, columns: int) -> bool:
    """Give a cache, in place, room for columns to come.

    Returns:
        Whether every layer has room now; layers of special kinds, sliding windows for example, stay as they are.
    """
    cache.layers = [RoomyLayer(layer, columns) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def select_rows(cache: Any, rows_R: Tensor | None) -> Any:
    """A cache of the chosen rows (None: all) that later passes can extend; what this one holds stays as it is.

    With all rows the two may share storage, so only the one taken last may be extended (see ``RoomyLayer``).
    """
    copied = copy.copy(cache)
    # A pass replaces a layer's tensors or writes behind them, so copies of the layers can share them.
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    if rows_R is not None:
        for layer in copied.layers:  # which may lie on several devices
            layer.batch_select_indices(rows_R.to(layer.keys.device))
    return copied


def forked(cache: Any) -> Any:
    """A cache that a pass may extend while this one stays as it is; what both hold is shared where it can be."""
    if all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return select_rows(cache, None)
    return copy.deepcopy(cache)  # caches of a fixed size are written in place
