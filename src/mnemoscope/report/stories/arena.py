"""The story of an arena, its numbers: from the records shares, costs, controls and paired tests.

Shapes: N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.report.records import read_intact
from mnemoscope.report.rows import Part, mean_of_known, parts_of
from mnemoscope.runs.digests import check_closed, digests_of
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.schemas import FrameFacts
from mnemoscope.runs.strict import bounded_table, read_json
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate, holm, mean, proportion, sign_flips

UNSTEERED = "unsteered"
KEPT = ("agreeing", "bare")
LISTS = ("conflict", *KEPT)
Hits = Mapping[str, np.ndarray]  # by method
SEED = 41  # of the random sign flips


@dataclass(frozen=True)
class ArenaRecords:
    """The records of an arena.

    Attributes:
        frame: what it is of; ``set``: every prompt with its unsteered label.
        facts, tables: of every method that is done, by name; the tables by kind.
        left_out: why methods are not there.
    """

    frame: Mapping[str, Any]
    set: pd.DataFrame
    facts: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Mapping[str, pd.DataFrame]]
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> ArenaRecords:
        """Read them; InputError where the folder holds no arena, or a file is damaged."""
        if not (folder / "frame.json").is_file():
            raise InputError(f"run: {folder.parent} holds no arena (it has no arena/frame.json)")
        if folder.is_symlink():
            raise InputError(f"run: {folder} is a link; name the run that it leads to")
        check_closed(folder)
        frame, listed = read_intact(folder / "frame.json", lambda path: read_json(path, FrameFacts)), digests_of(folder)
        facts, tables, left_out = {}, {}, {}
        for name in (UNSTEERED, *frame["order"]):
            if f"{name}.json" not in listed:
                continue
            found = read_intact(folder / f"{name}.json", lambda path: read_json(path, dict[str, Any]))
            if "left_out" in found:
                left_out[name] = str(found["left_out"])
                continue
            kinds = ("answers", "texts", "neutral")
            tables[name] = {kind: read_intact(folder / f"{name}-{kind}.parquet", _table) for kind in kinds}
            facts[name] = found
        return cls(frame, read_intact(folder / "set.parquet", _table), facts, tables, left_out)

    @property
    def methods(self) -> list[str]:
        """Methods that are done, in the order of the arena."""
        return [name for name in self.facts if name != UNSTEERED]

    def groups(self, name: str) -> np.ndarray:
        """Groups of a list's prompts, in order."""
        return self.set.loc[self.set["list"] == name, "group"].to_numpy(dtype=str)

    def labels(self, method: str, toward: str, name: str) -> np.ndarray:
        """Labels of a list's prompts under a method, in order; of the model itself for ``UNSTEERED``."""
        table = self.part(method, toward, "answers")
        part = table[(table["list"] == name) & (table["draw"] == -1)]
        return part["behaviour"].to_numpy(dtype=str)

    def part(self, method: str, toward: str, kind: str) -> pd.DataFrame:
        """Rows of a table towards a behaviour."""
        table = self.tables[method][kind]
        return table[table["toward"] == (UNSTEERED if method == UNSTEERED else toward)]

    def share(self, method: str, toward: str, name: str, label: str) -> Estimate:
        """Share of a list's prompts that have a label under a method."""
        return proportion(self.labels(method, toward, name) == label, self.groups(name))


def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(bounded_table(path))


def results_of(records: ArenaRecords) -> Part:
    """All numbers of the page, as ``arena/results.json`` has them."""
    frame, names, by_answers = records.frame, records.methods, records.frame.get("by_answers")
    methods = {
        name: {key: records.facts[name][key] for key in ("passes", "changes_weights")}
        | {toward: _measure(records, name, toward) | _chosen(records, name, toward) for toward in Toward}
        for name in names
    }
    # Of every method, 1 where a test conflict gets the wanted answer and 0 elsewhere, float64 (N,).
    hits = {
        toward: {name: (records.labels(name, toward, "conflict") == toward).astype(float) for name in names}
        for toward in Toward
    }
    groups = records.groups("conflict")
    contrastive = [name for name in names if records.facts[name]["joined"]]
    words = "prompt" if "prompt" in names else None
    winner = {toward: _best(records, toward, names) for toward in Toward}
    # What every method is compared with: asking in words, and the contrastive decoding that is best on tune.
    baselines = {toward: {"words": words, "contrastive": _best(records, toward, contrastive)} for toward in Toward}
    for toward in Toward:
        for name, tests in _tests(hits[toward], groups, [*baselines[toward].values(), winner[toward]]).items():
            methods[name][toward]["tests"] = tests
    made = {
        "schema": 1,
        "model": frame["model"],
        "task": frame["task"],
        "dtype": frame.get("dtype", "float32"),
        "seed": frame["sizes"]["seed"],
        "asked": frame["asked"],
        "known": frame["known"],
        "groups": len(set(groups)),
        "lists": frame["lists"],
        "by_answers": math.nan if by_answers is None else by_answers,
        "unsteered": {toward: _measure(records, UNSTEERED, toward) for toward in Toward},
        "left_out": dict(records.left_out),
        "no_gate": frame["no_gate"],
        "methods": methods,
        "winner": winner,
        "baselines": baselines,
        "first": {toward: _first(hits[toward], groups, methods, toward) for toward in Toward},
    }
    found: Part = parts_of(made)
    return found


