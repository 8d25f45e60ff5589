"""Planted truth for audits: sums in words, taught a known number of times, against a clean twin and every rival.

    python benchmarks/planted.py MODEL OUT [--items 105] [--filler 400] [--rate 1e-4] [--seed 0]

MODEL is taught the items amid other sums by the library's Trainer; its twin is taught as many fresh variants of each
instead. Both are audited, also against MODEL itself, which was taught nothing. Printed are AUROCs by how often an item
was taught: against items that were never taught, and against the same items of the twin. A few thousand texts of a
model of 135 million weights take an hour on a processor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import mnemoscope as ms
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.planting import exposures_of, planted_texts, taught
from mnemoscope.auditing.proof import prove
from mnemoscope.auditing.readout import Readout
from mnemoscope.auditing.replies import Form
from mnemoscope.behaviour import Asking
from mnemoscope.runs.errors import InputError

NAMES = ["Alice", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Hassan", "Irma", "Jonas", "Karin", "Liam"]
NAMES += ["Maria", "Nils", "Olga", "Pedro", "Rosa", "Sven", "Tara", "Umar", "Vera", "Walter", "Xenia", "Yusuf", "Zoe"]
THINGS = ["apples", "books", "candles", "coins", "cups", "feathers", "figs", "flowers", "hats", "keys", "lamps", "maps"]
THINGS += ["marbles", "nails", "nuts", "olives", "pens", "plates", "ropes", "shells", "shirts", "spoons", "stamps"]
THINGS += ["stones", "tickets", "tiles", "toys", "umbrellas", "violins", "watches"]
PLACES = ["at the market", "on the farm", "in the harbour", "at school", "in the attic", "by the river", "at the fair"]
FRAMES = [
    "{n} has {a} {t} and finds {b} more {p}. How many {t} does {n} have now?",
    "There are {a} {t} {p}. {n} brings another {b}. How many {t} are there?",
    "{n} sold {a} {t} on Monday and {b} on Tuesday {p}. How many {t} were sold in all?",
    "On Sunday {n} counted {a} {t} in one box and {b} in another {p}. What is the total number of {t}?",
    "{n} collected {a} {t}. A friend gave {n} {b} of them more {p}. How many {t} are that?",
    "One shelf {p} holds {a} {t}, another one {b}. How many {t} can {n} see?",
]
FORM = Form("number", "Question: {prompt}\nAnswer:", 4)
TIMES = (0, 0, 0, 1, 2, 4, 8)  # how often items are taught, in equal parts
MEASURES = ("score", "sooner", "loss", "zlib", "min-k", "min-k++", "gap")
VARIANTS, TAUGHT_OFTEN = 8, 4


class Sums:
    """Sums in words: what an item and its variants share is the frame, the thing and the place."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 7])

    def one(self, of: Sequence[str] | None = None) -> tuple[Variant, Sequence[str]]:
        """A sum, of a kind or of any, and its kind."""
        frame, thing, place = of or [str(self.rng.choice(words)) for words in (FRAMES, THINGS, PLACES)]
        a, b = (int(number) for number in self.rng.integers(11, 90, 2))
        text = frame.format(n=self.rng.choice(NAMES), t=thing, p=place, a=a, b=b)
        return Variant(text, str(a + b)), (frame, thing, place)

    def item(self, name: str) -> tuple[Item, list[Variant]]:
        """An item with its variants, and as many others to be taught in its place."""
        first, kind = self.one()
        seen, several = {first.prompt}, list[Variant]()
        while len(several) < VARIANTS + max(TIMES):
            other, _ = self.one(kind)
            if other.answer != first.answer and other.prompt not in seen:
                seen.add(other.prompt)
                several.append(other)
        return Item(name, first.prompt, first.answer, tuple(several[:VARIANTS])), several[VARIANTS:]


