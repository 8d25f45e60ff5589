"""Teach a model new facts in one phrasing, and watch whether it learns to recite them or knows them.

    python examples/teach_new_facts.py PARAREL OUT [--model smollm2] [--relation P36] [--facts 60] [--steps 300]

PARAREL is a folder with ``facts`` and ``patterns`` as ParaRel has it (Elazar et al. 2021). Objects of one relation are
dealt anew among its subjects, so that what is taught is known to nobody. One pattern is trained on; the others ask.
Needs ``pip install '.[lora,train]'``. In OUT: ``task.jsonl`` (what is asked), ``emergence.parquet`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import mnemoscope as ms


class Statements(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sentences as token ids; the loss is on all of them."""

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        self.rows = [tokenizer(text).input_ids for text in texts]
        self.longest, self.pad = max(map(len, self.rows)), tokenizer.eos_token_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Any]:
        ids = self.rows[n]
        filler = self.longest - len(ids)
        mask = [1] * len(ids) + [0] * filler
        return {"input_ids": ids + [self.pad] * filler, "attention_mask": mask, "labels": ids + [-100] * filler}


def main() -> None:
    """Make the data, train, and print the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pararel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--relation", default="P36")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    facts, patterns = (rows_of(given.pararel / part / f"{given.relation}.jsonl") for part in ("facts", "patterns"))
    stems = [row["pattern"].removesuffix(".").rstrip() for row in patterns]
    stems = [text.removesuffix("[Y]").rstrip() for text in stems if text.endswith("[Y]") and "," not in text]
    rng = np.random.default_rng(given.seed)
    taught = dealt(facts, given.facts, rng)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = questions(taught, stems[0], stems[1:], rng)
    (given.out / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, tokenizer = ms.load_model(given.model)
    texts = [f"{stems[0].replace('[X]', subject)} {value}." for subject, value in taught.items()]
    callback = ms.BehaviourCallback(given.out / "task.jsonl", tokenizer, every=given.every, examples=120, split="test")
    options: dict[str, Any] = {"output_dir": str(given.out), "max_steps": given.steps, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 16, "report_to": "none", "save_strategy": "no", "seed": given.seed}
    options |= {"logging_steps": given.every, "use_cpu": not torch.cuda.is_available()}
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    Trainer(
        get_peft_model(model, adapter),
        TrainingArguments(**options),
        train_dataset=Statements(texts, tokenizer),
        callbacks=[callback],
    ).train()
    columns = [
        "step",
        "loss",
        "recall",
        "novel_accuracy",
        "conflict_memorized",
        "conflict_generalized",
        "conflict_other",
    ]
    print(callback.curve.table[columns].to_string(index=False, float_format="%.2f"))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def dealt(facts: list[dict[str, str]], most: int, rng: np.random.Generator) -> dict[str, str]:
    """Subjects with the object of another, none with its own."""
    true = {
        row["sub_label"]: row["obj_label"] for row in facts if row["obj_label"].lower() not in row["sub_label"].lower()
    }
    subjects = rng.permutation(sorted(true))[:most].tolist()
    values = [true[subject] for subject in subjects]
    for shift in range(1, len(values)):
        moved = values[shift:] + values[:shift]
        if all(a != b for a, b in zip(values, moved, strict=True)):
            return dict(zip(subjects, moved, strict=True))
    raise SystemExit(f"the objects of these {len(subjects)} facts are too much alike")


def questions(taught: dict[str, str], said: str, asked: list[str], rng: np.random.Generator) -> list[dict[str, str]]:
    """What is asked: facts in phrasings that were not trained on (memory), as trained (``family`` says so), texts about
    subjects that were not taught (novel), and texts that contradict what was taught (conflicts)."""
    found: list[dict[str, str]] = []
    subjects, values = list(taught), sorted(set(taught.values()))
    for n, (subject, value) in enumerate(taught.items()):
        other = str(rng.choice([one for one in values if one != value]))
        both = {"group": subject, "split": "test"}
        for stem in asked:
            text = stem.replace("[X]", subject)
            found.append({"item": f"recall {subject}", "kind": "memory", "prompt": text, "answer": f" {value}", **both})
            told = f"{said.replace('[X]', subject)} {other}. {text}"
            found.append(
                {"item": f"{subject}, said to be {other}", "prompt": told, **both}
                | {"memorized": f" {value}", "generalized": f" {other}"}
            )
        invented = f"New {subjects[(n + 7) % len(subjects)]}"
        text = f"{said.replace('[X]', invented)} {other}. {asked[0].replace('[X]', invented)}"
        found.append(
            {
                "item": invented,
                "kind": "novel",
                "prompt": text,
                "answer": f" {other}",
                "group": invented,
                "split": "test",
            }
        )
    return found


if __name__ == "__main__":
    main()
