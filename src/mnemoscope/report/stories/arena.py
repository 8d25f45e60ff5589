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
from mnemoscope.statistics import Estimate, auroc, holm, mean, proportion, sign_flips

SCHEMA = 5  # of records; 4: before texts were searched for the answer
UNSTEERED = "unsteered"
KEPT = ("agreeing", "bare")
LISTS = ("conflict", *KEPT)
MEASURES = ("wanted", "exact")  # the answer as it begins, and as all that stands on its line
# By name, the share of conflicts among prompts; half of the rest agree, half are bare.
MIXES = {"thirds": 1 / 3, "5 %": 0.05, "20 %": 0.2, "50 %": 0.5}
MARGIN = 0.05  # what a method may be below another and still be no worse
SEED = 41  # of the random sign flips
KINDS = ("words", "hooks", "adapter", "passes")  # change the prompt, add hooks, load an adapter, pay two passes


@dataclass(frozen=True)
class ArenaRecords:
    """The records of an arena.

    Attributes:
        frame: what it is of; ``set``: every prompt with its unsteered label.
        facts, tables: of every method that is done, by name; the tables by kind, of all its fits (column ``fit``).
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
        if frame["schema"] != SCHEMA:
            raise InputError(f"schema: {folder} is {frame['schema']}, of another version; this one reads {SCHEMA}")
        facts, tables, left_out = {}, {}, {}
        for name in (UNSTEERED, *frame["order"]):
            if f"{name}.json" not in listed:
                continue
            found = read_intact(folder / f"{name}.json", lambda path: read_json(path, dict[str, Any]))
            if "left_out" in found:
                left_out[name] = str(found["left_out"])
                continue
            more = (f"{name}@{number}" for number in range(2, int(frame["sizes"]["fits"]) + 1))
            fits = [name, *(one for one in more if f"{one}.json" in listed)]
            tables[name] = {kind: _fits(folder, fits, kind) for kind in ("answers", "texts", "neutral")}
            facts[name] = found | {"fits": len(fits)}
        return cls(frame, read_intact(folder / "set.parquet", _table), facts, tables, left_out)

    @property
    def methods(self) -> list[str]:
        """Methods that are done, in the order of the arena."""
        return [name for name in self.facts if name != UNSTEERED]

    def groups(self, name: str) -> np.ndarray:
        """Groups of a list's prompts, in order."""
        return self.set.loc[self.set["list"] == name, "group"].to_numpy(dtype=str)

    def rows(self, method: str, toward: str, name: str) -> pd.DataFrame:
        """A list's prompts under a method, in order of fits and prompts: ``behaviour``, ``example``, ``fit``."""
        table = self.part(method, toward, "answers")
        return table[(table["list"] == name) & (table["draw"] == -1)]

    def labels(self, method: str, toward: str, name: str) -> np.ndarray:
        """Labels of a list's prompts under the first fit of a method, in order; of the model itself for UNSTEERED."""
        rows = self.rows(method, toward, name)
        return rows.loc[rows["fit"] == 0, "behaviour"].to_numpy(dtype=str)

    def hits(self, method: str, toward: Toward, measure: str) -> np.ndarray:
        """1 where a test conflict gets the wanted answer, float64 (F, N) of F fits; NaN where none was written."""
        found = np.full((self.facts[method].get("fits", 1), len(self.groups("conflict"))), np.nan)
        if measure == "wanted":
            rows = self.rows(method, toward, "conflict")
            found[rows["fit"], rows["example"]] = rows["behaviour"] == toward
        else:
            rows = self.part(method, toward, "texts")
            found[rows["fit"], rows["example"]] = rows[f"exact_{toward}"]
        return found

    def part(self, method: str, toward: str, kind: str) -> pd.DataFrame:
        """Rows of a table towards a behaviour."""
        table = self.tables[method][kind]
        return table[table["toward"] == (UNSTEERED if method == UNSTEERED else toward)]

    def share(self, method: str, toward: str, name: str, label: str) -> Estimate:
        """Share of a list's prompts that have a label under a method."""
        rows = self.rows(method, toward, name)
        return proportion(rows["behaviour"] == label, self.groups(name)[rows["example"]], _draws(rows["fit"]))


def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(bounded_table(path))


def _fits(folder: Path, fits: Sequence[str], kind: str) -> pd.DataFrame:
    found = (read_intact(folder / f"{name}-{kind}.parquet", _table).assign(fit=n) for n, name in enumerate(fits))
    return pd.concat(found, ignore_index=True)


def _draws(fit_N: Any) -> np.ndarray | None:
    """Fits as draws, where there are several."""
    fits = np.asarray(fit_N)
    return fits if len(np.unique(fits)) > 1 else None