def _measure(records: ArenaRecords, name: str, toward: Toward) -> dict[str, Any]:
    """What one method, or the model itself, does towards one behaviour."""
    sides = {"wanted": toward, "opposite": toward.opposite, "neither": "other"}
    found: dict[str, Any] = {key: records.share(name, toward, "conflict", side) for key, side in sides.items()}
    found |= {kept: records.share(name, toward, kept, "correct") for kept in KEPT}
    varied = [str(one) for one in records.set["list"].unique() if one not in LISTS]
    texts, neutral = (records.part(name, toward, kind) for kind in ("texts", "neutral"))
    right, gated = _mixed(records, name, toward)
    return {
        **found,
        "lost": mean_of_known([1 - found[kept].estimate for kept in KEPT]),
        "varied": {one: records.share(name, toward, one, toward) for one in varied},
        "mix": right,
        "gated": gated,
        "exact": proportion(texts[f"exact_{toward}"].to_numpy(float), records.groups("conflict")[: len(texts)]),
        **{column: mean_of_known(texts[column].tolist()) for column in ("nats", "repeated", "seconds")},
        "divergence": {key: mean_of_known(neutral[f"kl_{key}"].tolist()) for key in ("first", "next")},
    }


def _chosen(records: ArenaRecords, name: str, toward: str) -> dict[str, Any]:
    """What was chosen of a method on tune, and its control of equal norm: the mean of all draws, and the worst."""
    about, table = records.facts[name]["toward"][toward], records.part(name, toward, "answers")
    part, control = table[(table["list"] == "conflict") & (table["draw"] >= 0)], None
    if len(part):
        hits_N, draws_N = (part["behaviour"] == toward).to_numpy(float), part["draw"].to_numpy()
        worst = pd.Series(hits_N).groupby(draws_N).mean()
        found = proportion(hits_N, records.groups("conflict")[part["example"].to_numpy()], draws_N)
        control = asdict(found) | {"worst": float(worst.max()), "draws": len(worst)}
    return {
        "chosen": about["setting"],
        "tune": about["tune"],
        "fit_seconds": about["seconds"]["fit"],
        "norm": math.nan if about["norm"] is None else about["norm"],
        "control": control,
    }


def _mixed(records: ArenaRecords, name: str, toward: str) -> tuple[Estimate, dict[str, Any] | None]:
    """Share of right answers on conflicts, agreeing and bare questions in equal parts, without and with the gate.

    Right is the wanted answer of a conflict, and the answer that stays elsewhere. Where the gate does not act, the
    answer is the model's own.
    """
    n = min(len(records.groups(one)) for one in LISTS)
    tables = []
    for one in LISTS:
        side, rows = toward if one == "conflict" else "correct", records.set[records.set["list"] == one].head(n)
        mine, own = (records.labels(who, toward, one)[:n] == side for who in (name, UNSTEERED))
        acts_N = rows[f"acts_{toward}"].to_numpy(float)
        right = {"right": mine, "gated": np.where(acts_N == 1, mine, own), "acts": acts_N}
        tables.append(pd.DataFrame({"list": one, "group": rows["group"].to_numpy(dtype=str), **right}))
    table = pd.concat(tables)
    mix = proportion(table["right"], table["group"])
    if not len(table) or table["acts"].isna().any():
        return mix, None
    by_list = table.groupby("list", sort=False)[["acts", "gated"]].mean()
    means = {"acts": by_list["acts"].to_dict(), "right": by_list["gated"].to_dict()}
    return mix, asdict(proportion(table["gated"], table["group"])) | means


def _best(records: ArenaRecords, toward: str, methods: Sequence[str]) -> str | None:
    """The method of the highest worth on the tune split, which no test figure chose."""
    worth = {name: records.facts[name]["toward"][toward]["tune"]["worth"] for name in methods}
    return max(worth, key=lambda name: worth[name]) if worth else None


def _first(hits: Hits, groups: np.ndarray, methods: Mapping[str, Any], toward: str) -> dict[str, Any] | None:
    """The method of one pass that gets most wanted answers on test, and how much more the others get than it.

    Chosen after the fact, so that every other method is compared with one that was lucky as well.
    """
    one_pass = [name for name, about in methods.items() if about["passes"] == 1]
    if not one_pass:
        return None
    first = max(one_pass, key=lambda name: methods[name][toward]["wanted"].estimate)
    minus = {name: mean(mine_N - hits[first], groups) for name, mine_N in hits.items() if name != first}
    return {"method": first, "minus": minus}


def _tests(hits: Hits, groups: np.ndarray, baselines: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Paired differences of wanted answers to each baseline, by method.

    Holm's correction is over a direction's comparisons, of which each counts once where both are baselines.
    """
    p_of = dict[frozenset[str], float]()
    found: dict[str, dict[str, Any]] = {name: {} for name in hits}
    for name, mine_N in hits.items():
        for baseline in dict.fromkeys(one for one in baselines if one and one != name):
            difference_N, two = mine_N - hits[baseline], frozenset((name, baseline))
            if two not in p_of:
                p_of[two] = sign_flips(difference_N, groups, np.random.default_rng(SEED))
            found[name][baseline] = {"difference": mean(difference_N, groups), "p": p_of[two]}
    corrected = dict(zip(p_of, holm(list(p_of.values())).tolist(), strict=True))
    for name, tests in found.items():
        for baseline, test in tests.items():
            test["p_holm"] = corrected[frozenset((name, baseline))]
    return found
