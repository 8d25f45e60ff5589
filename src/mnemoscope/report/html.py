"""``report.html``: one self-contained page, from the records and the numbers of ``results.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup, escape

from mnemoscope.report import captions, examples, figures, figures_steering, sentences
from mnemoscope.report.glossary import GLOSSARY, TASKS
from mnemoscope.report.intervals import Tree
from mnemoscope.report.records import AIMS, DIRECTIONS, Cell, Run
from mnemoscope.report.style import Drawing, draw


@dataclass(frozen=True)
class Story:
    """One figure of the page with what it shows.

    Attributes:
        kicker: the subject, as a heading.
        sentences: computed; the first is set large.
        note: how to read the figure.
        drawing: None where there is nothing to draw.
    """

    anchor: str
    kicker: str
    sentences: list[str]
    note: str
    drawing: Drawing | None


@dataclass(frozen=True)
class Chapter:
    """One of the questions, for one task."""

    anchor: str
    title: str
    stories: list[Story]


@dataclass(frozen=True)
class Table:
    """A table of numbers; the first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


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
    chapters: list[Chapter]
    tables: list[Table]
    methods: Table
    methods_says: list[str]
    collateral: Table
    notes: list[str]


def render(run: Run, results: Tree) -> str:
    """The text of ``report.html``."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tint"] = tint
    environment.globals["percent"] = _place
    folder = files("mnemoscope.report")
    template = environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
    tasks = [task_page(name, results["tasks"][name], cells) for name, cells in run.by_label().items()]
    return template.render(
        study=results["study"],
        tasks=tasks,
        summary=_summary(results),
        css=Markup((folder / "style.css").read_text(encoding="utf-8")),
        configuration=run.study_text,
        versions=_versions(run.manifest),
        glossary=GLOSSARY,
    )


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


def task_page(name: str, task: Tree, cells: Sequence[Cell]) -> TaskPage:
    """Compute all sentences and draw all figures of one task."""
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
        chapters=[
            _behaviour(name, task, cells),
            _differ(name, task, cells),
            _read(name, task),
            _turn(name, task, cells),
        ],
        tables=[_steering_table(task)],
        methods=_method_table(task),
        methods_says=[text for d in DIRECTIONS if (text := captions.methods(task, d))],
        collateral=_collateral_table(task),
        notes=_notes(task, cells),
    )


def _story(anchor: str, kicker: str, text: list[str], note: str, plot: figures.Plot | None) -> Story:
    drawing = draw(anchor, f"{kicker}. {text[0]}", plot) if plot else None
    return Story(anchor, kicker, text, note, drawing)


def _behaviour(name: str, task: Tree, cells: Sequence[Cell]) -> Chapter:
    curve = figures.emergence(cells) if any(cell.training is not None for cell in cells) else None
    note = "Tune split. Solid: conflicts. Dashed: questions without a conflict."
    if len(cells) > 1:
        note += " Faint: the other seeds."
    stories = [
        _story(f"{name}-emergence", "How it came about", [captions.emergence(cells)], note, curve),
        _story(
            f"{name}-behaviour",
            "What it answers",
            [captions.behaviour(task)],
            "Test split, no intervention.",
            figures.behaviour_bars(task["behaviour"]),
        ),
        _story(
            f"{name}-margins",
            "How sure it is",
            [captions.margins(cells)],
            "Right of 0 the answer to be worked out is the likelier of the two. Colour: what it answered. The ends "
            "hold everything beyond.",
            figures.margins(cells),
        ),
    ]
    return Chapter(f"{name}-does", "What does the model do?", stories)


def _differ(name: str, task: Tree, cells: Sequence[Cell]) -> Chapter:
    contrast, measured = cells[0].contrast, sentences.argmax(task["contrast"]["mean_abs_nmd"]) is not None
    seed = f" Seed {cells[0].seed} is drawn; the sentence averages all seeds." if len(cells) > 1 else ""
    stories = [
        _story(
            f"{name}-nmd",
            "Neuron by neuron",
            [captions.heatmap(task)],
            "NMD: mean state when working it out minus mean state when remembering. One strip per layer, neurons "
            f"sorted.{seed}",
            figures.heatmap(contrast) if measured else None,
        ),
        _story(
            f"{name}-rho",
            "How strong one neuron is",
            [captions.correlations(contrast, task)],
            "|rho|: correlation of a neuron's activity with the behaviour, over the pairs of the fit split.",
            figures.correlations(contrast) if measured else None,
        ),
    ]
    return Chapter(f"{name}-differ", "Do they differ?", stories if measured else stories[:1])


def _read(name: str, task: Tree) -> Chapter:
    measured = sentences.argmax([entry["estimate"] for entry in task["probe"]["accuracy"]]) is not None
    note = (
        "A linear probe per layer, learned on the fit split, scored on the test split. Grey band: a probe that "
        "sees only the input. Bars: 95\u00a0% intervals."
    )
    plot = figures.probes(task["probe"]) if measured else None
    return Chapter(
        f"{name}-read",
        "Can it be read?",
        [_story(f"{name}-probe", "Layer by layer", [captions.probe(task)], note, plot)],
    )


def _turn(name: str, task: Tree, cells: Sequence[Cell]) -> Chapter:
    measured = any(sentences.known(task["steering"][d][examples_]["shift"]) for d in DIRECTIONS for examples_ in AIMS)
    stories = [
        _story(
            f"{name}-steering",
            "The switch and its controls",
            [captions.turning(task, d) for d in DIRECTIONS],
            "Strong colour: turned. Grey: neither answer. Pale: unmoved. Line: 95\u00a0% interval of the turned "
            "share. Controls have the same norm; the mean of all their draws is shown."
            + (" Dots: single seeds." if len(task["seeds"]) > 1 else ""),
            figures_steering.steering_bars(task) if measured else None,
        ),
    ]
    return Chapter(f"{name}-turn", "Can it be turned?", stories)


def _facts(task: Tree, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    info = cells[0].info
    facts = [
        ("model", f"{info.get('layers', '?')} layers of {info.get('width', '?')} neurons"),
        ("seeds", str(len(cells))),
    ]
    if all(cell.training is not None for cell in cells):
        # Seconds differ between equal runs; they are in results.json.
        steps = sentences.listed([f"{steps:,.0f}" for steps in sorted(set(task["training"]["steps"]))])
        facts.append(("training", f"{steps} steps"))
    facts.append(("conflicts", f"{task['behaviour']['conflict']['memorized']['n']:,}"))
    facts.append(("pairs", f"{task['pairs']['by_split']['all']['pairs']:,}"))
    return facts


def _notes(task: Tree, cells: Sequence[Cell]) -> list[str]:
    notes = [captions.collateral(task, direction) for direction in DIRECTIONS]
    if task["memory_is_conflict"]:
        notes.append(
            "Damage to facts to recall is left out for this task: its memory examples are the conflicts "
            "themselves, and turning them is the aim."
        )
    return notes


def _steering_table(task: Tree) -> Table:
    rows = []
    for direction in DIRECTIONS:
        block = task["steering"][direction]
        for examples_ in AIMS:
            for control in ("", *block["controls"]):
                shares = (block["controls"][control] if control else block)[examples_]
                who = figures_steering.control_name(control) if control else "vector"
                what = f"{sentences.TOWARDS[direction]}, {figures_steering.EXAMPLES[examples_].lower()}: {who}"
                numbers = [sentences.with_interval(shares[key]) for key in ("shift", "stay", "other")]
                worst = (
                    sentences.percent(block["controls"][control]["worst"][examples_]["shift"]["estimate"])
                    if control
                    else ""
                )
                rows.append([what[0].upper() + what[1:], *numbers, worst, f"{shares['shift']['n']:,}"])
    return Table("Steering, test split", ["", "turned", "unmoved", "neither", "worst draw turns", "answers"], rows)


def _collateral_table(task: Tree) -> Table:
    rows = []
    for direction in DIRECTIONS:
        for key, change in task["steering"][direction]["collateral"].items():
            what = f"{sentences.TOWARDS[direction]}: {captions.NAMES.get(key, key)}".capitalize()
            if sentences.known(change):
                text = sentences.points(change["estimate"], sign=True)
                rows.append([what, text, sentences.points_interval(change), f"{change['n']:,}"])
            else:
                rows.append([what, "not measured", "", "0"])
    return Table("Collateral: change in accuracy, test split", ["", "change", "95\u00a0% interval", "N"], rows)


def _method_table(task: Tree) -> Table:
    rows = []
    for method, block in task["steering_by_method"].items():
        for direction in DIRECTIONS:
            if direction in block:
                part = block[direction]
                chosen = part["chosen"]
                best = " (chosen)" if task["steering"][direction]["chosen"]["method"] == method else ""
                setting = f"{chosen['strength']:g} on {100 * chosen['top']:g}\u00a0%"
                pairs, conflicts = (sentences.with_interval(part[examples_]["shift"]) for examples_ in AIMS)
                control = sentences.strongest_control(part)
                theirs = part["controls"][control]["pairs"]["shift"]["estimate"] if control else float("nan")
                held = sentences.percent(theirs) if sentences.known(theirs) else "none"
                rows.append([f"{method}, {sentences.TOWARDS[direction]}{best}", setting, pairs, held, conflicts])
    head = ["", "strength", "pairs turned", "by its control", "conflicts turned"]
    return Table("Ways of turning, test split", head, rows)


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
