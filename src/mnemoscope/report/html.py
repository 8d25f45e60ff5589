"""``report.html``: one self-contained page, from the records and the numbers of ``results.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mnemoscope.processes import Map, in_order
from mnemoscope.report import (
    captions,
    captions_detection,
    captions_detector,
    chapters,
    examples,
    figures_detection,
    sentences,
)
from mnemoscope.report.glossary import GLOSSARY, TASKS
from mnemoscope.report.intervals import Tree
from mnemoscope.report.page import Story, TaskPage, panels
from mnemoscope.report.records import Cell, Run


def render(run: Run, results: Tree, parallel: Map = in_order) -> str:
    """The text of ``report.html``."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tint"] = tint
    environment.globals["percent"] = _place
    folder = files("mnemoscope.report")
    template = environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
    drawn = [
        (name, results["tasks"][name], cells, results["seeds"].get(name, [])) for name, cells in run.by_label().items()
    ]
    return template.render(
        study=results["study"],
        tasks=list(parallel(_task_page, drawn)),
        summary=_summary(results),
        failed=list(run.failed.values()),
        transfer=_transfer(results["transfer"]),
        css=Markup(page_style()),
        configuration=run.study_text,
        versions=_versions(run.manifest),
        glossary=GLOSSARY,
    )


def page_style() -> str:
    """The style sheet of the report, whose colours and type other pages share."""
    return (files("mnemoscope.report") / "style.css").read_text(encoding="utf-8")


def _place(share: float) -> float:
    """Where a share stands on a scale from 0 to 100, cut to its ends."""
    return round(100 * min(1.0, max(0.0, share)), 2)


TINTS = (
    ("memorized", r"remember(?:ed|ing|s)?|from memory"),
    ("generalized", r"work(?:ed|ing|s)?(?: it)? out"),
)


def tint(text: str) -> Markup:
    """The text, escaped, with the words for the two behaviours in their colours."""
    safe = str(escape(text))
    for behaviour, words in TINTS:
        safe = re.sub(rf"\b({words})\b", rf'<span class="{behaviour}">\1</span>', safe)
    return Markup(safe)


def _task_page(asked: tuple[str, Tree, Sequence[Cell], list[dict[str, Any]]]) -> TaskPage:
    """All sentences and figures of one task.

    Args:
        asked: its name, results and cells, and the rows of ``results["seeds"]`` for it.
    """
    name, task, cells, seeds = asked
    title, intro = TASKS.get(cells[0].task, (name, TASKS[""][1]))
    if name != cells[0].task and title != name:
        title = f"{title}: {name}"
    example = examples.one_conflict(cells)
    name = re.sub(r"[^\w-]+", "-", name)  # from here on it only names places in the page
    return TaskPage(
        name=name,
        title=title,
        intro=intro,
        facts=_facts(task, cells),
        answers=sentences.answers(task),
        example=example,
        reversed_sums=examples.reversed_sum(example) if example else "",
        pairs=examples.some_pairs(cells),
        pairs_sentence=captions.pairs(task),
        written=examples.written(cells),
        written_sentence=captions_detector.written(cells),
        chapters=[
            chapters.behaviour(name, task, cells),
            chapters.differ(name, task, cells, seeds),
            chapters.read(name, task),
            chapters.turn(name, task, cells),
        ],
    )


def _facts(task: Tree, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    info = cells[0].info
    facts = [
        ("model", f"{info.get('layers', '?')} layers of {info.get('width', '?')} neurons"),
        ("seeds", str(len(cells))),
    ]
    if "weights" in task:
        facts.append(("weights", task["weights"]))
    if all(cell.training is not None for cell in cells):
        # Seconds differ between equal runs; they are in results.json.
        steps = sentences.listed([f"{steps:,.0f}" for steps in sorted(set(task["training"]["steps"]))])
        facts.append(("training", f"{steps} steps"))
    facts.append(("conflicts", f"{task['behaviour']['conflict']['memorized']['n']:,}"))
    facts.append(("pairs", f"{task['pairs']['by_split']['all']['pairs']:,}"))
    return facts


def _transfer(matrix: Tree) -> Story | None:
    if not matrix:
        return None
    return panels(
        "transfer",
        "Does it carry over?",
        captions_detection.transfer(matrix),
        "Rows: the task whose pairs it was learned on. Columns: the task it is tried on, by the same model. In "
        "brackets: Gaussian shifts of the same norm; for the probe, chance.",
        figures_detection.transfer(matrix),
    )


def _summary(results: Tree) -> str:
    tasks = results["tasks"].values()
    models = sum(len(task["seeds"]) for task in tasks)
    conflicts = sum(task["behaviour"]["conflict"]["memorized"]["n"] for task in tasks)
    pairs = sum(task["pairs"]["by_split"]["all"]["pairs"] for task in tasks)
    count = sentences.count
    parts = [count(len(tasks), "task"), count(models, "model"), count(conflicts, "test conflict"), count(pairs, "pair")]
    return sentences.listed(parts)


def _versions(manifest: Tree) -> list[tuple[str, str]]:
    """What the run was made with, as (name, value); times stay out, so that equal runs give equal pages."""
    rows = [(name, manifest[name]) for name in ("mnemoscope", "commit", "python") if manifest.get(name)]
    if manifest.get("dirty"):
        rows.append(("changed since that commit", "yes"))
    rows += [*manifest.get("versions", {}).items(), *manifest.get("machine", {}).items()]
    return [(str(name), str(value)) for name, value in rows]
