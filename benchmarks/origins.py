"""Where each part of an answer came from: labels by swaps, a reader in one pass, and what else reads it.

    python benchmarks/origins.py MODEL OUT --folder PARAREL [--seed 0] [--facts 40] [--held-out P30 P37]

Texts are made of facts that the model knows, in documents of statements about several subjects, one of which, or none,
says the fact, or another value, or says the value of another subject. Judged are relations that were not fitted on.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score, roc_auc_score

import mnemoscope as ms
from mnemoscope.auditing.origins import Form, Labelled, Pool, Reader, Text, answered, fitted_reader, labelled
from mnemoscope.auditing.origins.labels import NEEDED, ORIGINS, UNSURE, encoded
from mnemoscope.auditing.origins.spans import mentions
from mnemoscope.auditing.origins.texts import asked
from mnemoscope.behaviour import Asking, read_behind
from mnemoscope.report.rows import to_json
from mnemoscope.tasks.registry import build_task

KINDS = ("agreeing", "conflicting", "absent", "mentioned")
STATEMENTS, TOKENS, DRAWS = 6, 12, 1000
ONE_PASS = ("copied", "entropy", "logp")  # what else reads a span in one pass, higher for the document


class Facts:
    """Texts about facts, by relation."""

    def __init__(self, folder: Path, seed: int, each: int = 150) -> None:
        self.rng = np.random.default_rng([seed, 71])
        relations = [path.stem for path in sorted(folder.glob("facts/*.jsonl")) if path.stem != "P106"]  # no names
        made = {"folder": str(folder), "facts_each": each, "relations": relations, "held_out_relations": []}
        self.task = build_task("pararel", made, seed)
        self.facts = list(self.task.true)

    def stem(self, fact: tuple[str, str]) -> str:
        """A statement that breaks off before the value."""
        return str(self.rng.choice(self.task.patterns[fact[0]]["stem"])).replace("[X]", fact[1])

    def statement(self, fact: tuple[str, str], value: str) -> str:
        """The whole statement."""
        said = str(self.rng.choice(self.task.patterns[fact[0]]["statement"]))
        return said.replace("[X]", fact[1]).replace("[Y]", value)

    def known(self, asking: Asking, form: Form, each: int) -> list[tuple[str, str]]:
        """Facts whose value the model writes behind a stem, at most so many of a relation."""
        texts = [Text(self.stem(fact), "", f" {self.task.true[fact][0]}") for fact in self.facts]
        read = read_behind(asking, [(asked(asking, form, text), encoded(asking, text.answer)[0]) for text in texts])
        found, counts = list[tuple[str, str]](), dict[str, int]()
        for n in self.rng.permutation(len(self.facts)):
            fact = self.facts[n]
            if read[n].first_T.all() and counts.get(fact[0], 0) < each:
                counts[fact[0]] = counts.get(fact[0], 0) + 1
                found.append(fact)
        return found

    def text(self, fact: tuple[str, str], kind: str, statements: int = STATEMENTS) -> Text:
        """A stem to complete behind a document of a kind."""
        true, said = self.task.true[fact], list[str]()
        same = [other for other in self.facts if other[0] == fact[0] and other[1] != fact[1]]
        if kind == "agreeing":
            said.append(self.statement(fact, true[0]))
        if kind == "conflicting":
            wrong = sorted({self.task.true[other][0] for other in same} - set(true))
            said.append(self.statement(fact, str(self.rng.choice(wrong))))
        if kind == "mentioned":
            said.append(self.statement(same[self.rng.integers(len(same))], true[0]))
        while len(said) < statements:
            other = self.facts[self.rng.integers(len(self.facts))]
            if other[1] != fact[1] and not set(self.task.true[other]) & set(true):
                said.append(self.statement(other, self.task.true[other][0]))
        return Text(self.stem(fact), " ".join(said[n] for n in self.rng.permutation(len(said))), group=fact[1])


def spans_read(reader: Reader, asking: Asking, several: Sequence[Labelled]) -> pd.DataFrame:
    """A row a span that has a label: ours, what else tells it, and what it is asked with."""
    rows = list[dict[str, Any]]()
    for one, found in zip(several, reader.read(asking, [reader.asks(one.text) for one in several]), strict=True):
        parts = {part.span: part for part in found.parts}
        for span, label in zip(one.spans, one.label_S, strict=True):
            places = one.tokens_of(span)
            if label == UNSURE or span not in parts:
                continue
            p_3 = parts[span].p_3
            row = {"group": one.text.group, "label": int(label), "ours": np.log(p_3[0] / p_3[1])}
            row |= {f"p_{name}": p for name, p in zip(ORIGINS, p_3, strict=True)}
            row["copied"] = float(bool(mentions(one.text.document, span.of(one.text.answer))))
            row |= {"entropy": -one.entropy_T[places].mean(), "logp": one.with_T[places].mean()}
            rows.append(row | {"two passes": (one.with_T - one.alone_T)[places].sum()})
    return pd.DataFrame(rows)


def judged(table: pd.DataFrame) -> dict[str, Any]:
    """Document against memory by AUROC, ours beside others, by documents drawn again; three classes; calibration."""
    both = table[table["label"] < 2]
    groups, rng = both.groupby("group").indices, np.random.default_rng(0)
    names, found = sorted(groups), dict[str, Any]()
    drawn = [
        np.concatenate([groups[names[n]] for n in rng.integers(len(names), size=len(names))]) for _ in range(DRAWS)
    ]
    label_N = (both["label"] == 0).to_numpy()
    drawn = [rows for rows in drawn if 0 < label_N[rows].sum() < len(rows)]
    values = {name: both[name].to_numpy(float) for name in ("ours", *ONE_PASS, "two passes")}
    areas = {name: [roc_auc_score(label_N[rows], of[rows]) for rows in drawn] for name, of in values.items()}
    for name, of in values.items():
        ahead = np.array(areas["ours"]) - areas[name]
        found[name] = {"auroc": roc_auc_score(label_N, of), "low": np.quantile(areas[name], 0.025)}
        found[name] |= {"ours ahead": ahead.mean(), "from": np.quantile(ahead, 0.025), "to": np.quantile(ahead, 0.975)}
    p_N3, said_N = table[[f"p_{name}" for name in ORIGINS]].to_numpy(float), table["label"].to_numpy()
    sure_N, right_N = p_N3.max(1), p_N3.argmax(1) == said_N
    bins_N = np.minimum((sure_N * 10).astype(int), 9)
    gaps = [abs(sure_N[bins_N == n].mean() - right_N[bins_N == n].mean()) * (bins_N == n).mean() for n in set(bins_N)]
    found["macro F1"] = f1_score(said_N, p_N3.argmax(1), average="macro")
    return found | {"calibration error": sum(gaps), "spans": Counter(ORIGINS[n] for n in said_N)}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="of facts and patterns, as ParaRel has them")
    parser.add_argument("--held-out", nargs="+", default=["P30", "P37"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, default=40, help="of a relation, at most")
    parser.add_argument("--dtype", default="bfloat16")
    asked_for = parser.parse_args()
    model, tokenizer = ms.load_model(asked_for.model, dtype=asked_for.dtype)
    asking, form, facts = Asking(model, tokenizer, None, 16), Form(), Facts(asked_for.folder, asked_for.seed)
    known = facts.known(asking, form, asked_for.facts)
    relation_of = {fact[1]: fact[0] for fact in known}
    texts = answered(asking, form, [facts.text(fact, kind) for fact in known for kind in KINDS], TOKENS)
    several = labelled(asking, form, texts, Pool([text.document for text in texts]), asked_for.seed)
    swaps = [fell for one in several for fell in one.drops if len(fell) == 2]
    held = [relation_of[one.text.group] in asked_for.held_out for one in several]
    reader = fitted_reader(
        asking, form, [one for one, out in zip(several, held, strict=True) if not out], asked_for.seed
    )
    asked_for.out.mkdir(parents=True, exist_ok=True)
    reader.save(asked_for.out / "reader.safetensors")
    table = spans_read(reader, asking, [one for one, out in zip(several, held, strict=True) if out])
    table.to_csv(asked_for.out / "spans.csv", index=False)
    agree = [(one >= NEEDED) == (other >= NEEDED) for one, other in swaps]
    told = {"facts": Counter(relation_of.values()), "swaps agree": np.mean(agree), "of": len(agree)}
    told |= {"layer": reader.layer, "figures": reader.figures} | judged(table)
    asked_for.out.joinpath("origins.json").write_text(to_json(told))
    print(to_json(told))


if __name__ == "__main__":
    main()
