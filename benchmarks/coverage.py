"""What the intervals of the report cover, by simulation: shifts, controls, their difference, rankings.

    python benchmarks/coverage.py [--repeats 2000]

Answers come from a logistic model with effects of the group, of the item and of the draw of a control, so that the
truth is known: 1 to 8 examples a group, 20 draws. A *null vector* is another draw of the control. Seeds are fixed.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from mnemoscope.statistics import Estimate, auroc, mean, proportion, surely_more

GROUPS, DRAWS = (6, 8, 10, 20, 40), 20
FEWER = (4, 6, 8, 12, 20)  # draws whose intervals are compared
OF_GROUP, OF_ITEM, OF_DRAW = 0.7, 0.7, 0.5  # standard deviations of the effects, in log odds


def rate(log_odds: float, spread: float) -> float:
    """The expected share, over effects with this standard deviation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float((expit(log_odds + spread * nodes) * weights).sum() / weights.sum())


def covered(groups: int, log_odds: float, repeats: int, seed: int, draws: int = DRAWS) -> dict[str, float]:
    """Coverage of a shift, of a control and of their difference, and how often a null vector does surely more.

    The vector is one unit of log odds stronger than the mean draw of its control. ``width``: of the difference.
    """
    rng = np.random.default_rng([seed, groups])
    found: dict[str, list[float]] = {name: [] for name in ("shift", "control", "difference", "more", "width")}
    spread = float(np.hypot(OF_GROUP, OF_ITEM))
    steered, flipped = rate(log_odds + 1, spread), rate(log_odds, float(np.hypot(spread, OF_DRAW)))
    for _ in range(repeats):
        index_N = np.repeat(np.arange(groups), rng.integers(1, 9, groups))
        effect_N = OF_GROUP * rng.normal(size=groups)[index_N] + OF_ITEM * rng.normal(size=len(index_N))
        vector_N = rng.random(len(index_N)) < expit(log_odds + 1 + effect_N)
        effects_ND = log_odds + effect_N[:, None] + OF_DRAW * rng.normal(size=draws + 1)
        null_N, *control_DN = (rng.random(effects_ND.shape) < expit(effects_ND)).T
        control_ND = np.stack(control_DN, axis=1)
        at = np.repeat(index_N, draws), np.tile(np.arange(draws), len(index_N))  # group and draw of each row
        found["shift"].append(holds(proportion(vector_N, index_N), steered))
        found["control"].append(holds(proportion(control_ND.ravel(), *at), flipped))
        beyond_ND, nothing_ND = (one_N[:, None].astype(float) - control_ND for one_N in (vector_N, null_N))
        difference = mean(beyond_ND.ravel(), *at)
        found["difference"].append(holds(difference, steered - flipped))
        found["width"].append(difference.high - difference.low)
        found["more"].append(float(surely_more(nothing_ND.ravel(), *at)))
    return {name: float(np.nanmean(values)) for name, values in found.items()}


def exchanged(groups: int, log_odds: float, repeats: int, seed: int, settings: int = 6) -> tuple[float, float, float]:
    """Of few groups, of which a half is judged by what is chosen on the other: coverage of what the lever does.

    That lever is the best of several ``settings`` on tune, which are half a unit of log odds apart. Beside it the mean
    width of that interval, and of test's alone.
    """
    rng, spread = np.random.default_rng([seed, groups]), float(np.hypot(OF_GROUP, OF_ITEM))
    found, widths = list[float](), list[tuple[float, float]]()
    for _ in range(repeats):
        index_N = np.repeat(np.arange(2 * groups), rng.integers(1, 9, 2 * groups))
        effect_N = OF_GROUP * rng.normal(size=2 * groups)[index_N] + OF_ITEM * rng.normal(size=len(index_N))
        of_setting = log_odds + 0.5 * rng.normal(size=settings)
        hit_NS = rng.random((len(index_N), settings)) < expit(of_setting + effect_N[:, None])
        tune_N = index_N < groups
        chosen = int(hit_NS[tune_N].mean(0).argmax()), int(hit_NS[~tune_N].mean(0).argmax())
        judged_N = np.where(tune_N, hit_NS[:, chosen[1]], hit_NS[:, chosen[0]])
        both = proportion(judged_N, index_N)
        alone = proportion(judged_N[~tune_N], index_N[~tune_N])
        found.append(holds(both, rate(of_setting[chosen[0]], spread)))
        widths.append((both.high - both.low, alone.high - alone.low))
    return float(np.nanmean(found)), *map(float, np.nanmean(widths, axis=0))


def ranking(groups: int, distance: float, repeats: int, seed: int) -> float:
    """Coverage of an area under the ROC curve, with both classes in every group."""
    rng, found = np.random.default_rng([seed, groups]), []
    truth = float(norm.cdf(distance / np.sqrt(2 * (1 + OF_GROUP**2))))
    for _ in range(repeats):
        index_N = np.repeat(np.arange(groups), rng.integers(2, 9, groups))
        label_N = (rng.random(len(index_N)) < 0.5).astype(int)
        score_N = distance * label_N + OF_GROUP * rng.normal(size=groups)[index_N] + rng.normal(size=len(index_N))
        found.append(holds(auroc(score_N, label_N, index_N), truth))
    return float(np.nanmean(found))


def holds(found: Estimate, truth: float) -> float:
    """1.0 or 0.0; NaN without an interval."""
    return float("nan") if np.isnan(found.low) else float(found.low <= truth <= found.high)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    print("| groups | rate | shift | control | difference | null vector surely more |\n|---|---|---|---|---|---|")
    for log_odds in (-2.0, -1.0, 0.0, 1.0):
        for groups in GROUPS:
            found = covered(groups, log_odds, repeats, 0)
            numbers = " | ".join(f"{found[name]:.3f}" for name in ("shift", "control", "difference", "more"))
            print(f"| {groups} | {rate(log_odds, 1.0):.2f} | {numbers} |", flush=True)
    print("\n| draws, of 40 groups | rate | control | difference | its width | null more |\n|---|---|---|---|---|---|")
    for log_odds in (-2.0, -1.0):
        for draws in FEWER:
            found = covered(40, log_odds, repeats, 3, draws)
            numbers = " | ".join(f"{found[name]:.3f}" for name in ("control", "difference", "width", "more"))
            print(f"| {draws} | {rate(log_odds, 1.0):.2f} | {numbers} |", flush=True)
    print(
        "\n| groups of tune, as many of test | rate | chosen crosswise | its width, of test alone |\n|---|---|---|---|"
    )
    for log_odds in (-1.0, 0.0, 1.0, 2.0):
        for groups in (4, 7, 10):
            share, width, alone = exchanged(groups, log_odds, repeats, 2)
            print(f"| {groups} | {rate(log_odds, 1.0):.2f} | {share:.3f} | {width:.2f}, {alone:.2f} |", flush=True)
    print("\n| groups | distance | area under the ROC curve |\n|---|---|---|")
    for distance in (0.0, 1.0, 2.0):
        for groups in GROUPS:
            print(f"| {groups} | {distance} | {ranking(groups, distance, repeats, 1):.3f} |", flush=True)


if __name__ == "__main__":
    main()
