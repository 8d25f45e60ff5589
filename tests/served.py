"""A run made by hand for serving: random vectors and detectors of a model, bound to it, in the files of a fit."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mnemoscope as ms
from mnemoscope.auditing.origins import Reader
from mnemoscope.interventions import Binding, LowRank
from mnemoscope.interventions.adapter import Adapter
from mnemoscope.interventions.detect import Detector
from mnemoscope.runs.digests import write_marker


def random_run(
    out: Path,
    model: Any,
    tokenizer: Any,
    layer: int,
    strength: float = 0.3,
    everywhere: Collection[str] = (),
    low_rank: Collection[str] = (),
    adapters: bool = False,
) -> Path:
    """Vectors in both directions at a layer and the next, a detector at the last layer and one at ``layer - 1``.

    ``low_rank``: of the directions to these the second shift depends on the state; ``everywhere``: to these they act on
    all tokens. ``adapters``: each has one, too.
    """
    binding = Binding.of(model, tokenizer)
    config = model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    ids_NT = torch.randint(1, config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = [state[:, -1] for state in model(input_ids=ids_NT, output_hidden_states=True).hidden_states]
    cell = out / "cells" / "by-hand-0"
    for name in ("vectors", "records"):
        (cell / name).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    both, facts = dict[str, Any](), {"method": "nmd", "site": "block", "layers": [layer], "top": 1.0, "strength": 0.3}
    for toward in ("generalized", "memorized"):
        shifts = {}
        for place in (layer, layer + 1):
            shift_D = torch.randn(width, generator=generator)
            shifts[place] = shift_D * strength * states[place + 1].norm(dim=-1).mean() / shift_D.norm()
        edits: dict[int, Any] = dict(shifts)
        if toward in low_rank:
            shift_D = shifts[layer + 1]
            read_KD = torch.randn(2, width, generator=generator)
            read_KD /= read_KD.norm(dim=-1, keepdim=True) * states[layer + 2].norm(dim=-1).mean()
            edits[layer + 1] = LowRank(read_KD, torch.ones(2), torch.stack([shift_D, -0.5 * shift_D]))
        positions = "all" if toward in everywhere else "decision"
        vector = ms.SteeringVector(toward, edits, positions=positions, method="nmd", binding=binding)
        vector.save(cell / "vectors" / f"to_{toward}-nmd.safetensors")
        both[f"to_{toward}"] = facts | {"positions": positions}
        if adapters:
            parts = {
                f"model.layers.{layer}.mlp.{name}": (
                    torch.randn(2, module.in_features, generator=generator) / module.in_features**0.5,
                    torch.randn(module.out_features, 2, generator=generator) * module.weight.std(),
                )
                for name, module in model.model.layers[layer].mlp.named_children()
                if hasattr(module, "in_features")
            }
            adapter = Adapter(toward=toward, method="lora", parts=parts, binding=binding)
            adapter.save(cell / "vectors" / f"to_{toward}-lora")
    rng = np.random.default_rng(0)
    for name, place in (("detector", layers - 2), ("detector_below", layer - 1)):
        here_ND = states[place + 1].double().numpy()
        weights_LD = rng.normal(size=(layers, width)) / np.linalg.norm(here_ND[0])
        whitening_DD = np.eye(width) / (2.0 * np.linalg.norm(here_ND[0]))
        Detector(
            *("block", place, weights_LD, rng.normal(size=layers), weights_LD[0] * 0.5, 0.3, np.zeros(width)),
            whitening_DD,
            binding=binding,
        ).save(cell / f"{name}.safetensors")
    reads, D = [layer, layers - 1], width
    Reader(
        *(reads, rng.normal(size=(3, 4 * D + 2)) / (0.2 * np.linalg.norm(here_ND[0])), rng.normal(size=3)),
        *(np.zeros(D), whitening_DD),
        binding=binding,
    ).save(cell.parents[1] / "reader.safetensors")
    lora = {way: some | {"method": "lora", "lever": "adapter"} for way, some in both.items()}
    methods = {"nmd": both} | ({"lora": lora} if adapters else {})
    best = {way: "nmd" for way in both} | ({"to_generalized": "lora"} if adapters else {})
    chosen = {"best": best, "methods": methods}
    (cell / "records" / "chosen.json").write_text(json.dumps({"pairs": chosen, "conflict": chosen}))
    write_marker(cell, "steering", [path for path in sorted(cell.rglob("*")) if path.is_file()])
    return out
