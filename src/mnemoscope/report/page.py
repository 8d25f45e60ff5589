"""What pages are made of: chapters, each with its answer, its exhibits and its tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from mnemoscope.report.drawing import Panel, draw
from mnemoscope.report.records import Cell, Run, declared
from mnemoscope.report.rows import Part
from mnemoscope.report.words import ANSWERED, count, ranged
from mnemoscope.runs.processes import Map, in_order
from mnemoscope.statistics import Estimate


@dataclass(frozen=True)
class View:
    """What a story is of: one task, its cells, and how alike its seeds are."""

    task: Part
    cells: Sequence[Cell]
    seeds: list[Part]


@dataclass(frozen=True)
class Answer:
    """The question of a chapter, answered."""

    anchor: str  # the end of the chapter's identifier
    question: str
    verdict: str  # a title that one can scan
    number: str = ""  # what stands first under the title
    sentence: str = ""  # what the number is of
    note: str = ""  # the caveat: its interval, and what else should be known beside it
    share: Estimate | None = None  # what the small scale shows
    mark: tuple[float, str] = (math.nan, "")  # a second share on the scale, and what it is
    others: Sequence[Answer] = ()  # to the same question, such as of the other direction; without a title


@dataclass(frozen=True)
class Table:
    """A table of numbers; the first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Exhibit:
    """One figure; left out where there is nothing to draw. Its title and caption are those of the story's YAML."""

    anchor: str  # the name of its caption, and the end of the figure's identifier
    panels: Sequence[Panel]
    sentences: Sequence[str] = ()  # computed, where a verdict is needed; empty ones are left out
    table: Table | None = None  # numbers that belong right below it
    folded: bool = False  # shown on demand
    drawn: tuple[str, ...] = ()  # SVG of the panels, once the page is made


@dataclass(frozen=True)
class Chapter:
    """One story, for one task."""

    answer: Answer
    exhibits: Sequence[Exhibit] = ()
    tables: Sequence[Table] = ()  # shown on demand
    example: Any = None
    pairs: Sequence[Any] = ()  # of phrasings
    written: Sequence[Any] = ()  # under steering
    telling: str = ""  # a sentence above that


TOO_FEW = "Too few groups to tell"  # instead of a verdict
TINTS = (
    ("memorized", r"remember(?:ed|ing|s)?|(?:from|to|follows?) memory"),
    ("generalized", r"work(?:ed|ing|s)?(?: it)? out|(?:from|to|follows?)(?: the)? context"),
)
# (text, what it is): "" plain, "moved" differs between two phrasings, "clue" spells out the generalized answer.
Pieces = list[tuple[str, str]]
Stories = Sequence[Callable[[View], Chapter | None]]


def not_measured(anchor: str, question: str, task: Part) -> Answer:
    """The answer where there is none, with the reason: what pairs were lacking."""
    pairs, why = task.pairs, "The records hold no rows for it."
    if not pairs.by_split["all"].pairs:
        candidates = count(pairs.by_split["all"].candidates, "candidate")
        why = f"None of {candidates} flipped, so there are no pairs to compare."
    elif not pairs.by_split["fit"].pairs:
        why = "No candidate of the fit split flipped, so there was nothing to learn from."
    elif not pairs.pairs:
        why = f"None of the {count(pairs.candidates, 'test candidate')} flipped, so there is nothing to score on."
    return Answer(anchor, question, "Not measured", sentence=why)


def render(run: Run, results: Part, stories: Stories, across: Table | None, parallel: Map = in_order) -> str:
    """The text of ``report.html``: of each task the chapters of all stories, in parallel, then a table of all tasks."""
    asked = [
        (label, View(results.tasks[label], cells, results.seeds.get(label, [])), stories)
        for label, cells in run.by_label().items()
    ]
    return filled(
        "template.html",
        results=results,
        tasks=list(parallel(_task_page, asked)),
        across=across,
        configuration=run.study_text,
        manifest=run.manifest,
        captions=_captions(),
        glossary=declared("words.yaml")["words"].items(),
    )


def filled(template: str, **values: Any) -> str:
    """The text of a page from its template, whose style is that of the report."""
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=strict)
    environment.filters |= {"tint": tint, "ranged": ranged, "counted": count}
    environment.filters["place"] = lambda share: round(100 * float(np.clip(share, 0, 1)), 2)  # cut to the scale
    return environment.from_string(_text(template)).render(css=Markup(page_style()), **values)


def _text(name: str) -> str:
    return (files("mnemoscope.report") / name).read_text(encoding="utf-8")


def page_style() -> str:
    """The style sheet of the report, whose colours and type other pages share."""
    return _text("style.css")


@cache
def explained() -> dict[str, dict[str, Any]]:
    """By story what its YAML says: ``captions`` of its figures, what is in its ``results``, and their ``parts``."""
    names = sorted(path.name for path in (files("mnemoscope.report") / "stories").iterdir())
    return {name[:-5]: declared(f"stories/{name}") for name in names if name.endswith(".yaml")}


def _captions() -> dict[str, dict[str, str]]:
    return {anchor: caption for story in explained().values() for anchor, caption in story["captions"].items()}


def tint(text: str) -> Markup:
    """The text, escaped, with the words for the two behaviours in their colours."""
    safe = str(escape(text))
    for behaviour, words in TINTS:
        safe = re.sub(rf"\b({words})\b", rf'<span class="{behaviour}">\1</span>', safe)
    return Markup(safe)


def marked(text: str, kinds: dict[str, str]) -> Pieces:
    """The text with every place marked that spells out one of the answers, by its kind."""
    word = re.compile("(" + "|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in kinds) + ")")
    return [(part, kinds.get(part, "") if number % 2 else "") for number, part in enumerate(word.split(text)) if part]


def _task_page(asked: tuple[str, View, Stories]) -> dict[str, Any]:
    """All that the page shows of one task: compute its sentences and draw its figures."""
    label, view, stories = asked
    kind, known = str(view.cells[0].info["task"]), declared("words.yaml")["tasks"]
    title = known.get(kind, {}).get("title", label)
    title = title if label in (kind, title) else f"{title}: {label}"
    name = re.sub(r"[^\w-]+", "-", label)  # which only names places in the page
    chapters = [
        replace(chapter, exhibits=[_drawn(name, exhibit, view) for exhibit in chapter.exhibits if exhibit.panels])
        for story in stories
        if (chapter := story(view))
    ]
    intro = known.get(kind, known["own"])["text"]
    facts = {"name": name, "label": label, "title": title, "intro": intro, "answered": ANSWERED[view.task.documents]}
    return facts | {"info": view.cells[0].info, "chapters": chapters}


def _drawn(name: str, exhibit: Exhibit, view: View) -> Exhibit:
    caption = _captions()[exhibit.anchor]
    label = f"{caption['title']}. {next(filter(None, exhibit.sentences), caption['note'])}"
    made = draw(f"{name}-{exhibit.anchor}", label, exhibit.panels, view.task.documents)
    # Panels are functions, which do not travel between processes.
    return replace(exhibit, panels=(), drawn=made)
