"""Verdicts on items, from what a model did with originals and variants: counts, and texts that are too likely.

A variant is as good as its original to whoever saw neither. So each variant in turn stands for an original that nobody
was taught, and what the real originals show is held against all of these: no labels are needed, and the share of false
accusations is the one that is asked for, as far as originals are drawn as variants are.

Shapes: N items, M pseudo-originals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mnemoscope.statistics import Estimate, mean, proportion

ACCUSED = 0.01  # share of items without contamination that may be accused
OF_COSTS = 0.9  # part of the false accusations that costs may make; counts are few, so they make far less than theirs
OF_SOLVED = 0.2  # part of that share, for items whose variants are solved: their score owes nothing to memory
LEAST_P = 1e-12
MOST_CUT = 0.05  # share of replies that may be cut before a summary says so
ENOUGH = 2  # times 1 / level pseudo-originals must be left, where level is the share of false accusations
LEAST = 3  # variants of an item, to say anything of it
COSTS = {"nats": 1, "standard": -1}  # columns, and the sign that makes them dearer
RIVALS = {"loss": ("nats", -1), "zlib": ("zlib", -1), "min-k": ("min_k", 1), "min-k++": ("min_k_pp", 1)}


def evidence(rows: pd.DataFrame, reference: pd.DataFrame | None = None, accused: float = ACCUSED) -> pd.DataFrame:
    """Of each item what speaks for its being recited, (N,) with ``item`` as its index.

    Args:
        rows: of ``replies.rows_of``.
        reference: the same of another model, on the same items and variants: then what is compared is how much less
            each text costs this one.
        accused: share of clean items that may be accused.

    Columns: ``right``; ``variants``, ``solved``, ``recited``, ``neither`` (counts); ``sooner``: how many spreads the
    original's text costs less than its variants do, in nats and in standard deviations, on average; ``p_recited``: how
    probable as many are by chance, as often as a variant is answered with another one's answer, of all items or of this
    one, or a variant of another item with this original's; ``p_sooner``: share of pseudo-originals that cost as little;
    ``score``: both together, by Fisher's method, costs by a normal tail; and each rival of ``RIVALS``, higher for the
    more suspicious.
    """
    costs_NC = rows[list(COSTS)].to_numpy(float) * list(COSTS.values())
    if reference is not None:
        costs_NC = costs_NC - reference[list(COSTS)].to_numpy(float) * list(COSTS.values())
    costs_NC = costs_NC / [_spread(rows["item"], rows["place"], cost_N) for cost_N in costs_NC.T]
    of_item, asked, modal = rows.groupby("item", sort=False).indices, rows[rows["place"] > 0], list[float]()
    found, pseudo, rates = list[dict[str, Any]](), dict[str, list[float]](), list[tuple[int, int]]()
    for item, part in rows.groupby("item", sort=False):
        original, variants = part[part["place"] == 0].iloc[0], part[part["place"] > 0]
        labels, said = (variants[name].to_numpy() for name in ("label", "found"))
        own_NC = costs_NC[of_item[item]]
        counts = {name: int((labels == name).sum()) for name in ("solved", "recited", "neither")}
        found.append(
            {"item": item, "right": original["label"] == "right", "variants": len(variants), **counts}
            | {"sooner": _sooner(own_NC[0], own_NC[1:])}
            | {name: sign * original[column] for name, (column, sign) in RIVALS.items()}
        )
        answers, hits, tries = variants["answer"].to_numpy(), 0, 0
        for place, answer in enumerate(answers):
            pseudo.setdefault(str(item), []).append(_sooner(own_NC[1 + place], np.delete(own_NC[1:], place, 0)))
            others = answers != answer  # what has the same answer tells nothing
            hits, tries = hits + int((said[others] == answer).sum()), tries + int(others.sum())
        rates.append((hits, tries))
        elsewhere = asked[(asked["item"] != item) & (asked["answer"] != original["answer"])]
        modal.append(float((elsewhere["found"] == original["answer"]).mean()) if len(elsewhere) else 0.0)
    table, (hits_N, tries_N) = pd.DataFrame(found).set_index("item"), np.array(rates, float).reshape(-1, 2).T
    by_chance = (1 + hits_N.sum()) / (1 + tries_N.sum())
    chance_N = np.fmax(by_chance, np.divide(hits_N, tries_N, out=np.zeros_like(hits_N), where=tries_N > 0))
    chance_N = np.fmax(chance_N, modal)  # a model that says one answer to everything recites nothing
    table["p_recited"] = stats.binom.sf(table["recited"] - 1, table["variants"], np.minimum(chance_N, 1.0))
    table["p_sooner"] = _by_rank(table["sooner"], pseudo, OF_COSTS * accused)
    tail_N = stats.norm.logsf(table["sooner"].fillna(-math.inf))  # finer than a rank beyond the last
    table["score"] = -np.log(np.maximum(table["p_recited"], LEAST_P)) - tail_N
    return table


def verdicts(table: pd.DataFrame, accused: float = ACCUSED) -> pd.DataFrame:
    """The same with ``verdict`` and the share of variants that were ``solved_share``, with its interval (low, high).

    ``recited``: counts or costs are beyond what a share ``accused`` of clean items would show, or a fifth of that where
    the variants are surely solved, so that the score owes nothing to memory. Of the rest ``solved`` and ``neither``:
    the interval of what was solved lies above or below a half. ``cannot tell``: it does not, or there are fewer than
    ``LEAST`` variants.
    """
    share = (table["solved"] / table["variants"]).to_numpy(float)
    ends = [_ends(int(hits), int(n)) for hits, n in zip(table["solved"], table["variants"], strict=True)]
    low, high = np.array(ends, float).reshape(-1, 2).T
    level = accused * np.where(low > 0.5, OF_SOLVED, 1.0)
    beyond = (table["p_recited"] <= (1 - OF_COSTS) * level) | (table["p_sooner"] <= OF_COSTS * level)
    enough = table["variants"] >= LEAST
    names = np.select(
        [~enough, beyond, low > 0.5, high < 0.5], ["cannot tell", "recited", "solved", "neither"], "cannot tell"
    )
    return table.assign(verdict=names, solved_share=share, low=low, high=high)


def summary(table: pd.DataFrame, accused: float = ACCUSED) -> dict[str, Any]:
    """Of the whole benchmark, from ``verdicts``: accuracies, their difference by item, what is left of the score."""
    items = table.index.to_numpy(str)
    right, solved = table["right"].to_numpy(float), (table["solved"] / table["variants"]).to_numpy(float)
    recited = (table["verdict"] == "recited").to_numpy()
    return {
        "items": len(table),
        "variants": int(table["variants"].sum()),
        "verdicts": {name: int((table["verdict"] == name).sum()) for name in VERDICTS},
        "originals": proportion(right, items),
        "fresh": mean(solved, items),
        "inflation": mean(right - solved, items),
        "without_recited": mean(np.where(recited, solved, right), items),
        "accused": table.index[recited].tolist(),
        "by_chance": accused * len(table),
    }


VERDICTS = ("recited", "solved", "neither", "cannot tell")


def in_words(found: Mapping[str, Any]) -> list[str]:
    """The sentences of a summary."""
    counts = found["verdicts"]
    told = [f"{counts[name]} {name}" for name in VERDICTS if counts[name]]
    lines = [f"{found['items']} items, {found['variants']} variants: {', '.join(told)}"]
    lines.append(f"right: {_percent(found['originals'])} of originals, {_percent(found['fresh'])} of fresh variants")
    lines.append(f"originals minus variants, by item: {_percent(found['inflation'])}")
    if not found["originals"].estimate:
        lines.append("no original is answered right: there is no score to inflate")
    if accused := found["accused"]:
        left = (
            f"left of the score, where recited items count as their variants do: {_percent(found['without_recited'])}"
        )
        lines += [left, f"accused: {', '.join(accused)}"]
    else:
        each = found["variants"] / max(1, found["items"])
        lines.append(f"nothing is accused: clean as far as {each:.0f} variants of an item show")
    if (cut := found.get("cut", 0.0)) > MOST_CUT:
        lines.append(f"{100 * cut:.0f} % of replies were cut before they stated an answer; give them more tokens")
    lines += [proven(found["proof"])] if "proof" in found else []
    lines.append(f"of clean items {found['by_chance']:.1f} would be accused by chance")
    return lines


def proven(proof: Mapping[str, Any]) -> str:
    """What steering did, in a sentence."""
    if "left_out" in proof:
        return f"not proven by steering: {proof['left_out']}"
    told = {name: _percent(share) for name, share in proof.items()}
    return (
        f"steered away from memory, {told['shift_recited']} of recited originals and {told['shift_solved']} of solved "
        f"variants lose their answers; by random shifts of that norm {told['control_recited']} and "
        f"{told['control_solved']}"
    )


def _percent(share: Estimate) -> str:
    ends = "" if math.isnan(share.low) else f" ({100 * share.low:.0f} to {100 * share.high:.0f})"
    return f"{100 * share.estimate:.0f} %{ends}"


def _spread(item_N: pd.Series, place_N: pd.Series, cost_N: np.ndarray) -> float:
    """Standard deviation of the variants' costs about the mean of their item; NaN where nothing differs."""
    variants = pd.DataFrame({"item": item_N, "cost": cost_N})[(place_N > 0).to_numpy()]
    within = variants["cost"] - variants.groupby("item")["cost"].transform("mean")
    degrees = len(variants) - variants["item"].nunique()
    return (math.sqrt(float((within**2).sum()) / degrees) if degrees > 0 else 0.0) or math.nan


