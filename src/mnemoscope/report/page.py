"""What the page is made of: stories (a figure with what it shows) in chapters, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mnemoscope.report import examples, figures, sentences
from mnemoscope.report.figures_parts import Panel
from mnemoscope.report.style import Drawing, draw, draw_panels


@dataclass(frozen=True)
class Table:
    """A table of numbers; the first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Story:
    """One figure of the page with what it shows.

    Attributes:
        kicker: the subject, as a heading.
        sentences: computed; the first is set large.
        note: how to read the figure.
        drawing: None where there is nothing to draw.
        table: numbers that belong right below the figure.
    """

    anchor: str
    kicker: str
    sentences: list[str]
    note: str
    drawing: Drawing | None
    table: Table | None = None


@dataclass(frozen=True)
class Chapter:
    """One of the questions, for one task: the main story, and below it what is shown on demand."""

    anchor: str
    title: str
    stories: list[Story]
    folded: list[Story] = field(default_factory=list)
    folded_title: str = ""
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class TaskPage:
    """All that the page says about one task."""

    name: str
    title: str
    intro: str
    facts: list[tuple[str, str]]
    answers: list[sentences.Answer]
    example: examples.Shown | None
    reversed_sums: str
    pairs: list[tuple[examples.Shown, examples.Shown]]
    pairs_sentence: str
    written: list[examples.Written]
    written_sentence: str
    chapters: list[Chapter]


def story(anchor: str, kicker: str, text: list[str], note: str, plot: figures.Plot | None) -> Story:
    """A story of one figure that has a wide and a narrow layout."""
    drawing = draw(anchor, f"{kicker}. {text[0]}", plot) if plot else None
    return Story(anchor, kicker, text, note, drawing)


def panels(
    anchor: str, kicker: str, text: list[str], note: str, plots: Sequence[Panel], table: Table | None = None
) -> Story:
    """A story of panels that stand side by side where there is room."""
    text = [sentence for sentence in text if sentence]
    drawing = draw_panels(anchor, f"{kicker}. {text[0] if text else note}", plots) if plots else None
    return Story(anchor, kicker, text, note, drawing, table)
