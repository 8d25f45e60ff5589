"""Results of an arena, from its records alone: shares, costs, controls, paired tests. Never imports torch.

Shapes: N prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.runs.digests import check_closed, digests_of, intact, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.schemas import FrameFacts
from mnemoscope.runs.strict import bounded_table, read_bytes, read_json
from mnemoscope.statistics import Estimate, holm, mean, proportion, sign_flips

UNSTEERED = "unsteered"
TOWARDS = ("generalized", "memorized")
OTHER = {"generalized": "memorized", "memorized": "generalized"}
KEPT = ("agreeing", "bare")
SEED = 41  # of the random sign flips


@dataclass(frozen=True)
class Records:
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
    def of(cls, folder: Path) -> Records:
        """Read them; InputError where the folder holds no arena, or a file is damaged."""
        if not (folder / "frame.json").is_file():
            raise InputError(f"run: {folder.parent} holds no arena (it has no arena/frame.json)")
        try:
            if folder.is_symlink():
                raise InputError(f"run: {folder} is a link; name the run that it leads to")
            check_closed(folder)
            frame, listed = read_json(intact(folder / "frame.json"), FrameFacts), digests_of(folder)
            facts, tables, left_out = {}, {}, {}
            for name in (UNSTEERED, *frame["order"]):
                if f"{name}.json" not in listed:
                    continue
                found = read_json(intact(folder / f"{name}.json"), dict[str, Any])
                if "left_out" in found:
                    left_out[name] = str(found["left_out"])
                    continue
                kinds = ("answers", "texts", "neutral")
                tables[name] = {kind: _table(intact(folder / f"{name}-{kind}.parquet")) for kind in kinds}
                facts[name] = found
            return cls(frame, _table(intact(folder / "set.parquet")), facts, tables, left_out)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"run: the records in {folder} cannot be read ({reason})") from error

    @property
    def methods(self) -> list[str]:
        """Methods that are done, in the order of the arena."""
        return [name for name in self.facts if name != UNSTEERED]

    def groups(self, name: str) -> np.ndarray:
        """Groups of a list's prompts, in order."""
        return self.set.loc[self.set["list"] == name, "group"].to_numpy(dtype=str)

    def labels(self, method: str, toward: str, name: str, draw: int = -1) -> np.ndarray:
        """Labels of a list's prompts under a method, in order; of the model itself for ``UNSTEERED``."""
        table = self.tables[method]["answers"]
        side = UNSTEERED if method == UNSTEERED else toward
        part = table[(table["toward"] == side) & (table["list"] == name) & (table["draw"] == draw)]
        return part["behaviour"].to_numpy(dtype=str)

    def part(self, method: str, toward: str, kind: str) -> pd.DataFrame:
        """Rows of a table towards a behaviour."""
        table = self.tables[method][kind]
        return table[table["toward"] == (UNSTEERED if method == UNSTEERED else toward)]


def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(bounded_table(path, read_bytes(path)))


def build_arena(run: Path, beside: Sequence[Path] = ()) -> Path:
    """Write ``arena/results.json`` and ``arena.html`` of a run from its records; returns the path of the page.

    ``beside``: other runs, whose arenas are on the same page.

    Raises:
        InputError: a run holds no arena, or its records are damaged.
    """
    from mnemoscope.report.arena_page import render_arena

    results = results_of(Records.of(run / "arena"))
    text = json.dumps(results, indent=1) + "\n"  # an undefined number is the literal NaN, as in that of a study
    write_marker(run / "arena", "report", [write_atomically(run / "arena" / "results.json", text.encode())])
    others = [results_of(Records.of(other / "arena")) for other in beside]
    return write_atomically(run / "arena.html", render_arena([results, *others]).encode())


def arena_name(results: Mapping[str, Any]) -> str:
    """Model and task of an arena."""
    return f"{results['model']}, {results['task']}"


