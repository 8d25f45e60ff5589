"""The story of an arena, its page: wanted answers against their cost, and tables, which docs/arena.py prints too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnemoscope.report.drawing import COLOUR, FINE, INK, MUTED, RULE, Panel, canvas, draw
from mnemoscope.report.page import Table, filled
from mnemoscope.report.rows import Part, mean_of_known, parts_of, to_json
from mnemoscope.report.stories.arena import MARGIN, UNSTEERED, ArenaRecords, results_of
from mnemoscope.report.words import DASH, p_value, percent
from mnemoscope.runs.digests import write_marker
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.toward import Toward
from mnemoscope.statistics import Estimate, averaged

TITLES = {"generalized": "To context", "memorized": "To memory"}
LISTS = {"agreeing": "texts that agree", "bare": "bare questions"}
CONTROLS = {"gaussian": "random", "permuted_answers": "other answers"}
ALLOWED = {"words": "change the prompt", "hooks": "add hooks", "adapter": "load an adapter", "passes": "pay two passes"}
LEAD = """A wanted answer is that of the text, or that of memory. Each method is fitted on one part of the items, its
setting is chosen on a second, and it is judged on a third that was frozen before."""


def build_arena(run: Path, beside: Sequence[Path] = ()) -> Path:
    """Write ``arena/results.json`` and ``arena.html`` of a run from its records; returns the path of the page.

    ``beside``: other runs, whose arenas are on the same page.

    Raises:
        InputError: a run holds no arena, or its records are damaged.
    """
    results = results_of(ArenaRecords.of(run / "arena"))
    written = write_atomically(run / "arena" / "results.json", to_json(results).encode())
    write_marker(run / "arena", "report", [written])
    found = [results, *(results_of(ArenaRecords.of(other / "arena")) for other in beside)]
    shown = [
        {
            "name": arena_name(one),
            "facts": facts_of(one),
            "drawn": _drawn(one, f"arena-{number}"),
            "sentences": [say(one, toward) for toward in Toward for say in (sentence, verdict)],
            "tables": tables_of(one),
        }
        for number, one in enumerate(found)
    ]
    pooled = enumerate(by_model(found))
    drawn = [{"name": arena_name(one), "drawn": _drawn(one, f"model-{number}")} for number, one in pooled]
    about = {"brand": "arena", "title": "Every lever on one test set", "lead": LEAD}
    page = filled("tables.html", **about, articles=shown, across=across_tables(found) if beside else [], models=drawn)
    return write_atomically(run / "arena.html", page.encode())


def arena_name(results: Part) -> str:
    """Model and task of an arena."""
    return f"{results.model}, {results.task}"


def facts_of(results: Part) -> str:
    """What an arena is of, in a few sentences."""
    lists = results.lists
    known = f"{results.known} of {results.asked} items known; " if results.asked else ""
    sizes = ", ".join(f"{lists[name]} {words}" for name, words in LISTS.items() if lists.get(name))
    counts = f"{known}{lists.conflict} test conflicts of {results.groups} groups, {sizes}"
    sentences = [
        f"{counts}, frozen before anything was applied.",
        f"Weights and passes in {results.dtype}, seed {results.seed}.",
    ]
    if not results.lists.get("bare"):
        sentences.append("The task has no bare questions, so nobody can say which of their answers are lost.")
    if not math.isnan(results.by_answers):
        rule = "A rule that sees the two answers alone, without a prompt or a model, tells which is memory's in"
        sentences.append(f"{rule} {percent(results.by_answers)}.")
    left = "; ".join(f"{name} is left out ({why})" for name, why in results.left_out.items())
    return " ".join([*sentences, *([f"{left}."] if left else [])])


def sentence(results: Part, toward: str) -> str:
    """What stands out in one direction; the winner is chosen on the tune split."""
    winner = results.winner[toward]
    if winner is None:
        return f"{TITLES[toward]}: no method was run."
    own, best = results.unsteered[toward], results.methods[winner][toward]
    beaten = [
        f"{name} ({_points(test.difference)}, p = {p_value(test.p_holm)})"
        for name, test in best.get("tests", {}).items()
        if not math.isnan(test.p_holm)
    ]
    beside = f" Against {' and '.join(beaten)}." if beaten else ""
    return (
        f"{TITLES[toward]}: {percent(own.wanted.estimate)} without help. Best on tune is {winner}: "
        f"{percent(best.wanted.estimate)}, and {percent(best.lost)} of other answers lost.{beside}"
    )


def verdict(results: Part, toward: str) -> str:
    """What to use, by what one may do: of each kind the method that is best on tune."""
    found = [(what, name) for kind, what in ALLOWED.items() if (name := results.best[toward][kind])]
    told = [
        f"{what}: {name}, {_ranged(of.exact)} exact, {percent(of.lost)} lost"
        for what, name, of in ((what, name, results.methods[name][toward]) for what, name in found)
    ]
    return f"{TITLES[toward]}, best on tune by what you may do: {'; '.join(told)}." if told else ""


def tables_of(results: Part) -> list[Table]:
    """The tables of one arena: answers, costs, tests and changed prompts, in both directions."""
    varied = (_varied,) if any(results.unsteered[toward].varied for toward in Toward) else ()
    of_each = (_answers, _mixes, _gates, _carried, _compared, _costs, *varied)
    return [made for toward in Toward for table in of_each if (made := table(results, toward)).rows]


def across_tables(found: Sequence[Part]) -> list[Table]:
    """Wanted and lost of every method, arenas side by side."""
    tables = []
    for toward in Toward:
        each = [dict(_methods(results, toward)) for results in found]
        names = dict.fromkeys((UNSTEERED, *(name for results in found for name in results.methods)))
        rows = [[name, *(_wanted_lost(methods.get(name)) for methods in each)] for name in names]
        caption = f"{TITLES[toward]}: wanted answers / other answers lost"
        tables.append(Table(caption, ["method", *(arena_name(results) for results in found)], rows))
    return tables


def by_model(found: Sequence[Part]) -> list[Part]:
    """Of each model with several arenas, what is drawn of one: means over its sets, and of the ends of intervals."""
    pooled = []
    for model in dict.fromkeys(results.model for results in found):
        sets = [results for results in found if results.model == model]
        names = [name for name in sets[0].methods if all(name in one.methods for one in sets)]
        methods = {
            name: dict(zip(("passes", "changes_weights"), _cost(sets[0], name), strict=True))
            | {toward: _mean_of([one.methods[name][toward] for one in sets]) for toward in Toward}
            for name in names
        }
        unsteered = {toward: _mean_of([one.unsteered[toward] for one in sets]) for toward in Toward}
        made = {"model": model, "task": f"mean of {len(sets)} sets", "unsteered": unsteered, "methods": methods}
        pooled += [parts_of(made)] if len(sets) > 1 else []
    return pooled


def _mean_of(cells: Sequence[Part]) -> dict[str, Any]:
    shares = {name: averaged([cell[name] for cell in cells]) for name in ("exact", "wanted")}
    return {**shares, "lost": mean_of_known([cell.lost for cell in cells])}


def _wanted_lost(found: Part | None) -> str:
    return f"{percent(found.wanted.estimate)} / {percent(found.lost)}" if found else DASH


def _methods(results: Part, toward: str) -> list[tuple[str, Part]]:
    """The model itself, then methods by their share of wanted answers."""
    found = [(name, of[toward]) for name, of in results.methods.items()]
    return [(UNSTEERED, results.unsteered[toward]), *sorted(found, key=lambda entry: -entry[1].wanted.estimate)]


def _cost(results: Part, name: str) -> tuple[int, bool]:
    """Passes of a method, and whether it changes weights."""
    about = results.methods.get(name, {})
    return about.get("passes", 1), about.get("changes_weights", False)


def _answers(results: Part, toward: str) -> Table:
    rows = []
    for name, found in _methods(results, toward):
        controls = found.get("controls", {})
        beside = " / ".join(percent(controls[one].estimate) if one in controls else DASH for one in CONTROLS)
        shares = [found[share].estimate for share in ("opposite", "neither", *LISTS)]
        said = map(_ranged, (found.exact, found.said, found.wanted))
        fits = str(results.methods.get(name, {}).get("fits", DASH))
        rows.append([name, fits, *said, beside, *map(_share, shares)])
    columns = ["method", "fits", "exact answer", "text names it first", "answer that begins so"]
    columns += [f"controls: {' / '.join(CONTROLS.values())}", "other answer", "neither"]
    columns += [f"{words} kept" for words in LISTS.values()]
    return Table(f"{TITLES[toward]}: answers", columns, rows)


def _mixes(results: Part, toward: str) -> Table:
    """Right answers where only a part of the prompts are conflicts, without a gate and with what tune prefers."""
    methods, rows = _methods(results, toward), []
    for name, found in methods:
        default = found.get("default", {"gate": "", "mix": found.mix})
        cells = (f"{_share(found.mix[m].estimate)} / {_share(default['mix'][m].estimate)}" for m in found.mix)
        rows.append([name, default["gate"] or "none", *cells])
    caption = f"{TITLES[toward]}: right answers by the share of conflicts, without a gate / with the gate by tune"
    return Table(caption, ["method", "gate by tune", *methods[0][1].mix], rows)


def _gates(results: Part, toward: str) -> Table:
    """Where gates act, on the prompts themselves: the same for all methods."""
    columns = {"needed": "conflicts that need it", "conflict": "all conflicts", **LISTS}
    rows = [[gate, *(_ranged(of[toward][one]) for one in columns)] for gate, of in results.gates.items()]
    read = f"; one pass tells conflicts from agreeing texts {results.conflict_read.estimate:.2f} right"
    caption = f"{TITLES[toward]}: where a gate acts{read if results.conflict_read.known else ''}"
    return Table(caption, ["gate", *columns.values()], rows)


def _costs(results: Part, toward: str) -> Table:
    rows = []
    for name, found in _methods(results, toward):
        (passes, other_weights), kl = _cost(results, name), found.divergence
        numbers = [found.seconds / results.unsteered[toward].seconds, kl.first, kl.next, found.nats, found.repeated]
        numbers.append(found.get("norm", math.nan))
        words = f"{passes}{', other weights' if other_weights else ''}"
        rising = ", still rising where the search ended" if found.get("tune", {}).get("at_end") else ""
        rows.append([name, words, *map(_number, numbers), _setting(found.get("chosen", {})) + rising])
    columns = ["method", "passes", "seconds, unsteered = 1", "divergence at a cut", "and behind it"]
    columns += ["nats a token written", "repeated", "relative norm", "chosen"]
    return Table(f"{TITLES[toward]}: costs", columns, rows)


def _carried(results: Part, toward: str) -> Table:
    """Of methods that were fitted elsewhere, what they do here beside the same method fitted here."""
    rows = []
    for about in results.methods.values():
        if about.carried and "kept_gain" in (found := about[toward]):
            method, origin = about.carried
            inside, lost = results.methods[method][toward], _share(found.lost)
            kept = _share(found.kept_gain.exact)
            rows.append([method, origin, _ranged(found.exact), lost, _ranged(inside.exact), kept])
    columns = ["method", "fitted on", "exact answer", "lost", "fitted here", "of the gain fitted here"]
    return Table(f"{TITLES[toward]}: fitted elsewhere", columns, rows)


def _compared(results: Part, toward: str) -> Table:
    winner = results.winner[toward]
    baselines = list(dict.fromkeys(name for kind, name in results.best[toward].items() if name and kind != "hooks"))
    baselines += [winner] if winner and winner not in baselines else []
    rows = [
        [name, *(_tested(found.get("tests", {}).get(baseline)) for baseline in baselines)]
        for name, found in _methods(results, toward)[1:]
    ]
    said = f"exact answers (no worse: less than {100 * MARGIN:.0f} points below), then of answers that begin so"
    caption = f"{TITLES[toward]}: paired differences of {said}, p-values corrected by Holm"
    heads = [f"minus {name}{' (best on tune)' if name == winner else ''}" for name in baselines]
    return Table(caption, ["method", *heads], rows)


def _varied(results: Part, toward: str) -> Table:
    methods = _methods(results, toward)
    rows = [[name, *(_share(share.estimate) for share in found.varied.values())] for name, found in methods]
    return Table(f"{TITLES[toward]}: wanted answers to changed prompts", ["method", *methods[0][1].varied], rows)


def _tested(test: Part | None) -> str:
    if not test:
        return DASH
    words = "no worse" if test.no_worse else "not shown"
    return f"{_points(test.exact)}, {words}; {_points(test.difference)} (p = {p_value(test.p_holm)})"


def _points(change: Estimate) -> str:
    return f"{100 * change.estimate:+.0f} points"


def _share(value: float) -> str:
    return DASH if math.isnan(value) else percent(value)


def _ranged(share: Estimate) -> str:
    ends = "" if math.isnan(share.low) else f" ({100 * share.low:.0f} to {100 * share.high:.0f})"
    return percent(share.estimate) + ends


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


def _drawn(results: Part, name: str) -> Sequence[str]:
    label = f"Wanted answers against other answers lost, {arena_name(results)}"
    return draw(name, label, [_panel(results, toward) for toward in Toward])


def _panel(results: Part, toward: str) -> Panel:
    """Wanted answers against answers lost: a disc for one pass, a square for two, a triangle for other weights.

    Exact answers with their intervals, or where none was written those that begin so.
    """
    shown = "exact" if results.unsteered[toward].exact.known else "wanted"

    def plot() -> Figure:
        figure, ax = canvas(330)
        ax.set_title(TITLES[toward], color=COLOUR[toward])
        places = []
        for name, found in _methods(results, toward):
            passes, other_weights = _cost(results, name)
            marker = "^" if other_weights else "s" if passes > 1 else "o"
            x, y, colour = 100 * found.lost, 100 * found[shown].estimate, INK if name == UNSTEERED else COLOUR[toward]
            ax.plot([x, x], [100 * found[shown].low, 100 * found[shown].high], color=colour, linewidth=1, alpha=0.35)
            ax.plot(x, y, marker, color=colour, markersize=7, alpha=0.85)
            places.append((x, y, name))
        _named(ax, places)
        for marker, words in (("o", "one pass"), ("s", "two passes"), ("^", "other weights")):
            ax.plot([], [], marker, color=MUTED, markersize=6, label=words)
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=10, labelcolor=MUTED)
        ax.axhline(100 * results.unsteered[toward][shown].estimate, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
        right = max([place[0] for place in places if not math.isnan(place[0])], default=0.0)
        ax.set(
            xlabel="other answers lost, %",
            ylabel=f"{shown} answers, %",
            ylim=(-3, 103),
            xlim=(-2, max(20.0, right + 14)),
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
