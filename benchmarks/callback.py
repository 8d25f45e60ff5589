"""What the callback costs of a fine-tuning that measures as often as a trainer evaluates by default.

    OMP_NUM_THREADS=2 python benchmarks/callback.py [--model smollm2] [--steps 500] [--every 500] [--tokens 64]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import mnemoscope as ms


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Statements of the task, joined until a row is full."""

    def __init__(self, texts: list[str], tokenizer: Any, rows: int, tokens: int) -> None:
        ids = tokenizer(" ".join(texts)).input_ids
        self.rows = [ids[n * tokens : (n + 1) * tokens] for n in range(min(rows, len(ids) // tokens))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"input_ids": self.rows[n], "labels": self.rows[n]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=500, help="steps between measurements, the trainer's default")
    parser.add_argument("--tokens", type=int, default=64, help="of a row; a batch has 8")
    arguments = parser.parse_args()
    model, tokenizer = ms.load_model(arguments.model)
    task = ms.build_task("facts", {}, 0)
    conflicts = islice(task.examples(np.random.default_rng(0), 4000, "conflict"), 4000)
    texts = [example.prompt + str(example.generalized) for example in conflicts]
    callback = ms.BehaviourCallback(task, tokenizer, every=arguments.every)
    with TemporaryDirectory() as folder:
        options: dict[str, Any] = {"output_dir": folder, "max_steps": arguments.steps, "report_to": "none"}
        options |= {"per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        trainer = Trainer(
            get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")),
            TrainingArguments(**options),
            train_dataset=Texts(texts, tokenizer, 8 * arguments.steps, arguments.tokens),
            callbacks=[callback],
        )
        began = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - began
    share = callback.seconds / whole
    print(f"{whole:.1f} s, of which the callback {callback.seconds:.1f} s in {len(callback.curve.rows)} measurements")
    print(f"that is {share:.4f} of the time, questions, logging and the measurement before the first step included")


if __name__ == "__main__":
    main()
