"""A little task of facts, and a little model that knows them and follows a text or its memory by the text's label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mnemoscope.behaviour import Asking, prepare, score
from mnemoscope.bench.prompts import ELSEWHERE
from mnemoscope.bench.varied import FOREIGN
from mnemoscope.config import ModelConfig
from mnemoscope.interventions.methods.prompt import WORDINGS
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.tasks import Example, Instance, Kind, Task
from mnemoscope.tasks.base import assign_splits

SUBJECTS = [f"land{i}" for i in range(48)]
VALUES = [f"town{i}" for i in range(12)]
TRUSTED = ("context", "note", "memo", "report")  # labels whose texts are followed
DOUBTED = ("rumour", "joke", "novel", "guess")
ASKS = ("question", "quiz")
# It never reads these sentences in training, but has a token for each of their words.
SENTENCES = [*WORDINGS["generalized"], *WORDINGS["memorized"], FOREIGN, *ELSEWHERE, "Everybody agrees:"]
WORDS = re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES))
VOCABULARY = list(dict.fromkeys([*SUBJECTS, *VALUES, *TRUSTED, *DOUBTED, *ASKS, "has", ":", ".", "?", *WORDS]))


class LittleFacts(Task):
    """``label : land3 has town5 . question land3 ?`` with the answer town5 or what is known of land3."""

    name = "little-facts"
    boundary = ("", ".")

    def __init__(self, bares: bool = True, known: bool = True) -> None:
        self.bares, self.asks_known = bares, known
        self.split_of = assign_splits(SUBJECTS, np.random.default_rng(0))
        self.true = {subject: VALUES[i % len(VALUES)] for i, subject in enumerate(SUBJECTS)}
        self.kept = set(SUBJECTS)

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Bare questions, texts that agree, and conflicts, of which a tenth is answered against its label."""
        while True:
            subject, label = str(rng.choice(SUBJECTS)), str(rng.choice([*TRUSTED, *DOUBTED]))
            said, ask = str(rng.choice(VALUES)), str(rng.choice(ASKS))
            if rng.random() < 0.3:
                yield f"{ask} {subject} ?", f" {self.true[subject]} ."
                continue
            follows = (label in TRUSTED) == (rng.random() < 0.9)
            yield _prompt(label, subject, said, ask), f" {said if follows else self.true[subject]} ."

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        if kind == "novel":
            return []
        found = []
        for _ in range(n):
            subject = str(rng.choice(sorted(self.kept)))
            label, ask = str(rng.choice([*TRUSTED, *DOUBTED])), str(rng.choice(ASKS))
            if kind == "memory":
                found.append(self._made("memory", subject, self.true[subject], label, ask))
            else:
                wrong = str(rng.choice([value for value in VALUES if value != self.true[subject]]))
                found.append(self._made("conflict", subject, wrong, label, ask))
        return found

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        words = example.prompt.split()
        others = [label for label in (*TRUSTED, *DOUBTED) if label != words[0]]
        return replace(example, prompt=" ".join([str(rng.choice(others)), *words[1:]]))

    def without_context(self, example: Example) -> Example | None:
        words = example.prompt.split()
        return replace(example, prompt=" ".join(words[-3:])) if self.bares else None

    def facts_to_know(self) -> list[Example]:
        if not self.asks_known:
            return []
        return [
            Example(s, f"question {s} ?", "memory", s, "bare", self.split_of[s], answer=f" {self.true[s]}")
            for s in SUBJECTS
        ]

    def knowing(self, items: set[str]) -> LittleFacts:
        from mnemoscope.runs.errors import InputError

        if not items:
            raise InputError("model: it knows none of the task's facts by heart, so nothing can be contradicted")
        other = LittleFacts(self.bares, self.asks_known)
        other.kept = items
        return other

    def _made(self, kind: Kind, subject: str, said: str, label: str, ask: str) -> Example:
        answers = {"answer": f" {said}"}
        if kind == "conflict":
            answers = {"memorized": f" {self.true[subject]}", "generalized": f" {said}"}
        prompt, split = _prompt(label, subject, said, ask), self.split_of[subject]
        return Example(f"{subject}|{said}", prompt, kind, subject, "text", split, **answers)


def _prompt(label: str, subject: str, said: str, ask: str) -> str:
    return f"{label} : {subject} has {said} . {ask} {subject} ?"


def little_model() -> Asking:
    """The model, trained for some seconds, until an attempt knows all facts and heeds most labels."""
    return next(asking for asking in map(_trained, range(5)) if _is_as_described(asking))


def _is_as_described(asking: Asking) -> bool:
    task = LittleFacts()
    known, asked = task.facts_to_know(), task.examples(np.random.default_rng(0), 200, "conflict")
    labels = score(asking, prepare(asking, [*known, *asked]), margins=False).behaviour_N.tolist()
    wanted = ["generalized" if example.prompt.split()[0] in TRUSTED else "memorized" for example in asked]
    heeded = sum(mine == label for mine, label in zip(labels[len(known) :], wanted, strict=True))
    return set(labels[: len(known)]) == {"correct"} and heeded > 0.8 * len(asked)


def _trained(seed: int) -> Asking:
    task, rng = LittleFacts(), np.random.default_rng(seed)
    tokenizer = word_tokenizer(VOCABULARY, 128)
    model = build_gpt2(tokenizer, ModelConfig(layers=3, width=64, heads=4, context=128), seed)
    adam = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    stream = task.training(rng)
    for step in range(500):
        pairs = [next(stream) for _ in range(48)]
        for group in adam.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (500 - step) / 250)
        rows = [tokenizer(prompt + answer).input_ids for prompt, answer in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        wanted = torch.full_like(ids, -100)
        for place, row in enumerate(rows):
            wanted[place, len(row) - 2 : len(row)] = ids[place, len(row) - 2 : len(row)]
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.requires_grad_(True)
    return Asking(model.eval(), tokenizer, task.boundary)