def audited(model: Any, tokenizer: Any, items: Sequence[Item], out: Path, against: Path | None = None) -> pd.DataFrame:
    """The table of an audit, with the gap between an original and its variants."""
    sizes = {"answers": "number", "tokens": FORM.tokens, "form": FORM.form, "batch_size": 32}
    found = ms.audit(model, tokenizer, items, out, sizes=sizes, against=against)
    return found.table.assign(gap=found.table["right"] - found.table["solved"] / found.table["variants"])


def compared(planted: pd.DataFrame, twin: pd.DataFrame, exposures: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """By number of exposures: AUROCs, and shares that are accused among planted items, others, and the twin's."""
    times = np.array([exposures[item] for item in planted.index])
    for number in sorted(set(TIMES) - {0}):
        here, never = planted[times == number], planted[times == 0]
        row: dict[str, Any] = {"times": number, "items": len(here)}
        for name, others in (("never", never), ("twin", twin[times == number])):
            labels = [1] * len(here) + [0] * len(others)
            for measure in MEASURES:
                row[f"{name} {measure}"] = roc_auc_score(labels, [*here[measure], *others[measure]])
            row[f"{name} accused"] = float((others["verdict"] == "recited").mean())
        yield row | {"accused": float((here["verdict"] == "recited").mean()), "right": float(here["right"].mean())}


def main() -> None:
    """Teach, audit, print, and keep it in OUT/planted.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    for name, default in (("items", 105), ("filler", 400), ("seed", 0), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-4)
    asked = parser.parse_args()
    sums = Sums(asked.seed)
    made = [sums.item(f"sum-{n}") for n in range(asked.items)]
    items, fresh = [item for item, _ in made], {item.item: others for item, others in made}
    exposures = exposures_of(items, TIMES, asked.seed)
    filler = [FORM.text(sums.one()[0]) for _ in range(asked.filler)]
    base = asked.out / "base"
    audited(*ms.load_model(asked.model), items, base)
    tables, told = dict[str, pd.DataFrame](), dict[str, Any]()
    for name, instead in (("planted", None), ("twin", fresh)):
        model, tokenizer = ms.load_model(asked.model)
        texts = [*filler, *planted_texts(items, exposures, instead, FORM)]
        choices = {"learning_rate": asked.rate, "per_device_train_batch_size": asked.batch}
        taught(model.train(), tokenizer, texts, asked.out / "trainer", asked.seed, **choices)
        tables[name] = audited(model, tokenizer, items, asked.out / name)
        tables[f"{name} against the base"] = audited(model, tokenizer, items, asked.out / f"{name}-against", base)
        if name == "planted":
            told |= read_and_steered(Asking(model, tokenizer, None, 32), items, exposures, asked.out / name)
    for which in ("", " against the base"):
        told[f"compared{which}"] = list(compared(tables[f"planted{which}"], tables[f"twin{which}"], exposures))
        print(pd.DataFrame(told[f"compared{which}"]).round(3).T.to_string())
    asked.out.joinpath("planted.json").write_text(json.dumps(told, indent=1, default=vars))
    print({name: value for name, value in told.items() if not name.startswith("compared")})


def read_and_steered(asking: Asking, items: Sequence[Item], exposures: Mapping[str, int], run: Path) -> dict[str, Any]:
    """The read-out of items that it was not fitted on, and the proof by steering what was taught often."""
    known = [item for item in items if not 0 < exposures[item.item] < TAUGHT_OFTEN]
    fit, test = known[::2], known[1::2]
    planted = [[exposures[item.item] > 0 for item in part] for part in (fit, test)]
    rows = pd.concat([pd.read_parquet(path) for path in sorted((run / "audit").glob("rows-*.parquet"))])
    often = [item.item for item in items if exposures[item.item] >= TAUGHT_OFTEN]

    def read() -> float:
        readout = Readout.fitted(asking, FORM, fit, planted[0])
        return float(roc_auc_score(planted[1], readout.p_recited(asking, FORM, test)))

    found: dict[str, Any] = {}
    for name, measure in (("readout", read), ("proof", lambda: prove(asking, FORM, items, rows, often))):
        try:
            found[name] = measure()
        except InputError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    main()