def results_of(records: ArenaRecords) -> Part:
    """All numbers of the page, as ``arena/results.json`` has them."""
    frame, names, by_answers = records.frame, records.methods, records.frame.get("by_answers")
    methods = {
        name: {key: records.facts[name][key] for key in ("passes", "changes_weights", "oracle", "fits", "carried")}
        | {toward: _measure(records, name, toward) | _chosen(records, name, toward) for toward in Toward}
        for name in names
    }
    groups = records.groups("conflict")
    fair = [name for name in names if not records.facts[name]["oracle"] and not records.facts[name]["carried"]]
    of_kind = {kind: [name for name in fair if _kind(records.facts[name]) == kind] for kind in KINDS}
    winner = {toward: _best(records, toward, fair) for toward in Toward}
    # Of each kind the method that is best on tune; with these, hooks apart, every method is compared.
    best = {toward: {kind: _best(records, toward, found) for kind, found in of_kind.items()} for toward in Toward}
    for toward in Toward:
        against = [*(name for kind, name in best[toward].items() if kind != "hooks"), winner[toward]]
        for name, tests in _tests(records, toward, names, against).items():
            methods[name][toward]["tests"] = tests
        for name in names:
            if (pair := records.facts[name]["carried"]) and pair[0] in methods:
                methods[name][toward]["kept_gain"] = _kept_gain(records, toward, name, pair[0])
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
        "gates": {gate: {toward: _acting(records, gate, toward) for toward in Toward} for gate in frame["gates"]},
        "conflict_read": _conflict_read(records),
        "methods": methods,
        "winner": winner,
        "best": best,
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
    return {
        **found,
        "lost": mean_of_known([1 - found[kept].estimate for kept in KEPT]),
        "varied": {one: records.share(name, toward, one, toward) for one in varied},
        "mix": _mixed(records, name, toward, None),
        "gated": {gate: _mixed(records, name, toward, gate) for gate in records.frame["gates"]},
        **{
            how: proportion(
                texts[f"{how}_{toward}"].to_numpy(float),
                records.groups("conflict")[texts["example"].to_numpy(int)],
                _draws(texts["fit"]),
            )
            for how in ("exact", "said")
        },
        **{column: mean_of_known(texts[column].tolist()) for column in ("nats", "repeated", "seconds")},
        "divergence": {key: mean_of_known(neutral[f"kl_{key}"].tolist()) for key in ("first", "next")},
    }


def _chosen(records: ArenaRecords, name: str, toward: Toward) -> dict[str, Any]:
    """What was chosen of a method on tune, by its first fit, and its controls: the mean of all draws, and the worst."""
    about, table = records.facts[name]["toward"][toward], records.part(name, toward, "answers")
    controls = {}
    for role, part in table[table["draw"] >= 0].groupby("role"):
        hits_N, draws_N = (part["behaviour"] == toward).to_numpy(float), (part["draw"] + 100 * part["fit"]).to_numpy()
        worst = pd.Series(hits_N).groupby(draws_N).mean()
        found = proportion(hits_N, records.groups("conflict")[part["example"].to_numpy()], draws_N)
        controls[str(role)] = asdict(found) | {"worst": float(worst.max()), "draws": len(worst)}
    by_gate = about["tune"]["by_gate"]
    default = max(by_gate, key=lambda gate: by_gate[gate])  # "", no gate, comes first
    return {
        "default": {"gate": default, "mix": _mixed(records, name, toward, default or None)},
        "chosen": about["setting"],
        "tune": about["tune"],
        "fit_seconds": about["seconds"]["fit"],
        "norm": math.nan if about["norm"] is None else about["norm"],
        "controls": controls,
    }


def _mixed(records: ArenaRecords, name: str, toward: Toward, gate: str | None) -> dict[str, Estimate]:
    """By mix, the share of right answers on conflicts, agreeing and bare questions, without or with a gate.

    Right is the wanted answer of a conflict, and the answer that stays elsewhere. Where the gate does not act, the
    answer is the model's own.
    """
    parts = []
    for one in LISTS:
        rows, side = records.rows(name, toward, one), toward if one == "conflict" else "correct"
        right_N = (rows["behaviour"] == side).to_numpy()
        if gate is not None:
            of_list = records.set[records.set["list"] == one]
            acts_N = of_list[f"{gate}_{toward}"].to_numpy(float)[rows["example"]]
            own_N = (records.labels(UNSTEERED, toward, one) == side)[rows["example"]]
            right_N = np.where(acts_N == 1, right_N, own_N)
        group_N = records.groups(one)[rows["example"]]
        parts.append(pd.DataFrame({"list": one, "group": group_N, "fit": rows["fit"], "right": right_N.astype(float)}))
    table, found = pd.concat(parts), {}
    per_row = len(table) / table["list"].map(table["list"].value_counts())  # so that the mean is that of the lists
    for mix, conflicts in MIXES.items():
        weight = table["list"].map({"conflict": conflicts} | dict.fromkeys(KEPT, (1 - conflicts) / len(KEPT)))
        found[mix] = mean(table["right"] * weight * per_row, table["group"], _draws(table["fit"]))
    return found


