"""The story of an audit: which items of a benchmark were recited, which solved, and what that does to the score."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mnemoscope.report.drawing import COLOUR, FINE, INK, MUTED, RULE, Panel, canvas, draw
from mnemoscope.report.page import Table, filled
from mnemoscope.report.rows import Part, parts_of
from mnemoscope.report.words import count, p_value, percent, ranged
from mnemoscope.runs.digests import intact
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.strict import read_json

TITLE, MOST = "Recited or solved?", 12  # items whose replies are shown
LEAD = """An item is asked as it was published, and in fresh variants whose right answers are known. Who answers a
variant with the original's answer recited it; who gives the variant's own answer solved it. A text that costs the
model much less than its variants was read before."""
COLOURS = {"recited": COLOUR["memorized"], "solved": COLOUR["generalized"], "neither": INK, "cannot tell": MUTED}


def build_audit(run: Path, rows: pd.DataFrame) -> Path:
    """Write ``audit.html`` from ``audit/results.json`` and the rows of all replies; returns its path."""
    results: Part = parts_of(read_json(intact(run / "audit" / "results.json"), dict))
    panels = (_marks(results), _score(results))
    article = {
        "name": results.model,
        "facts": _facts(results),
        "sentences": _sentences(results),
        "drawn": draw("audit", "Items by verdict, and the score", panels),
        "tables": [_items(results), *_replies(results, rows)],
    }
    about = {"brand": "audit", "title": TITLE, "lead": LEAD, "models": [], "across": []}
    return write_atomically(run / "audit.html", filled("tables.html", **about, articles=[article]).encode())


def _facts(results: Part) -> str:
    asked, beside = results.asked, f", costs against {results.against}" if "against" in results else ""
    kind = {"number": "the last number", "choice": "the last letter", "short": "the first phrase"}[asked.kind]
    return (
        f"{count(results['items'], 'item')} with {count(results.variants, 'variant')}, "
        f"weights in {results.dtype}{beside}. "
        f"The answer of a reply is {kind}; replies have at most {asked.tokens} tokens."
    )


def _sentences(results: Part) -> list[str]:
    """What the whole benchmark shows, and how sure an accusation is."""
    counts, few = results.verdicts, results.few_variants
    told = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    lines = [
        f"{told}. Right are {ranged(results.originals)} of originals and {ranged(results.fresh)} of fresh variants: "
        f"originals minus variants, by item, {_points(results.inflation)}.",
    ]
    if results.accused:
        left = ranged(results.without_recited)
        lines.append(f"Where recited items count as their variants do, {left} of the score are left.")
    else:
        lines.append("Nothing is accused: clean as far as these variants show.")
    share = percent(results.accused_at)
    lines.append(
        f"An item is accused where as little would be seen of {share} of clean ones; of {results['items']} clean items "
        f"{results.by_chance:.1f} would be accused by chance. That holds where originals are drawn as variants are: an "
        "original with rounder numbers or commoner names is likelier to any model."
    )
    if "proof" in results and "left_out" not in results.proof:
        proof = {name: ranged(share) for name, share in results.proof.items()}
        lines.append(
            f"Steered away from memory, {proof['shift_recited']} of recited originals and {proof['shift_solved']} of "
            f"solved variants lose their answers; by random shifts of the same norm {proof['control_recited']} and "
            f"{proof['control_solved']}. That is evidence for the group, not for an item."
        )
    if results.cut:
        lines.append(f"Of the replies {percent(results.cut)} were cut before they stated an answer.")
    return [*lines, *([f"{count(few, 'item')} have too few variants to tell."] if few else [])]


def _points(found: Part) -> str:
    return f"{100 * found.estimate:+.0f} points ({100 * found.low:.0f} to {100 * found.high:.0f})"


def _items(results: Part) -> Table:
    rows = [
        [
            *(row["item"], row.verdict, "yes" if row.right else "no", f"{row.solved} of {row.variants}"),
            *(f"{row.recited} of {row.variants}", f"{row.sooner:+.1f}", p_value(row.p_recited), p_value(row.p_sooner)),
        ]
        for row in sorted(results.table, key=lambda row: -row.score)
    ]
    columns = ["item", "verdict", "original right", "variants solved", "answered as the original"]
    columns += ["spreads that the original costs less", "p of answers", "p of cost"]
    return Table("Items, the most suspicious first", columns, rows)


def _replies(results: Part, rows: pd.DataFrame) -> list[Table]:
    """Of items that are accused the end of each reply."""
    shown = []
    for item in results.accused[:MOST]:
        part = rows[rows["item"] == item]
        lines = [
            [
                *("original" if row.place == 0 else f"variant {row.place}", row.prompt, str(row.answer)),
                *(str(row.found if row.found is not None else "-"), row.label, row.reply[-80:]),
            ]
            for row in part.itertuples()
        ]
        columns = ["", "asked", "right", "answered", "so", "end of the reply"]
        shown.append(Table(f"{item}: what was answered", columns, lines))
    return shown


def _marks(results: Part) -> Panel:
    """Each item a mark: full where the original was right."""

    def plot() -> Figure:
        figure, ax = canvas(330)
        ax.set_title("Items")
        for verdict, colour in COLOURS.items():
            of = [row for row in results.table if row.verdict == verdict]
            for right, face in ((True, colour), (False, "none")):
                chosen = [row for row in of if row.right == right]
                x, y = [100 * row.solved_share for row in chosen], [row.sooner for row in chosen]
                ax.scatter(x, y, s=36, facecolors=face, edgecolors=colour, linewidths=1.4, alpha=0.85)
            if of:
                ax.scatter([], [], s=36, color=colour, label=f"{verdict} ({len(of)})")
        ax.axhline(0, color=MUTED, linewidth=1, linestyle=FINE, zorder=0)
        ax.set(xlabel="variants solved, %", ylabel="spreads that the original costs less", xlim=(-6, 106))
        ax.spines["left"].set_color(RULE)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=10, labelcolor=MUTED)
        return figure

    return plot


def _score(results: Part) -> Panel:
    """The score as it is, with variants in the place of what was recited, and on variants alone."""
    shares = {"originals": results.originals, "recited by variants": results.without_recited, "fresh": results.fresh}

    def plot() -> Figure:
        figure, ax = canvas(330)
        ax.set_title("Right answers")
        for place, one in enumerate(reversed(shares.values())):
            ax.barh(place, 100 * one.estimate, height=0.5, color=MUTED, alpha=0.55)
            ax.plot([100 * one.low, 100 * one.high], [place, place], color=INK, linewidth=1.4)
        ax.set(xlabel="%", xlim=(0, 100), yticks=range(len(shares)), yticklabels=list(reversed(shares)))
        return figure

    return plot