def _sooner(cost_C: np.ndarray, others_MC: np.ndarray) -> float:
    """By how many spreads a text costs less than others, of which there are few; costs are in spreads."""
    if not len(others_MC):
        return math.nan
    return float((others_MC.mean(0) - cost_C).mean() / math.sqrt(1 + 1 / len(others_MC)))


def _by_rank(values: pd.Series, pseudo: Mapping[str, Sequence[float]], level: float) -> np.ndarray:
    """Share of pseudo-originals that show at least as much, counted with the item itself, (N,).

    Variants of what was taught often are like it, so those of accused items are left out, until nothing more is
    accused, or as long as enough others are there to hold anything against.
    """
    known, out = {item: np.array(of)[~np.isnan(of)] for item, of in pseudo.items()}, set[str]()
    while True:
        chance_M = np.sort(np.concatenate([of for item, of in known.items() if item not in out] or [np.zeros(0)]))
        above_N = len(chance_M) - np.searchsorted(chance_M, values.to_numpy(float))
        shares_N = np.where(values.isna(), 1.0, (1 + above_N) / (1 + len(chance_M)))
        accused = set(values.index[shares_N <= level].astype(str))
        left = sum(len(of) for item, of in known.items() if item not in accused)
        if accused <= out or left < ENOUGH / level:
            return shares_N
        out |= accused


def _ends(hits: int, n: int) -> tuple[float, float]:
    """Interval of Clopper & Pearson (1934), by the variants of one item: each end is wrong in 5 %."""
    return tuple(stats.binomtest(hits, n).proportion_ci(0.9)) if n else (math.nan, math.nan)
