"""What the page is made of: chapters, each with its answer, its exhibits and its tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape

from mnemoscope.processes import Map, in_order
from mnemoscope.report.drawing import Panel, draw
from mnemoscope.report.records import Cell, Run
from mnemoscope.report.schema import Results, SeedsRow, TaskResults
from mnemoscope.report.words import count, ranged
from mnemoscope.statistics import Estimate


@dataclass(frozen=True)
class View:
    """What a story is of: one task, its cells, and how alike its seeds are."""

    task: TaskResults
    cells: Sequence[Cell]
    seeds: list[SeedsRow]


@dataclass(frozen=True)
class Answer:
    """The question of a chapter, answered.

    Attributes:
        anchor: the end of the chapter's identifier.
        verdict: a title that one can scan.
        number: as text; what stands first under the title.
        sentence: what the number is of.
        note: the caveat: its interval, and what else should be known beside it.
        share: what the small scale shows.
        mark: a second share on the scale, and what it is.
    """

    anchor: str
    question: str
    verdict: str
    number: str = ""
    sentence: str = ""
    note: str = ""
    share: Estimate | None = None
    mark: tuple[float, str] = (math.nan, "")


@dataclass(frozen=True)
class Table:
    """A table of numbers; the first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Exhibit:
    """One figure; left out where there is nothing to draw. Its title and caption are those of ``words.yaml``.

    Attributes:
        anchor: the name of its caption, and the end of the figure's identifier.
        sentences: computed, where a verdict is needed; empty ones are left out.
        table: numbers that belong right below it.
        folded: shown on demand.
    """

    anchor: str
    panels: Sequence[Panel]
    sentences: Sequence[str] = ()
    table: Table | None = None
    folded: bool = False


@dataclass(frozen=True)
class Chapter:
    """One story, for one task; ``tables`` are shown on demand. Beside figures the template shows an example,
    pairs of phrasings, and what is written under steering, below a sentence (``telling``).
    """

    answer: Answer
    exhibits: list[Exhibit] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    example: Any = None
    pairs: Sequence[Any] = ()
    written: Sequence[Any] = ()
    telling: str = ""


def not_measured(anchor: str, question: str, task: TaskResults) -> Answer:
    """The answer where there is none, with the reason: what pairs were lacking."""
    pairs = task.pairs
    if not pairs.by_split["all"].pairs:
        candidates = count(pairs.by_split["all"].candidates, "candidate")
        why = f"None of {candidates} flipped, so there are no pairs to compare."
    elif not pairs.by_split["fit"].pairs:
        why = "No candidate of the fit split flipped, so there was nothing to learn from."
    elif not pairs.pairs:
        why = f"None of the {count(pairs.candidates, 'test candidate')} flipped, so there is nothing to score on."
    else:
        why = "The records hold no rows for it."
    return Answer(anchor, question, "Not measured", sentence=why)


# --- the page ------------------------------------------------------------------------------------------------------

TINTS = (("memorized", r"remember(?:ed|ing|s)?|from memory"), ("generalized", r"work(?:ed|ing|s)?(?: it)? out"))


@dataclass(frozen=True)
class Figure:
    """An exhibit as the template shows it: with its caption, and its panels as SVG."""

    title: str
    note: str
    exhibit: Exhibit
    drawn: tuple[str, ...]


@dataclass(frozen=True)
class TaskPage:
    """All that the page shows of one task."""

    name: str
    label: str
    title: str
    intro: str
    info: dict[str, Any]
    chapters: list[tuple[Chapter, list[Figure]]]


Stories = Sequence[Callable[[View], Chapter | None]]


def render(run: Run, results: Results, stories: Stories, across: Table | None, parallel: Map = in_order) -> str:
    """The text of ``report.html``.

    Args:
        stories: what makes the chapters of a task, in their order.
        across: what is shown of all tasks together.
        parallel: where pages of tasks are drawn.
    """
    looks: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **looks)
    environment.filters |= {"tint": tint, "ranged": ranged}
    environment.filters["place"] = lambda share: round(100 * float(np.clip(share, 0, 1)), 2)  # cut to the scale
    template = environment.from_string((files("mnemoscope.report") / "template.html").read_text(encoding="utf-8"))
    asked = [
        (label, View(results.tasks[label], cells, results.seeds.get(label, [])), stories)
        for label, cells in run.by_label().items()
    ]
    return template.render(
        results=results,
        tasks=list(parallel(_task_page, asked)),
        across=across,
        css=Markup(page_style()),
        configuration=run.study_text,
        manifest=run.manifest,
        glossary=_fixed()["words"].items(),
    )


@cache
def _fixed() -> dict[str, Any]:
    return dict(yaml.safe_load((files("mnemoscope.report") / "words.yaml").read_text(encoding="utf-8")))


def page_style() -> str:
    """The style sheet of the report, whose colours and type other pages share."""
    return (files("mnemoscope.report") / "style.css").read_text(encoding="utf-8")


def tint(text: str) -> Markup:
    """The text, escaped, with the words for the two behaviours in their colours."""
    safe = str(escape(text))
    for behaviour, words in TINTS:
        safe = re.sub(rf"\b({words})\b", rf'<span class="{behaviour}">\1</span>', safe)
    return Markup(safe)


def _task_page(asked: tuple[str, View, Stories]) -> TaskPage:
    """Compute all sentences and draw all figures of one task."""
    label, view, stories = asked
    kind, known = str(view.cells[0].info["task"]), _fixed()["tasks"]
    title = known.get(kind, {}).get("title", label)
    if label not in (kind, title):
        title = f"{title}: {label}"
    name = re.sub(r"[^\w-]+", "-", label)  # which only names places in the page
    chapters = [chapter for story in stories if (chapter := story(view))]
    drawn = [(replace(chapter, exhibits=[]), _figures(name, chapter.exhibits)) for chapter in chapters]
    return TaskPage(name, label, title, known.get(kind, known["own"])["text"], view.cells[0].info, drawn)


def _figures(name: str, exhibits: Sequence[Exhibit]) -> list[Figure]:
    found = []
    for exhibit in (exhibit for exhibit in exhibits if exhibit.panels):
        caption = _fixed()["captions"][exhibit.anchor]
        label = f"{caption['title']}. {next(filter(None, exhibit.sentences), caption['note'])}"
        drawn = draw(f"{name}-{exhibit.anchor}", label, exhibit.panels)
        # Panels are functions, which do not travel between processes.
        found.append(Figure(caption["title"], caption["note"], replace(exhibit, panels=()), drawn))
    return found
