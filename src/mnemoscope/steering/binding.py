"""Which model something was made on, and files that are accepted for that model only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from mnemoscope.errors import InputError
from mnemoscope.models import core_of, merged_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Made = TypeVar("Made")
# Not its padding and truncation, which every call may change.
TOKENIZING = ("model", "added_tokens", "normalizer", "pre_tokenizer")


@dataclass(frozen=True, slots=True)
class Binding:
    """What a vector or a detector was made on; it is refused where any of this differs.

    Attributes:
        model_type: the configuration's ``model_type``.
        weights: SHA-256 of all parameters, by name, rounded to bfloat16: a model is the same when it is opened in that,
            and with an adapter (LoRA) beside its weights or added to them.
        tokenizer: SHA-256 of what decides the fast tokenizer's tokens.
        half: that of the parameters rounded to float16 before, as they are where the model is opened in float16.
    """

    model_type: str
    weights: str
    tokenizer: str
    half: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Binding:
        """Fingerprint a model and its tokenizer (reads every weight once).

        Raises:
            InputError: some of the weights are not in memory.
        """
        digest, half = hashlib.sha256(), hashlib.sha256()
        for name, weight in sorted(merged_weights(model), key=itemgetter(0)):
            if weight.is_meta:
                raise InputError(
                    f"device_map: {name} is not in memory, so the model cannot be told from others; use devices that "
                    "hold all of it"
                )
            for known, first in ((digest, weight.detach()), (half, weight.detach().to(torch.float16))):
                known.update(name.encode())
                rounded = first.to(torch.bfloat16).cpu().contiguous()
                known.update(rounded.view(torch.uint8).numpy().data)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        words = json.dumps({part: parts.get(part) for part in TOKENIZING}, sort_keys=True)
        tokens = hashlib.sha256(words.encode()).hexdigest()
        return cls(core_of(model).config.model_type, digest.hexdigest(), tokens, half.hexdigest())

    @staticmethod
    def check(bound: Binding | None, found: Binding, what: str) -> None:
        """Raises InputError where a model is not the one that ``what`` was made on; the field that differs is named."""
        for name in ("model_type", "weights", "tokenizer"):
            value, made_on = getattr(found, name), getattr(bound, name, None)
            if name == "weights" and bound and {bound.weights, bound.half} & {found.weights, found.half}:
                continue
            if made_on != value:
                raise InputError(f"{name}: the {what} was made on {made_on}, this model has {value}; force overrides")


def check_both(model: object | None, tokenizer: object | None, force: bool) -> None:
    """Raises InputError where a model comes without its tokenizer, so that what it is given cannot be checked."""
    if (model is None) != (tokenizer is None) and not force:
        raise InputError("model, tokenizer: give both, or neither; force takes a model alone and checks its shape only")


@contextmanager
def reading(what: str, path: Path) -> Iterator[None]:
    """Turns whatever a missing or corrupted file raises into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors raises its own kinds for a broken file
        raise InputError(f"{what}: {path} cannot be read ({str(error).splitlines()[0]})") from error


def only_accepted(paths: Mapping[Path, Path], load: Callable[[Path], Made], otherwise: str) -> Made:
    """What ``load`` makes of the one file that it accepts.

    Args:
        paths: files by the folder of the cell that they are of.

    Raises:
        InputError: it accepts none: what it said of the last one, or ``otherwise`` where there is none; or it accepts
            those of several cells, and which of them is meant is for the user to say.
    """
    accepted: dict[Path, Made] = {}
    refused: InputError | None = None
    for cell, path in paths.items():
        try:
            accepted[cell] = load(path)
        except InputError as error:
            refused = error
    if len(accepted) > 1:
        cells = ", ".join(str(cell) for cell in accepted)
        raise InputError(f"from: what several cells of the run made can be used with this model; name one of {cells}")
    if not accepted:
        raise refused or InputError(otherwise)
    return next(iter(accepted.values()))