def results_of(records: Records) -> dict[str, Any]:
    """All numbers of the page, as plain data."""
    frame = records.frame
    conflict = records.groups("conflict")
    made: dict[str, Any] = {
        "schema": 1,
        "model": frame["model"],
        "task": frame["task"],
        "dtype": frame.get("dtype", "float32"),
        "seed": frame["sizes"]["seed"],
        "asked": frame["asked"],
        "known": frame["known"],
        "groups": len(set(conflict)),
        "lists": frame["lists"],
        "by_answers": math.nan if frame.get("by_answers") is None else frame["by_answers"],
        "unsteered": {toward: _direction(records, UNSTEERED, toward) for toward in TOWARDS},
        "left_out": dict(records.left_out),
        "no_gate": frame["no_gate"],
        "methods": {
            name: {
                "passes": records.facts[name]["passes"],
                "changes_weights": records.facts[name]["changes_weights"],
                **{toward: _direction(records, name, toward) for toward in TOWARDS},
            }
            for name in records.methods
        },
    }
    made["winner"] = {toward: _best(records, toward, records.methods) for toward in TOWARDS}
    made["baselines"] = {toward: _baselines(records, toward) for toward in TOWARDS}
    for toward in TOWARDS:
        baselines = {**made["baselines"][toward], "winner": made["winner"][toward]}
        for name, found in _tests(records, toward, [one for one in baselines.values() if one]).items():
            made["methods"][name][toward]["tests"] = found
    made["first"] = {toward: _first(records, made["methods"], toward) for toward in TOWARDS}
    return made


def _first(records: Records, methods: Mapping[str, Any], toward: str) -> dict[str, Any] | None:
    """The method of one pass that gets most wanted answers on test, and how much more the others get than it.

    Chosen after the fact, so that every other method is compared with one that was lucky as well.
    """
    one_pass = [name for name, about in methods.items() if about["passes"] == 1]
    if not one_pass:
        return None
    first = max(one_pass, key=lambda name: methods[name][toward]["wanted"]["estimate"])
    hits, groups = _hits(records, toward), records.groups("conflict")
    minus = {name: _plain(mean(mine_N - hits[first], groups)) for name, mine_N in hits.items() if name != first}
    return {"method": first, "minus": minus}


def _hits(records: Records, toward: str) -> dict[str, np.ndarray]:
    """Of every method, 1 where a test conflict gets the wanted answer and 0 elsewhere, float64 ``(N,)``."""
    return {name: (records.labels(name, toward, "conflict") == toward).astype(float) for name in records.methods}


def _direction(records: Records, name: str, toward: str) -> dict[str, Any]:
    """One method towards one behaviour."""
    lists = [str(one) for one in records.set["list"].unique()]
    groups, labels = records.groups("conflict"), records.labels(name, toward, "conflict")
    found: dict[str, Any] = {
        "wanted": _share(labels == toward, groups),
        "opposite": _share(labels == OTHER[toward], groups),
        "neither": _share(labels == "other", groups),
    }
    for kept in KEPT:
        found[kept] = _share(records.labels(name, toward, kept) == "correct", records.groups(kept))
    found["lost"] = _mean_of([1 - found[kept]["estimate"] for kept in KEPT])
    found["varied"] = {
        one: _share(records.labels(name, toward, one) == toward, records.groups(one))
        for one in lists
        if one not in ("conflict", *KEPT)
    }
    found["mix"], found["gated"] = _mixed(records, name, toward)
    texts = records.part(name, toward, "texts")
    found["exact"] = _share(texts[f"exact_{toward}"].to_numpy(float), groups[: len(texts)])
    found |= {column: _mean_of(texts[column].tolist()) for column in ("nats", "repeated", "seconds")}
    neutral = records.part(name, toward, "neutral")
    found["divergence"] = {
        "first": _mean_of(neutral["kl_first"].tolist()),
        "next": _mean_of(neutral["kl_next"].tolist()),
    }
    if name != UNSTEERED:
        about = records.facts[name]["toward"][toward]
        norm = about["norm"]
        found |= {"chosen": about["setting"], "tune": about["tune"], "fit_seconds": about["seconds"]["fit"]}
        found["norm"] = math.nan if norm is None else norm
        found["control"] = _control(records, name, toward)
    return found