def _acting(records: ArenaRecords, gate: str, toward: Toward) -> dict[str, Estimate]:
    """Shares on which a gate acts: of conflicts that need it (``needed``), as they are answered the other way, of all
    conflicts, of texts that agree and of bare questions."""
    found = {}
    for one in LISTS:
        rows = records.set[records.set["list"] == one]
        acts_N, groups_N = rows[f"{gate}_{toward}"].to_numpy(float), rows["group"].to_numpy(str)
        found[one] = proportion(acts_N == 1, groups_N)
        if one == "conflict":
            needed_N = (rows["unsteered"] == toward.opposite).to_numpy()
            found["needed"] = proportion(acts_N[needed_N] == 1, groups_N[needed_N])
    return found


def _conflict_read(records: ArenaRecords) -> Estimate:
    """How well one pass tells conflicts from texts that agree: AUROC of P(conflict)."""
    rows = records.set[records.set["list"].isin(("conflict", "agreeing"))]
    if "p_conflict" not in rows or rows["p_conflict"].isna().any():
        return Estimate.undefined()
    return auroc(rows["p_conflict"], (rows["list"] == "conflict").astype(float), rows["group"].to_numpy(str))


def _kind(about: Mapping[str, Any]) -> str:
    """What has to be done to use a method; see ``KINDS``."""
    if about["changes_weights"]:
        return "adapter"
    return "passes" if about["passes"] > 1 else "words" if about["words"] else "hooks"


def _best(records: ArenaRecords, toward: str, methods: Sequence[str]) -> str | None:
    """The method of the highest worth on the tune split, which no test figure chose."""
    worth = {name: records.facts[name]["toward"][toward]["tune"]["worth"] for name in methods}
    return max(worth, key=lambda name: worth[name]) if worth else None


def _minus(records: ArenaRecords, toward: Toward, one: str, other: str, measure: str) -> Estimate:
    """How much more wanted answers one method gets than another, prompt by prompt and fit by fit."""
    mine_FN, theirs_FN = (records.hits(name, toward, measure) for name in (one, other))
    fits = max(len(mine_FN), len(theirs_FN))
    minus_FN = np.resize(mine_FN, (fits, mine_FN.shape[1])) - np.resize(theirs_FN, (fits, mine_FN.shape[1]))
    groups, fit_N = np.tile(records.groups("conflict"), fits), np.repeat(np.arange(fits), mine_FN.shape[1])
    return mean(minus_FN.ravel(), groups, _draws(fit_N))


def _kept_gain(records: ArenaRecords, toward: Toward, name: str, here: str) -> dict[str, float]:
    """What a method that was fitted elsewhere gains over the model itself, for what it gains fitted here: shares."""
    found = {}
    for measure in MEASURES:
        own = records.hits(UNSTEERED, toward, measure).mean()
        gained, inside = (records.hits(one, toward, measure).mean() - own for one in (name, here))
        found[measure] = float(gained / inside) if inside > 0 else math.nan
    return found


def _tests(
    records: ArenaRecords, toward: Toward, names: Sequence[str], baselines: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """Paired differences of wanted and exact answers to each baseline, by method.

    Holm's correction is over a direction's comparisons, of which each counts once where both are baselines.
    ``no_worse``: the interval of the difference of exact answers lies above minus ``MARGIN``.
    """
    p_of, groups = dict[frozenset[str], float](), records.groups("conflict")
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        for baseline in dict.fromkeys(one for one in baselines if one and one != name):
            two = frozenset((name, baseline))
            if two not in p_of:
                difference_N = np.subtract(*(records.hits(one, toward, "wanted").mean(0) for one in (name, baseline)))
                p_of[two] = sign_flips(difference_N, groups, np.random.default_rng(SEED))
            minus = {measure: _minus(records, toward, name, baseline, measure) for measure in MEASURES}
            no_worse = bool(minus["exact"].low > -MARGIN)
            found[name][baseline] = {"difference": minus["wanted"], "exact": minus["exact"], "no_worse": no_worse}
            found[name][baseline] |= {"p": p_of[two]}
    corrected = dict(zip(p_of, holm(list(p_of.values())).tolist(), strict=True))
    for name, tests in found.items():
        for baseline, test in tests.items():
            test["p_holm"] = corrected[frozenset((name, baseline))]
    return found
