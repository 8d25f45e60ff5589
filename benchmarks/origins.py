"""Where each part of an answer came from: labels by swaps, a reader in one pass, and what else reads it.

    python benchmarks/origins.py fit MODEL OUT --folder PARAREL [--seed 0] [--chat]
    python benchmarks/origins.py carry MODEL OUT --folder PARAREL --passages NQ_SYNTH [--seed 0] [--chat]

Texts are made of facts, in documents of statements about several subjects, one of which, or none, says the fact, or
another value, or says the value of another subject. Judged are relations that were not fitted on. ``carry`` takes the
reader of ``fit`` to documents of 2,000 tokens and to passages, and has what it flags as memory written again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mnemoscope as ms
from mnemoscope.auditing.origins import Form, Labelled, Pool, Reader, Text, answered, fitted_reader, labelled
from mnemoscope.auditing.origins.labels import NEEDED, ORIGINS, UNSURE, encoded, tokens_of
from mnemoscope.auditing.origins.spans import mentions, spans_of
from mnemoscope.auditing.origins.texts import asked
from mnemoscope.behaviour import Asking, Prompting, read_behind
from mnemoscope.face.rewriting import rewritten
from mnemoscope.report.rows import to_json
from mnemoscope.tasks.registry import build_task

KINDS = ("agreeing", "conflicting", "absent", "absent", "mentioned")
STATEMENTS, TOKENS, SENTENCE, DRAWS = 6, 14, 32, 1000
ONE_PASS = ("copied", "entropy", "logp", "attention", "the input", "attriwiki")  # rivals, higher for the document
Probe = Any  # of scikit-learn


class Facts:
    """Texts about facts, by relation."""

    def __init__(self, folder: Path, seed: int, each: int, begins: str) -> None:
        self.rng, self.begins = np.random.default_rng([seed, 71]), begins
        relations = [path.stem for path in sorted(folder.glob("facts/*.jsonl")) if path.stem != "P106"]  # no names
        made = {"folder": str(folder), "facts_each": each, "relations": relations, "held_out_relations": []}
        self.task = build_task("pararel", made, seed)
        self.facts = list(self.task.true)

    def question(self, fact: tuple[str, str]) -> str:
        """A statement that breaks off before the value."""
        return self.begins + str(self.rng.choice(self.task.patterns[fact[0]]["stem"])).replace("[X]", fact[1])

    def statement(self, fact: tuple[str, str], value: str) -> str:
        """The whole statement."""
        said = str(self.rng.choice(self.task.patterns[fact[0]]["statement"]))
        return said.replace("[X]", fact[1]).replace("[Y]", value)

    def drawn(self, asking: Asking, known: int, unknown: int) -> list[tuple[str, str]]:
        """Facts of each relation whose value the model writes without a document, and others, so many at most."""
        bare = [Text(self.question(fact), "") for fact in self.facts]
        said = {text.question: text.answer for text in answered(asking, Form(), bare, TOKENS)}
        found, counts = list[tuple[str, str]](), Counter[tuple[str, bool]]()
        for n in self.rng.permutation(len(self.facts)):
            fact = self.facts[n]
            knows = bool(mentions(said.get(bare[n].question, ""), self.task.true[fact][0]))
            counts[fact[0], knows] += 1
            if counts[fact[0], knows] <= (known if knows else unknown):
                found.append(fact)
        return found

    def wrong(self, fact: tuple[str, str]) -> str:
        """A value of another fact of the relation."""
        same = {self.task.true[other][0] for other in self.facts if other[0] == fact[0]}
        return str(self.rng.choice(sorted(same - set(self.task.true[fact]))))

    def text(self, fact: tuple[str, str], kind: str, statements: int = STATEMENTS, value: str = "") -> Text:
        """A stem to complete behind a document of a kind; ``value``: of a conflict, else drawn."""
        true, said = self.task.true[fact], list[str]()
        same = [other for other in self.facts if other[0] == fact[0] and other[1] != fact[1]]
        if kind == "agreeing":
            said.append(self.statement(fact, true[0]))
        if kind == "conflicting":
            said.append(self.statement(fact, value or self.wrong(fact)))
        if kind == "mentioned":
            said.append(self.statement(same[self.rng.integers(len(same))], true[0]))
        while len(said) < statements:
            other = self.facts[self.rng.integers(len(self.facts))]
            if other[1] != fact[1] and not set(self.task.true[other]) & set(true):
                said.append(self.statement(other, self.task.true[other][0]))
        return Text(self.question(fact), " ".join(said[n] for n in self.rng.permutation(len(said))), group=fact[1])


def passages(file: Path, seed: int, most: int, chat: bool) -> list[Text]:
    """Questions about passages of a file of rows with ``context_string``."""
    found = list[Text]()
    for line in file.read_text().splitlines():
        whole = json.loads(line)["context_string"]
        passage, mark, rest = whole.partition("\nUsing only the references")
        if mark:
            question = rest.partition("Question: ")[2].partition("\n")[0].strip()
            asks = f"{question} Answer in one sentence." if chat else f"Question: {question}\nAnswer:"
            found.append(Text(asks, passage.strip()))
    return [found[n] for n in np.random.default_rng([seed, 74]).permutation(len(found))[:most]]


def attention(asking: Asking, several: Sequence[Labelled]) -> list[np.ndarray]:
    """Share of the attention of the token before each of an answer that goes to its document, a mean over all heads."""
    model, found = asking.model, list[np.ndarray]()
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    for one in several:
        text = asking.text(Form().prompt(one.text.question, one.text.document))
        how = {"add_special_tokens": not asking.prompting.chat, "return_offsets_mapping": True}
        places, prompt = asking.tokenizer(text, **how), asked(asking, Form(), one.text)
        begin = text.index(one.text.document)
        there = torch.tensor([s < begin + len(one.text.document) and begin < e for s, e in places.offset_mapping])
        with torch.no_grad():
            maps = model(torch.tensor([[*prompt, *one.ids]]), output_attentions=True).attentions
        rows = [part[0, :, len(prompt) - 1 : -1, : len(prompt)][..., there].float().sum(-1).mean(0) for part in maps]
        found.append(torch.stack(rows).mean(0).numpy())
    model.set_attn_implementation(was)
    return found


def inputs(asking: Asking, one: Labelled, places: Sequence[int]) -> np.ndarray:
    """What stands in the input alone: mean embeddings of a span, its question and its document."""
    embed, texts = asking.model.get_input_embeddings(), (one.text.question, one.text.document)
    rows = [[one.ids[n] for n in places], *asking.tokenizer(list(texts), add_special_tokens=False).input_ids]
    with torch.no_grad():
        parts = [embed(torch.tensor(row)).float().mean(0).numpy() for row in rows]
    return np.concatenate([*parts, parts[0] * parts[2]])


def by_input(asking: Asking, several: Sequence[Labelled]) -> Probe:
    """A probe of inputs for the document against memory."""
    spans = [(one, one.tokens_of(s), n) for one in several for s, n in zip(one.spans, one.label_S, strict=True)]
    spans = [found for found in spans if found[2] in (0, 1)]
    rows = np.stack([inputs(asking, one, places) for one, places, _ in spans])
    return make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)).fit(rows, [n == 0 for *_, n in spans])


def attriwiki(asking: Asking, facts: Facts, drawn: Sequence[tuple[str, str]], layer: int) -> Probe:
    """A probe of states at names, with labels by construction: told by a document, or asked without one."""
    told = answered(asking, Form(), [facts.text(fact, "agreeing") for fact in drawn], TOKENS)
    bare = answered(asking, Form(), [Text(facts.question(fact), "") for fact in drawn], TOKENS)
    rows, label_N = list[np.ndarray](), list[bool]()
    both = [(text, encoded(asking, text.answer)) for text in (*told, *bare)]
    read = read_behind(asking, [(asked(asking, Form(), text), ids) for text, (ids, _) in both], [layer])
    for (text, (_, offsets)), one in zip(both, read, strict=True):
        for span in spans_of(text.answer):
            if not mentions(text.question, span.of(text.answer)):
                rows.append(one.states_ULD[1:, 0][tokens_of(offsets, span)].mean(0))
                label_N.append(bool(text.document))
    return make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)).fit(np.stack(rows), label_N)


def spans_read(
    reader: Reader, asking: Asking, several: Sequence[Labelled], probes: dict[str, Probe] | None = None
) -> pd.DataFrame:
    """A row a span that has a label: ours, what else tells it, and what it is asked with."""
    rows, probes = list[dict[str, Any]](), probes or {}
    found = reader.read(asking, [reader.asks(one.text) for one in several])
    states = read_behind(asking, [(asked(asking, Form(), one.text), one.ids) for one in several], [reader.layers[0]])
    looked = attention(asking, several) if probes else [np.full(len(one.ids), np.nan) for one in several]
    for one, origins, read, look_T in zip(several, found, states, looked, strict=True):
        for span, label in zip(one.spans, one.label_S, strict=True):
            places, what = one.tokens_of(span), span.of(one.text.answer)
            if label == UNSURE:
                continue
            p_3 = origins.p_T3[places].mean(0)
            row = {
                "group": one.text.group or one.text.document,
                "label": int(label),
                "unlike": origins.unlike_T[places].mean() >= 0.5,
            }
            row |= {"asked": bool(mentions(one.text.question, what)), "ours": np.log(p_3[0] / p_3[1])}
            row |= {f"p_{name}": p for name, p in zip(ORIGINS, p_3, strict=True)}
            row |= {"copied": float(bool(mentions(one.text.document, what))), "logp": one.with_T[places].mean()}
            row |= {"entropy": -one.entropy_T[places].mean(), "attention": look_T[places].mean()}
            row |= {"two passes": (one.with_T - one.alone_T)[places].sum()}
            if probes:
                row["the input"] = probes["the input"].decision_function([inputs(asking, one, places)])[0]
                row["attriwiki"] = probes["attriwiki"].decision_function([read.states_ULD[1:, 0][places].mean(0)])[0]
            rows.append(row)
    return pd.DataFrame(rows)


def judged(table: pd.DataFrame) -> dict[str, Any]:
    """Document against memory by AUROC, ours beside others, by documents drawn again; three classes; calibration."""
    both = table[(table["label"] < 2) & ~table["asked"]]
    groups, rng = both.groupby("group").indices, np.random.default_rng(0)
    names, found = sorted(groups), dict[str, Any]()
    drawn = [
        np.concatenate([groups[names[n]] for n in rng.integers(len(names), size=len(names))]) for _ in range(DRAWS)
    ]
    label_N = (both["label"] == 0).to_numpy()
    drawn = [rows for rows in drawn if 0 < label_N[rows].sum() < len(rows)]
    there = [name for name in ("ours", *ONE_PASS, "two passes") if name in both and both[name].notna().all()]
    values = {name: both[name].to_numpy(float) for name in there}
    areas = {name: [roc_auc_score(label_N[rows], of[rows]) for rows in drawn] for name, of in values.items()}
    for name, of in values.items():
        ahead = np.array(areas["ours"]) - areas[name]
        found[name] = {"auroc": roc_auc_score(label_N, of), "low": np.quantile(areas[name], 0.025)}
        found[name] |= {"ours ahead": ahead.mean(), "from": np.quantile(ahead, 0.025), "to": np.quantile(ahead, 0.975)}
    found["all"], found["without those of the question"] = classes(table), classes(table[~table["asked"]])
    return found | {"unlike": table["unlike"].mean()}


def classes(table: pd.DataFrame) -> dict[str, Any]:
    """Macro-F1 of three classes, expected calibration error, and how many there are of each."""
    p_N3, said_N = table[[f"p_{name}" for name in ORIGINS]].to_numpy(float), table["label"].to_numpy()
    sure_N, right_N = p_N3.max(1), p_N3.argmax(1) == said_N
    bins_N = np.minimum((sure_N * 10).astype(int), 9)
    gaps = [abs(sure_N[bins_N == n].mean() - right_N[bins_N == n].mean()) * (bins_N == n).mean() for n in set(bins_N)]
    found = {"macro F1": f1_score(said_N, p_N3.argmax(1), average="macro"), "calibration error": sum(gaps)}
    return found | {"spans": Counter(ORIGINS[n] for n in said_N)}


def agreement(several: Sequence[Labelled]) -> dict[str, Any]:
    """How often two swaps of a span agree."""
    swaps = [fell for one in several for fell in one.drops if len(fell) == 2]
    agree = [(one >= NEEDED) == (other >= NEEDED) for one, other in swaps]
    return {"texts": len(several), "swaps agree": np.mean(agree), "of": len(agree)}


def by_token(reader: Reader, asking: Asking, several: Sequence[Labelled]) -> dict[str, Any]:
    """Document against memory, and three classes, of all tokens."""
    found = reader.read(asking, [reader.asks(one.text) for one in several])
    label_N, p_N3 = np.concatenate([one.token_T for one in several]), np.concatenate([one.p_T3 for one in found])
    label_N, p_N3 = label_N[label_N != UNSURE], p_N3[label_N != UNSURE]
    two_N = label_N < 2
    area = roc_auc_score(label_N[two_N] == 0, np.log(p_N3[two_N, 0] / p_N3[two_N, 1]))
    return {"auroc": area, "macro F1": f1_score(label_N, p_N3.argmax(1), average="macro"), "tokens": len(label_N)}


def again(reader: Reader, asking: Asking, texts: Sequence[tuple[Text, str]]) -> dict[str, Any]:
    """Of conflicts, (text, value in its document) each: what is flagged follows the document, what did stays."""
    followed, kept, nats = list[bool](), list[bool](), list[float]()
    for text, value in texts:
        found = rewritten(asking, reader, reader.asks(text), None, 0.5, TOKENS)
        first = found.first.parts[:1]
        if found.spans and found.first.parts and not mentions(found.first.answer, value):
            followed.append(bool(mentions(found.spans[0][1], value)))
        if first and mentions(first[0].span.of(found.first.answer), value):
            kept.append(bool(mentions(found.origins.answer, value)))
        if found.spans:
            nats.append(np.subtract(*(rest_of(asking, text, one.answer) for one in (found.origins, found.first))))
    return {"conflicts": len(texts), "flagged follow": np.mean(followed), "flagged": len(followed)} | {
        "document's kept": np.mean(kept),
        "document's": len(kept),
        "nats a token more": np.nanmean(nats),
    }


def rest_of(asking: Asking, text: Text, answer: str) -> float:
    """Nats a token of what is neither name nor number of an answer."""
    ids, offsets = encoded(asking, answer)
    (read,) = read_behind(asking, [(asked(asking, Form(), text), ids)])
    named = {n for span in spans_of(answer) for n in tokens_of(offsets, span)}
    rest = [n for n in range(len(ids)) if n not in named]
    return float(-read.logp_T[rest].mean()) if rest else np.nan


def fit(asked_for: argparse.Namespace, asking: Asking, facts: Facts) -> dict[str, Any]:
    """Fit a reader on all relations but those held out, and judge it on these."""
    drawn = facts.drawn(asking, asked_for.facts, asked_for.facts // 4)
    relation_of = {fact[1]: fact[0] for fact in drawn}
    texts = answered(asking, Form(), [facts.text(fact, kind) for fact in drawn for kind in KINDS], TOKENS)
    several = labelled(asking, Form(), texts, Pool([text.document for text in texts]), asked_for.seed)
    held = [one for one in several if relation_of[one.text.group] in asked_for.held_out]
    rest = [one for one in several if relation_of[one.text.group] not in asked_for.held_out]
    reader, _ = fitted_reader(asking, Form(), rest, asked_for.seed)
    reader.save(asked_for.out / "reader.safetensors")
    fitted_on = [fact for fact in drawn if fact[0] not in asked_for.held_out]
    probes = {"the input": by_input(asking, rest), "attriwiki": attriwiki(asking, facts, fitted_on, reader.layers[0])}
    table = spans_read(reader, asking, held, probes)
    table.to_csv(asked_for.out / "spans.csv", index=False)
    told = {"facts": Counter(relation_of.values()), **agreement(several), "layers": reader.layers}
    return told | {"figures": reader.figures} | judged(table) | {"by token": by_token(reader, asking, held)}


def carry(asked_for: argparse.Namespace, asking: Asking, facts: Facts) -> dict[str, Any]:
    """The reader of ``fit`` on long documents, on passages, and where it has answers written again."""
    reader, told = Reader.load(asked_for.out / "reader.safetensors"), dict[str, Any]()
    drawn = [fact for fact in facts.drawn(asking, asked_for.facts, 0) if fact[0] in asked_for.held_out]
    wrong = [(fact, facts.wrong(fact)) for fact in drawn[: asked_for.lever]]
    conflicts = [(facts.text(fact, "conflicting", value=value), value) for fact, value in wrong]
    told["written again"] = again(reader, asking, conflicts)
    long = [
        facts.text(fact, KINDS[n % len(KINDS)], asked_for.statements) for n, fact in enumerate(drawn[: asked_for.long])
    ]
    short = passages(asked_for.passages, asked_for.seed, asked_for.texts, asking.prompting.chat)
    for name, texts, tokens in (("passages", short, SENTENCE), ("long", long, TOKENS)):
        own = answered(asking, Form(), texts, tokens)
        several = labelled(asking, Form(), own, Pool([text.document for text in texts]), asked_for.seed)
        table = spans_read(reader, asking, several)
        table.to_csv(asked_for.out / f"{name}.csv", index=False)
        lengths = [len(row) for row in asking.tokenizer([text.document for text in texts]).input_ids]
        told[name] = {"tokens of a document": np.median(lengths), **agreement(several)} | judged(table)
        told[name]["by token"] = by_token(reader, asking, several)
    return told


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fit", "carry"])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="of facts and patterns, as ParaRel has them")
    parser.add_argument("--passages", type=Path, help="rows with context_string, as nq_synth has them")
    parser.add_argument("--held-out", nargs="+", default=["P30", "P37"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=100, help="facts of a relation that are looked at")
    parser.add_argument("--facts", type=int, default=30, help="of a relation that the model knows, at most")
    parser.add_argument("--lever", type=int, default=40, help="conflicts that are written again")
    parser.add_argument("--texts", type=int, default=100, help="passages")
    parser.add_argument("--long", type=int, default=24, help="long documents")
    parser.add_argument("--statements", type=int, default=215, help="of a long document")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chat", action="store_true")
    asked_for = parser.parse_args()
    model, tokenizer = ms.load_model(asked_for.model, dtype=asked_for.dtype)
    asking = Asking(model, tokenizer, None, 16, Prompting(chat=asked_for.chat))
    begins = "Complete the sentence in a few words: " if asked_for.chat else ""
    facts = Facts(asked_for.folder, asked_for.seed, asked_for.each, begins)
    asked_for.out.mkdir(parents=True, exist_ok=True)
    told = {"fit": fit, "carry": carry}[asked_for.what](asked_for, asking, facts)
    asked_for.out.joinpath(f"{asked_for.what}.json").write_text(to_json(told))
    print(to_json(told))


if __name__ == "__main__":
    main()
