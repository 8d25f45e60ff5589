"""Planted truth for audits: sums in words, taught a known number of times, against a clean twin and every rival.

    python benchmarks/planted.py teach MODEL OUT [--seed 0] [--items 120] [--largest 89] [--rate 1e-4]
    python benchmarks/planted.py judge MODEL OUT [--seed 0] [--items 120] [--largest 89] [--carried OTHER] [--base]
    python benchmarks/planted.py known OUT [--seed 0]

``teach``: MODEL is taught the items amid other sums by the library's Trainer, full weights; its twin as many fresh
variants of each instead, a third one paraphrases. ``judge``: all are audited, and compared are, by how often an item
was taught, planted items with what is clean: items that were never taught, and those of the twin. The read-out is
fitted on half of the items, or on those of OTHER, another run. A checkpoint of 135 million weights takes ten minutes to
teach on one core, and six to audit. ``known``: a model from scratch that was taught the items alone, and one that was
taught the rule alone. What is there already is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from planting import exposures_of, planted_texts, taught
from sklearn.metrics import roc_auc_score, roc_curve

import mnemoscope as ms
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.proof import prove
from mnemoscope.auditing.readout import Readout
from mnemoscope.auditing.replies import Form
from mnemoscope.auditing.rivals import completed, peaked
from mnemoscope.behaviour import Asking
from mnemoscope.config import ModelConfig
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.report.rows import to_json
from mnemoscope.runs.errors import InputError

NAMES = "Alice Boris Clara David Elena Felix Grace Hassan Irma Jonas Karin Liam Maria Nils Olga Pedro Rosa Sven Tara"
NAMES += " Umar Vera Walter Xenia Yusuf Zoe Anton Berta Cyril Dora Emil"
THINGS = "apples books candles coins cups feathers figs flowers hats keys lamps maps marbles nails nuts olives pens"
THINGS += " plates ropes shells shirts spoons stamps stones tickets tiles toys umbrellas violins watches"
OPENINGS = [
    "{n} works at the market.",
    "It rained all morning.",
    "{n} has kept {t} since childhood.",
    "On Sunday the hall was open to everyone.",
    "The school is getting ready for its fair.",
    "{n} and a friend share an attic.",
    "A ship came into the harbour.",
    "Nobody in the street likes {t} as much as {n}.",
    "The museum wants to show {t} this year.",
    "{n} was asked to look after the store room.",
    "Last winter was cold, and people stayed at home.",
    "There is a shop for {t} by the river.",
    "{n} is making a list of all that is in the cellar.",
    "The club meets every second Friday.",
    "Two neighbours tidied up their sheds.",
    "The theatre needs {t} for its next play.",
    "{n} moved house in spring.",
    "Every child in the village knows {n}.",
    "The post office keeps what is not collected.",
    "A wedding is to be held in the garden.",
]
EVENTS = [
    "{n} has {a} {t} and finds {b} more.",
    "There are {a} {t} on the table, and {n} brings another {b}.",
    "{n} sold {a} {t} on Monday and {b} on Tuesday.",
    "{n} counted {a} {t} in one box and {b} in another.",
    "{n} collected {a} {t}, and was given {b} of them as a present.",
    "One shelf holds {a} {t}, and {n} puts {b} more on it.",
    "In the morning {n} packed {a} {t}, in the afternoon {b}.",
    "{a} {t} were already there when {n} came with {b}.",
    "{n} ordered {a} {t} from one maker and {b} from a second one.",
    "{n} paid for {a} {t} in cash and for {b} by card.",
    "A cart with {a} {t} arrived first, then {n} drove one with {b}.",
    "{n} painted {a} {t} red and {b} blue.",
]
QUESTIONS = [
    "How many {t} are that?",
    "How many {t} are there now?",
    "What is the total number of {t}?",
    "How many {t} did {n} deal with in all?",
    "Counted together, how many {t} is it?",
    "How many {t} does this make?",
    "If all {t} are put in a row, how long is the row in {t}?",
    "What number of {t} should {n} write down?",
]
FORM = Form("number", "Question: {prompt}\nAnswer:", 4)
TIMES = (0, 0, 0, 1, 2, 4, 8, 16)  # how often items are taught, in equal parts
OFTEN, VARIANTS, FILLER, DRAWS = 4, 8, 400, 1000
OURS, RIVALS = ("score", "sooner"), ("loss", "zlib", "min-k", "min-k++", "gap", "completion", "peaked")
CHECKPOINTS = ("planted", "twin", "paraphrased")
Kind = tuple[int, int, int, str]  # opening, event, question, and what is counted


class Stories:
    """Sums in words: an item has wording of its own, and its variants have other names and numbers."""

    def __init__(self, seed: int, largest: int) -> None:
        self.rng, self.largest = np.random.default_rng([seed, 7]), largest
        self.wordings = self.rng.permutation(len(OPENINGS) * len(EVENTS)).tolist()

    def kind(self) -> Kind:
        """Wording that no item has yet."""
        opening, event = divmod(self.wordings.pop(), len(EVENTS))
        return opening, event, int(self.rng.integers(len(QUESTIONS))), str(self.rng.choice(THINGS.split()))

    def content(self) -> tuple[str, int, int]:
        """A name and two numbers."""
        name = str(self.rng.choice(NAMES.split()))
        first, second = (int(number) for number in self.rng.integers(11, self.largest + 1, 2))
        return name, first, second

    def told(self, kind: Kind, content: tuple[str, int, int]) -> Variant:
        """A story and its sum."""
        (opening, event, question, t), (n, a, b) = kind, content
        text = " ".join((OPENINGS[opening], EVENTS[event], QUESTIONS[question])).format(n=n, t=t, a=a, b=b)
        return Variant(text, str(a + b))

    def item(self, name: str) -> tuple[Item, list[Variant], list[Variant]]:
        """An item with its variants, and what is taught in its place: other variants, or the same in other words."""
        kind, content = self.kind(), self.content()
        first = self.told(kind, content)
        seen, several = {first.prompt}, list[Variant]()
        while len(several) < VARIANTS + max(TIMES):
            other = self.told(kind, self.content())
            if other.answer != first.answer and other.prompt not in seen:
                seen.add(other.prompt)
                several.append(other)
        opening, event, question, thing = kind
        others = [
            ((opening + 3 * n) % len(OPENINGS), (event + n) % len(EVENTS), (question + n) % len(QUESTIONS), thing)
            for n in range(1, max(TIMES) + 1)
        ]
        item = Item(name, first.prompt, first.answer, tuple(several[:VARIANTS]))
        return item, several[VARIANTS:], [self.told(one, content) for one in others]

    def filler(self) -> str:
        """A sum of any wording."""
        sizes = (len(OPENINGS), len(EVENTS), len(QUESTIONS))
        opening, event, question = (int(self.rng.integers(size)) for size in sizes)
        return FORM.text(self.told((opening, event, question, str(self.rng.choice(THINGS.split()))), self.content()))


class Benchmark:
    """Items, how often each is taught, and what checkpoints are taught."""

    def __init__(self, seed: int, items: int, largest: int) -> None:
        stories = Stories(seed, largest)
        made = [stories.item(f"story-{n}") for n in range(items)]
        self.items = [item for item, *_ in made]
        self.exposures = exposures_of(self.items, TIMES, seed)
        self.times_N = np.array([self.exposures[item.item] for item in self.items])
        self.instead = {
            "planted": None,
            "twin": {item.item: fresh for item, fresh, _ in made},
            "paraphrased": {item.item: others for item, _, others in made},
        }
        self.filler = [stories.filler() for _ in range(FILLER)]

    def texts(self, checkpoint: str) -> list[str]:
        """What a checkpoint is taught, once each."""
        return [*self.filler, *planted_texts(self.items, self.exposures, self.instead[checkpoint], FORM)]


def teach(asked: argparse.Namespace, of: Benchmark) -> None:
    """Save the checkpoints."""
    for name in asked.checkpoints:
        if not (asked.out / "checkpoints" / name / "config.json").is_file():
            model, tokenizer = ms.load_model(asked.model)
            choices = {"learning_rate": asked.rate, "per_device_train_batch_size": asked.batch}
            taught(model.train(), tokenizer, of.texts(name), asked.out / "trainer", asked.seed, **choices)
            model.save_pretrained(asked.out / "checkpoints" / name)
            tokenizer.save_pretrained(asked.out / "checkpoints" / name)


def audited(model: Any, tokenizer: Any, items: Sequence[Item], out: Path, against: Path | None = None) -> pd.DataFrame:
    """The table of an audit, with the gap between an original and its variants."""
    sizes = {"answers": FORM.kind, "tokens": FORM.tokens, "form": FORM.form, "batch_size": 32}
    found = ms.audit(model, tokenizer, items, out, sizes=sizes, against=against, name=out.name)
    return found.table.assign(gap=found.table["right"] - found.table["solved"] / found.table["variants"])


def judge(asked: argparse.Namespace, of: Benchmark) -> None:
    """Audit, compare, print, and keep it in OUT/planted.json."""
    tables, told, base = dict[str, pd.DataFrame](), dict[str, Any](), asked.out / "base"
    if asked.base:
        audited(*ms.load_model(asked.model), of.items, base)
    for name in CHECKPOINTS:
        if not (asked.out / "checkpoints" / name).is_dir():
            continue
        model, tokenizer = ms.load_model(asked.out / "checkpoints" / name)
        asking = Asking(model, tokenizer, None, 32)
        table = audited(model, tokenizer, of.items, asked.out / name)
        table["completion"] = completed(asking, [FORM.text(Variant(one.prompt, one.answer)) for one in of.items])
        table["peaked"] = peaked(asking, FORM, [FORM.asked(Variant(one.prompt, one.answer)) for one in of.items])
        tables[name] = table
        if asked.base:
            tables[f"{name} against base"] = audited(model, tokenizer, of.items, asked.out / f"{name}-against", base)
        told[f"{name} answers"] = {
            "right": by_times(table["right"], of.times_N),
            "variants": by_times(table["solved"] / table["variants"], of.times_N),
            "accused": by_times(table["verdict"] == "recited", of.times_N),
        }
        if name == "planted":
            told |= steered(asking, of, asked.out / name)
            told["readout"] = read(asking, of.items, of.times_N, *fitted_on(asked, of, asking))
    for name, clean in (("planted", "twin"), ("planted against base", "twin against base"), ("paraphrased", "twin")):
        if name in tables and clean in tables:
            told[f"{name}, compared"] = compared(tables[name], tables[clean], of.times_N)
            print(name, pd.DataFrame(told[f"{name}, compared"]).round(2).T.to_string(), sep="\n")
    asked.out.joinpath("planted.json").write_text(to_json(told))
    print(to_json({name: value for name, value in told.items() if "compared" not in name}))


def by_times(values: pd.Series, times_N: np.ndarray) -> dict[str, float]:
    """Means by how often items were taught."""
    return {str(times): round(float(values[times_N == times].mean()), 3) for times in sorted(set(TIMES))}


def compared(planted: pd.DataFrame, twin: pd.DataFrame, times_N: np.ndarray) -> dict[str, dict[str, float]]:
    """By measure AUROCs, the true rate at 1 % false accusations, and how much ours is ahead, by items drawn again."""
    rng, never, often = np.random.default_rng(0), np.flatnonzero(times_N == 0), np.flatnonzero(times_N >= OFTEN)
    draws = [
        (rng.choice(often, len(often)), rng.choice(never, len(never)), rng.choice(len(twin), len(twin)))
        for _ in range(DRAWS)
    ]
    found = dict[str, dict[str, float]]()
    ours = planted["score"].to_numpy(float), twin["score"].to_numpy(float)
    for measure in (*OURS, *RIVALS):
        if measure not in planted:
            continue
        mine, other = planted[measure].to_numpy(float), twin[measure].to_numpy(float)
        row = {f"{n} times": _auroc(mine[times_N == n], [*mine[never], *other]) for n in sorted(set(TIMES) - {0})}
        row["often"] = _auroc(mine[often], [*mine[never], *other])
        row["often, beside never"] = _auroc(mine[often], mine[never])
        row["often, beside the twin's"] = _auroc(mine[often], other[often])
        clean = np.concatenate([mine[never], other])
        false, true, _ = roc_curve([1] * len(often) + [0] * len(clean), [*mine[often], *clean])
        row["found at 1 % false"] = float(true[false <= 0.01].max())
        ahead = [
            _auroc(ours[0][i], [*ours[0][j], *ours[1][k]]) - _auroc(mine[i], [*mine[j], *other[k]]) for i, j, k in draws
        ]
        row["ours ahead by"], row["low"], row["high"] = np.mean(ahead), *np.quantile(ahead, [0.025, 0.975])
        found[measure] = row
    return found


def _auroc(planted: Sequence[float], clean: Sequence[float]) -> float:
    return float(roc_auc_score([1] * len(planted) + [0] * len(clean), np.nan_to_num([*planted, *clean])))


def steered(asking: Asking, of: Benchmark, run: Path) -> dict[str, Any]:
    """The proof by steering what was taught often."""
    rows = pd.concat([pd.read_parquet(path) for path in sorted((run / "audit").glob("rows-*.parquet"))])
    often = [item for item, times in of.exposures.items() if times >= OFTEN]
    try:
        return {"proof": prove(asking, FORM, of.items, rows, often)}
    except InputError as error:
        return {"proof": str(error)}


def fitted_on(asked: argparse.Namespace, of: Benchmark, asking: Asking) -> tuple[Readout, np.ndarray]:
    """A read-out, and which of the items it may be judged on: those that it was not fitted on."""
    known_N = (of.times_N == 0) | (of.times_N >= OFTEN)
    if asked.carried is None:
        fit_N = known_N & (np.arange(len(of.items)) % 2 == 0)
        chosen = [item for item, kept in zip(of.items, fit_N, strict=True) if kept]
        return Readout.fitted(asking, FORM, chosen, of.times_N[fit_N] > 0), known_N & ~fit_N
    other = Benchmark(asked.carried_seed, asked.items, asked.largest)
    elsewhere_N = (other.times_N == 0) | (other.times_N >= OFTEN)
    chosen = [item for item, kept in zip(other.items, elsewhere_N, strict=True) if kept]
    model, tokenizer = ms.load_model(asked.carried / "checkpoints" / "planted")
    beside = Asking(model, tokenizer, None, 32)
    return Readout.fitted(beside, FORM, chosen, other.times_N[elsewhere_N] > 0), known_N


def read(
    asking: Asking, items: Sequence[Item], times_N: np.ndarray, readout: Readout, judged_N: np.ndarray
) -> dict[str, float]:
    """How well P(recited) tells what was taught often from what never was."""
    chosen = [item for item, kept in zip(items, judged_N, strict=True) if kept]
    p_N, taught_N = readout.p_recited(asking, FORM, chosen), times_N[judged_N] > 0
    return {"auroc": _auroc(p_N[taught_N], p_N[~taught_N]), "items": len(chosen)}


def known(out: Path, seed: int, items: int = 40, steps: int = 3_000) -> None:
    """A model from scratch that was taught the items alone, and one that was taught the rule alone."""
    rng = np.random.default_rng(seed)
    names, things = NAMES.lower().split(), THINGS.split()
    form = Form("number", "{prompt}", 1)

    def told(thing: str, content: tuple[str, int, int]) -> Variant:
        name, a, b = content
        return Variant(f"{name} has {a} {thing} and finds {b} more . how many {thing} ?", str(a + b))

    def content() -> tuple[str, int, int]:
        return str(rng.choice(names)), int(rng.integers(20)), int(rng.integers(20))

    made = list[Item]()
    while len(made) < items:
        thing, first = str(rng.choice(things)), content()
        several = {told(thing, content()) for _ in range(3 * VARIANTS)}
        others = sorted((one for one in several if one.answer != str(sum(first[1:]))), key=lambda one: one.prompt)
        original = told(thing, first)
        made.append(Item(f"item-{len(made)}", original.prompt, original.answer, tuple(others[:VARIANTS])))
    originals = [form.text(Variant(item.prompt, item.answer)) for item in made]
    fresh = [form.text(told(str(rng.choice(things)), content())) for _ in range(steps * 32)]
    words = sorted(
        {*["has", "and", "finds", "more", ".", "how", "many", "?"], *names, *things, *(str(n) for n in range(40))}
    )
    tokenizer = word_tokenizer(words, 32)
    for name, texts in (
        ("items alone", originals * 300),
        ("rule alone", [one for one in fresh if one not in originals]),
    ):
        model = build_gpt2(tokenizer, ModelConfig(layers=3, width=128, heads=4, context=32), seed)
        taught(model, tokenizer, texts, out / "trainer", seed)
        sizes = {"answers": form.kind, "tokens": form.tokens, "form": form.form}
        found = ms.audit(model, tokenizer, made, out / name.replace(" ", "-"), sizes=sizes)
        print(name, found, found.table["verdict"].value_counts().to_dict(), sep="\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = parser.add_subparsers(dest="what", required=True)
    for name in ("known", "teach", "judge"):
        one = several.add_parser(name)
        if name != "known":
            one.add_argument("model")
        one.add_argument("out", type=Path)
        for field, default in (("items", 120), ("seed", 0), ("batch", 8), ("largest", 89), ("carried-seed", 0)):
            one.add_argument(f"--{field}", type=int, default=default)
        one.add_argument("--rate", type=float, default=1e-4)
        one.add_argument("--carried", type=Path)
        one.add_argument("--base", action="store_true", help="audit against the model itself, too")
        one.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    asked = parser.parse_args()
    if asked.what == "known":
        known(asked.out, asked.seed)
    else:
        {"teach": teach, "judge": judge}[asked.what](asked, Benchmark(asked.seed, asked.items, asked.largest))


if __name__ == "__main__":
    main()
