"""The page of arenas, side by side: wanted answers against their cost, and tables, which docs/arena.py prints too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.arena import TOWARDS, arena_name
from mnemoscope.report.drawing import COLOUR, FINE, INK, MUTED, RULE, Panel, canvas, draw
from mnemoscope.report.page import Table, page_style
from mnemoscope.report.words import percent

TITLES = {"generalized": "To follow the text", "memorized": "To follow memory"}
LISTS = {"agreeing": "texts that agree", "bare": "bare questions"}
DASH = "-"
Results = Mapping[str, Any]


def render_arena(found: Sequence[Results]) -> str:
    """The text of ``arena.html``: of each arena its figures and tables, then all side by side."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=True)
    shown = [
        {
            "name": arena_name(results),
            "facts": facts_of(results),
            "drawn": [Markup(svg) for svg in draw(f"arena-{number}", _label(results), _panels(results))],
            "sentences": [sentence(results, toward) for toward in TOWARDS],
            "tables": tables_of(results),
        }
        for number, results in enumerate(found)
    ]
    across = [] if len(found) < 2 else across_tables(found)
    page = (files("mnemoscope.report") / "arena.html").read_text(encoding="utf-8")
    return environment.from_string(page).render(css=Markup(page_style()), arenas=shown, across=across)


def facts_of(results: Results) -> str:
    """What an arena is of, in one sentence."""
    known = f"{results['known']} of {results['asked']} items known bare; " if results["asked"] else ""
    sizes = ", ".join(
        f"{results['lists'][name]} {words}" for name, words in LISTS.items() if results["lists"].get(name)
    )
    share = "" if math.isnan(results["by_answers"]) else percent(results["by_answers"])
    left = "; ".join(f"{name} is left out ({why})" for name, why in results["left_out"].items())
    counts = f"{results['lists']['conflict']} test conflicts of {results['groups']} groups, {sizes}"
    of = f"Weights and passes in {results['dtype']}, seed {results['seed']}."
    told = f" A rule that sees the two answers alone, without a prompt or a model, tells which is memory's in {share}."
    return (
        f"{known}{counts}, frozen before anything was applied. {of}{told if share else ''}{f' {left}.' if left else ''}"
    )


def sentence(results: Results, toward: str) -> str:
    """What stands out in one direction; the winner is chosen on the tune split."""
    winner = results["winner"][toward]
    if winner is None:
        return f"{TITLES[toward]}: no method was run."
    own, best = results["unsteered"][toward], results["methods"][winner][toward]
    beaten = [
        f"{name} ({_points(test['difference']['estimate'])}, p = {_p(test['p_holm'])})"
        for name, test in best.get("tests", {}).items()
        if not math.isnan(test["p_holm"])
    ]
    beside = f" Against {' and '.join(beaten)}." if beaten else ""
    return (
        f"{TITLES[toward]}: {percent(own['wanted']['estimate'])} without help. Best on tune is {winner}: "
        f"{percent(best['wanted']['estimate'])}, and {percent(best['lost'])} of other answers lost.{beside}"
    )


def tables_of(results: Results) -> list[Table]:
    """The tables of one arena: answers, costs, tests and changed prompts, in both directions."""
    return [
        table
        for toward in TOWARDS
        for table in (
            _answers(results, toward),
            _costs(results, toward),
            _compared(results, toward),
            _varied(results, toward),
        )
    ]


def across_tables(found: Sequence[Results]) -> list[Table]:
    """Wanted and lost of every method, arenas side by side."""
    names = list(dict.fromkeys(name for results in found for name in results["methods"]))
    tables = []
    for toward in TOWARDS:
        rows = []
        for name in ("unsteered", *names):
            cells = [_entry(results, name, toward) for results in found]
            rows.append([name, *(_wanted_lost(cell) if cell else DASH for cell in cells)])
        caption = f"{TITLES[toward]}: wanted answers / other answers lost"
        tables.append(Table(caption, ["method", *(arena_name(results) for results in found)], rows))
    return tables


def _entry(results: Results, name: str, toward: str) -> Results | None:
    found = results["unsteered"] if name == "unsteered" else results["methods"].get(name)
    return found[toward] if found else None


def _wanted_lost(cell: Results) -> str:
    return f"{percent(cell['wanted']['estimate'])} / {percent(cell['lost'])}"


def _methods(results: Results, toward: str) -> list[tuple[str, Results]]:
    """The model itself, then methods by their share of wanted answers."""
    ranked = sorted(results["methods"].items(), key=lambda entry: -entry[1][toward]["wanted"]["estimate"])
    return [("unsteered", results["unsteered"][toward]), *((name, found[toward]) for name, found in ranked)]


def _answers(results: Results, toward: str) -> Table:
    rows = []
    for name, found in _methods(results, toward):
        control = found.get("control")
        beside = f"{percent(control['estimate'])}, worst {percent(control['worst'])}" if control else DASH
        shares = [found[share]["estimate"] for share in ("opposite", "neither", "exact", *LISTS)]
        gated = found["gated"]
        behind = [percent(gated["right"][one]) for one in ("conflict", *LISTS)] if gated else [DASH]
        both = f"{percent(found['mix']['estimate'])} / {percent(gated['estimate']) if gated else DASH}"
        rows.append([name, _ranged(found["wanted"]), beside, *map(_share, shares), both, " / ".join(behind)])
    alone = f"answer alone on its line (of {results['unsteered'][toward]['exact']['n']})"
    columns = ["method", "wanted answer", "control of equal norm", "other answer", "neither", alone]
    columns += [f"{words} kept" for words in LISTS.values()]
    columns += ["mix of all three, without / with gate", "its parts with gate: conflicts / agreeing / bare"]
    return Table(f"{TITLES[toward]}: answers", columns, rows)