def _mixed(records: Records, name: str, toward: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Share of right answers on conflicts, agreeing and bare questions in equal parts, without and with the gate.

    Right is the wanted answer of a conflict, and the answer that stays elsewhere. Where the gate does not act, the
    answer is the model's own.
    """
    lists = ("conflict", *KEPT)
    n = min(len(records.groups(one)) for one in lists)
    right, gated, acts, groups = [], [], [], []
    for one in lists:
        side = toward if one == "conflict" else "correct"
        rows = records.set[records.set["list"] == one].head(n)
        mine, own = (
            found[:n] == side for found in (records.labels(name, toward, one), records.labels(UNSTEERED, "", one))
        )
        acts_N = rows[f"acts_{toward}"].to_numpy(float)
        right.append(mine)
        gated.append(np.where(acts_N == 1, mine, own))
        acts.append(acts_N)
        groups.append(rows["group"].to_numpy(dtype=str))
    groups_N, acts_N = np.concatenate(groups), np.concatenate(acts)
    mix = _share(np.concatenate(right), groups_N)
    if not len(acts_N) or np.isnan(acts_N).any():
        return mix, None
    by_list = {
        name: {one: float(np.mean(part)) for one, part in zip(lists, parts, strict=True)}
        for name, parts in (("acts", acts), ("right", gated))
    }
    return mix, _share(np.concatenate(gated), groups_N) | by_list


def _control(records: Records, name: str, toward: str) -> dict[str, Any] | None:
    """Share of wanted answers under draws of the control of equal norm: their mean, and the worst draw."""
    table = records.part(name, toward, "answers")
    part = table[(table["list"] == "conflict") & (table["draw"] >= 0)]
    if part.empty:
        return None
    hits_N = (part["behaviour"] == toward).to_numpy(float)
    groups_N = records.groups("conflict")[part["example"].to_numpy()]
    draws_N = part["draw"].to_numpy()
    worst = max(float(hits_N[draws_N == draw].mean()) for draw in np.unique(draws_N))
    return _plain(proportion(hits_N, groups_N, draws_N)) | {"worst": worst, "draws": len(np.unique(draws_N))}


def _best(records: Records, toward: str, methods: Sequence[str]) -> str | None:
    """The method of the highest worth on the tune split, which no test figure chose."""
    worth = {name: records.facts[name]["toward"][toward]["tune"]["worth"] for name in methods}
    return max(worth, key=lambda name: worth[name]) if worth else None


def _baselines(records: Records, toward: str) -> dict[str, str | None]:
    """What every method is compared with: asking in words, and the contrastive decoding that is best on tune."""
    contrastive = [name for name in records.methods if records.facts[name]["joined"]]
    words = "prompt" if "prompt" in records.methods else None
    return {"words": words, "contrastive": _best(records, toward, contrastive)}


def _tests(records: Records, toward: str, baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Paired differences of wanted answers to each baseline, by method.

    Holm's correction is over a direction's comparisons, of which each counts once where both are baselines.
    """
    groups, rows = records.groups("conflict"), list[tuple[str, str, Estimate]]()
    p_of = dict[frozenset[str], float]()
    hits = _hits(records, toward)
    for name, mine_N in hits.items():
        for baseline in dict.fromkeys(baselines):
            if name == baseline:
                continue
            difference_N = mine_N - hits[baseline]
            two = frozenset((name, baseline))
            if two not in p_of:
                p_of[two] = sign_flips(difference_N, groups, np.random.default_rng(SEED))
            rows.append((name, baseline, mean(difference_N, groups)))
    corrected = dict(zip(p_of, holm(list(p_of.values())).tolist(), strict=True))
    found: dict[str, dict[str, Any]] = {name: {} for name in hits}
    for name, baseline, difference in rows:
        two = frozenset((name, baseline))
        found[name][baseline] = {"difference": _plain(difference), "p": p_of[two], "p_holm": corrected[two]}
    return found


def _share(hits_N: np.ndarray, groups_N: np.ndarray) -> dict[str, Any]:
    return _plain(proportion(hits_N, groups_N))


def _plain(value: Estimate) -> dict[str, Any]:
    return asdict(value)


def _mean_of(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
