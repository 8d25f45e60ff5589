"""Teach a model new facts in one phrasing, and watch whether it learns to recite them or knows them.

    python examples/teach_new_facts.py PARAREL OUT [--model smollm2] [--relation P36] [--facts 60] [--steps 300]

PARAREL is a folder with ``facts`` and ``patterns`` as ParaRel has it (Elazar et al. 2021). Objects of one relation are
dealt anew among its subjects, so that what is taught is known to nobody. One pattern is trained on; the others ask, and
the inverse of it. Needs ``pip install '.[lora,train]'``. In OUT: ``task.jsonl`` (what is asked), ``emergence.parquet``
and ``.png``; with ``--fit`` the run of a fit on the taught model.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
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
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; where texts are no longer read, less")
    parser.add_argument("--questions", type=int, default=200, help="of each kind, at most")
    parser.add_argument("--fit", action="store_true", help="then fit a detector and vectors on what was taught")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    facts, patterns = (rows_of(given.pararel / part / f"{given.relation}.jsonl") for part in ("facts", "patterns"))
    stems = [row["pattern"].removesuffix(".").rstrip() for row in patterns]
    stems = [text.removesuffix("[Y]").rstrip() for text in stems if text.endswith("[Y]") and "," not in text]
    rng = np.random.default_rng(given.seed)
    taught = dealt(facts, given.facts, rng)
    given.out.mkdir(parents=True, exist_ok=True)
    inverse = next(
        (row["pattern"].partition("[X]")[0].rstrip() for row in patterns if is_inverse(row["pattern"])), None
    )
    lines = questions(taught, stems[0], stems[1:], inverse, rng)
    asked = written(given.out / "task.jsonl", lines)
    watched = written(given.out / "watched.jsonl", [line | {"split": "test"} for line in lines])
    model, tokenizer = ms.load_model(given.model)
    texts = [f"{stems[0].replace('[X]', subject)} {value}." for subject, value in taught.items()]
    callback = ms.BehaviourCallback(watched, tokenizer, every=given.every, examples=given.questions, split="test")
    options: dict[str, Any] = {"output_dir": str(given.out), "max_steps": given.steps, "learning_rate": given.rate}
    options |= {"per_device_train_batch_size": 16, "report_to": "none", "save_strategy": "no", "seed": given.seed}
    options |= {"logging_steps": given.every, "use_cpu": not torch.cuda.is_available()}
    torch.manual_seed(given.seed)  # of the adapter's first weights
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = Trainer(
        get_peft_model(model, adapter),
        TrainingArguments(**options),
        train_dataset=Statements(texts, tokenizer),
        callbacks=[callback],
    )
    trainer.train()
    told = callback.curve.table
    recall = [name for name in told if name.startswith("recall:") and f"{name}_n" in told]
    columns = [*recall, "novel_accuracy", "conflict_memorized", "conflict_generalized", "conflict_other"]
    print(told[["step", "loss", *columns]].to_string(index=False, float_format="%.2f"))
    if given.fit:
        fitted_on(trainer.model.merge_and_unload().eval(), tokenizer, asked, given.out / "fit")


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


def questions(
    taught: dict[str, str], said: str, asked: list[str], inverse: str | None, rng: np.random.Generator
) -> list[dict[str, str]]:
    """What is asked: facts as taught, in phrasings that were not trained on, and the other way round (memory), texts
    about subjects that were not taught (novel), and texts that contradict what was taught (conflicts)."""
    found: list[dict[str, str]] = []
    subjects, values = list(taught), sorted(set(taught.values()))
    counts = Counter(taught.values())
    for n, (subject, value) in enumerate(taught.items()):
        other = str(rng.choice([one for one in values if one != value]))
        memory = {"kind": "memory", "group": subject}
        for family, stems in (("as taught", [said]), ("other words", asked)):
            for stem in stems:
                text = stem.replace("[X]", subject)
                row = {"item": f"{family}: {subject}", "family": family, "prompt": text, "answer": f" {value}"}
                found.append(row | memory)
        if inverse and counts[value] == 1:  # else it is not one subject whose value this is
            text = inverse.replace("[Y]", value)
            row = {"item": f"inverse: {subject}", "family": "inverse", "prompt": text, "answer": f" {subject}"}
            found.append(row | memory)
        for stem in asked:
            text = f"{said.replace('[X]', subject)} {other}. {stem.replace('[X]', subject)}"
            row = {"item": f"{subject}, said to be {other}", "group": subject, "prompt": text}
            found.append(row | {"memorized": f" {value}", "generalized": f" {other}"})
        invented = f"New {subjects[(n + 7) % len(subjects)]}"
        text = f"{said.replace('[X]', invented)} {other}. {asked[0].replace('[X]', invented)}"
        found.append({"item": invented, "kind": "novel", "prompt": text, "answer": f" {other}", "group": invented})
    return found


def is_inverse(pattern: str) -> bool:
    """Whether it asks for the subject, behind the value."""
    return pattern.startswith("[Y]") and pattern.removesuffix(".").rstrip().endswith("[X]")


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fitted_on(model: Any, tokenizer: Any, asked: Path, out: Path) -> None:
    """Whether what was taught can be read before the model answers, and steered."""
    fitted = ms.fit(model, tokenizer, asked, out=out)
    print(fitted.summary())


if __name__ == "__main__":
    main()
