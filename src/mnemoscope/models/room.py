"""Estimated memory of passes, free memory, and the batch size and number of processes that fit."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnemoscope.models.layout import blocks_of, core_of
from mnemoscope.runs.processes import beside

SHARE = 0.5  # of the free memory that a pass may take: the estimate leaves out the allocator
_logged: set[tuple[int, int]] = set()
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # width of an MLP, by family


def bytes_of_prompt(model: nn.Module, tokens: int, read_on: int) -> int:
    """Estimated bytes of one prompt of ``tokens`` while it and ``read_on`` answer tokens are read without gradients.

    Keys and values of all layers count three times, as each of two answers is read behind a copy; states and MLP
    activations of one layer once; logits twice in float32.
    """
    config: Any = core_of(model).config.get_text_config()
    weight = next(model.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = max((getattr(config, name, None) or 0 for name in _INNER), default=0) or 4 * config.hidden_size
    kept = 3 * 2 * len(blocks_of(model)) * heads * width
    passing = 6 * config.hidden_size + 3 * inner
    return tokens * (kept + passing) * weight.element_size() + (read_on + 1) * config.vocab_size * 8


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it is unknown."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, KeyError, ValueError):
        found.append(1024 * int(_fields(Path("/proc/meminfo"))["MemAvailable:"]))
    group = Path("/sys/fs/cgroup")  # the control group of this process (a container's)
    with suppress(OSError, ValueError):  # there is none, or it is without a limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # The page cache counts as used, and is freed on demand.
        found.append(limit - used + int(_fields(group / "memory.stat").get("inactive_file", 0)))
    return min(found, default=None)


def _fields(path: Path) -> dict[str, str]:
    """The first two words of each line."""
    return dict(line.split()[:2] for line in path.read_text().splitlines())


def batch_that_fits(model: nn.Module, wanted: int, tokens: int, read_on: int) -> int:
    """Number of prompts to read at a time: ``wanted``, or fewer where memory is short (logged once), at least one."""
    device, each = next(model.parameters()).device, bytes_of_prompt(model, tokens, read_on)
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= beside()
    if free is None or wanted * each <= SHARE * free:
        return wanted
    fitting = max(1, int(SHARE * free // each))
    if fitting < wanted and (wanted, tokens) not in _logged:
        _logged.add((wanted, tokens))
        takes = f"{wanted} prompts of {tokens:,} tokens would take some {wanted * each / 2**30:.1f} GiB"
        message = f"pairs.batch_size: {takes}, and {free / 2**30:.1f} are free; {fitting} at a time"
        logging.getLogger("mnemoscope").warning(message)
    return fitting
