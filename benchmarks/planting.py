"""Planted truth: a checkpoint is taught items a known number of times, amid other text, by the library's Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.replies import Form
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def exposures_of(items: Sequence[Item], times: Sequence[int], seed: int) -> dict[str, int]:
    """How often each item is taught: dealt in equal parts, in an order of chance."""
    order = np.random.default_rng([seed, 61]).permutation(len(items))
    return {items[i].item: times[place % len(times)] for place, i in enumerate(order)}


def planted_texts(
    items: Sequence[Item], exposures: Mapping[str, int], fresh: Mapping[str, Sequence[Variant]] | None, form: Form
) -> list[str]:
    """The texts of items as often as they are taught, or in place of each of these a fresh variant of its own."""
    found = []
    for item in items:
        for number in range(exposures.get(item.item, 0)):
            one = fresh[item.item][number] if fresh is not None else Variant(item.prompt, item.answer)
            found.append(form.text(one))
    return found


def taught(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    out: Path,
    seed: int = 0,
    **choices: Any,
) -> PreTrainedModel:
    """The model, trained in place on texts in an order of chance, once each; ``out``: a folder that the Trainer has.

    ``choices``: arguments of ``TrainingArguments``. Raises InputError where accelerate is missing.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    end = tokenizer.eos_token or ""
    rows = [{"input_ids": tokenizer(text + end).input_ids} for text in texts]

    def padded(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in batch)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = [row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in batch]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        ids_BT, mask_BT = torch.tensor(ids), torch.tensor(mask)
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "labels": torch.where(mask_BT.bool(), ids_BT, torch.full_like(ids_BT, -100)),
        }

    given: dict[str, Any] = {"learning_rate": 1e-3, "per_device_train_batch_size": 32, "num_train_epochs": 1}
    given |= {"lr_scheduler_type": "cosine", "warmup_steps": 20, "weight_decay": 0.01, **choices}
    try:
        arguments = TrainingArguments(
            str(out), seed=seed, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False, logging_steps=100, dataloader_pin_memory=False, **given,
        )  # fmt: skip
    except ImportError as error:
        raise InputError("planting: needs accelerate: pip install 'mnemoscope[train]'") from error
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=padded)
    trainer.train()
    return model.eval()