def _costs(results: Results, toward: str) -> Table:
    plain = results["unsteered"][toward]["seconds"]
    rows = []
    for name, found in _methods(results, toward):
        of_method = results["methods"].get(name, {"passes": 1, "changes_weights": False})
        kl, seconds = found["divergence"], found["seconds"]
        numbers = [kl["first"], kl["next"], found["nats"], found["repeated"], found.get("norm", math.nan)]
        passes = f"{of_method['passes']}{', other weights' if of_method['changes_weights'] else ''}"
        rows.append([name, passes, _number(seconds / plain), *map(_number, numbers), _setting(found.get("chosen", {}))])
    columns = ["method", "passes", "seconds, unsteered = 1", "divergence at a cut", "and behind it"]
    columns += ["nats a token written", "repeated", "relative norm", "chosen"]
    return Table(f"{TITLES[toward]}: costs", columns, rows)


def _compared(results: Results, toward: str) -> Table:
    winner = results["winner"][toward]
    baselines = list(dict.fromkeys(name for name in (*results["baselines"][toward].values(), winner) if name))
    rows = []
    for name, found in _methods(results, toward)[1:]:
        tests = found.get("tests", {})
        rows.append([name, *(_tested(tests.get(baseline)) for baseline in baselines)])
    caption = f"{TITLES[toward]}: paired differences of wanted answers, p-values corrected by Holm"
    heads = [f"minus {name}{' (best on tune)' if name == winner else ''}" for name in baselines]
    return Table(caption, ["method", *heads], rows)


def _varied(results: Results, toward: str) -> Table:
    lists = list(results["unsteered"][toward]["varied"])
    rows = [
        [name, *(_share(found["varied"][one]["estimate"]) for one in lists)]
        for name, found in _methods(results, toward)
    ]
    return Table(f"{TITLES[toward]}: wanted answers to changed prompts", ["method", *lists], rows)


def _tested(test: Results | None) -> str:
    if test is None:
        return DASH
    return f"{_points(test['difference']['estimate'])} (p = {_p(test['p_holm'])})"


def _points(change: float) -> str:
    return f"{100 * change:+.0f} points"


def _p(value: float) -> str:
    return DASH if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _share(value: float) -> str:
    return DASH if math.isnan(value) else percent(value)


def _ranged(share: Results) -> str:
    if math.isnan(share["low"]):
        return percent(share["estimate"])
    return f"{percent(share['estimate'])} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"


def _number(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _setting(chosen: Mapping[str, Any]) -> str:
    """A setting in a few words; many layers as a range."""
    words = []
    for name, value in chosen.items():
        if isinstance(value, list):
            value = f"{value[0]} to {value[-1]}" if len(value) > 1 else value[0]
        words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words) or DASH


def _label(results: Results) -> str:
    return f"Wanted answers against other answers lost, {arena_name(results)}"


def _panels(results: Results) -> list[Panel]:
    return [_panel(results, toward) for toward in TOWARDS]


def _panel(results: Results, toward: str) -> Panel:
    """Wanted answers against answers lost: a disc for one pass, a square for two, a triangle for other weights."""

    def plot() -> Figure:
        figure, ax = canvas(330)
        ax.set_title(TITLES[toward], color=COLOUR[toward])
        places = []
        for name, found in _methods(results, toward):
            of_method = results["methods"].get(name, {"passes": 1, "changes_weights": False})
            marker = "^" if of_method["changes_weights"] else "s" if of_method["passes"] > 1 else "o"
            x, y = 100 * found["lost"], 100 * found["wanted"]["estimate"]
            ax.plot(x, y, marker, color=INK if name == "unsteered" else COLOUR[toward], markersize=7, alpha=0.85)
            places.append((x, y, name))
        _named(ax, places)
        for marker, words in (("o", "one pass"), ("s", "two passes"), ("^", "other weights")):
            ax.plot([], [], marker, color=MUTED, markersize=6, label=words)
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=10, labelcolor=MUTED)
        own = 100 * results["unsteered"][toward]["wanted"]["estimate"]
        ax.axhline(own, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
        right = max([place[0] for place in places if not math.isnan(place[0])], default=0.0)
        ax.set(
            xlabel="other answers lost, %", ylabel="wanted answers, %", ylim=(-3, 103), xlim=(-2, max(20.0, right + 14))
        )
        ax.spines["left"].set_color(RULE)
        return figure

    return plot


def _named(ax: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Names right of their marks, moved down where they would overlap."""
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted((place for place in places if not math.isnan(place[0])), key=lambda place: -place[1]):
        height = y
        while any(abs(height - other) < 4.5 and abs(x - beside) < 22 for beside, other in taken):
            height -= 1.5
        taken.append((x, height))
        ax.annotate(name, (x, height), (7, 0), textcoords="offset points", va="center", color=MUTED, fontsize=10)
