"""The chapters of a task: what the model does, whether the behaviours differ, can be read and can be turned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mnemoscope.report import (
    captions,
    captions_detection,
    captions_detector,
    captions_steering,
    figures,
    figures_detection,
    figures_detector,
    figures_effects,
    figures_methods,
    figures_steering,
    sentences,
    tables,
)
from mnemoscope.report.intervals import Tree
from mnemoscope.report.page import Chapter, Story, panels, story
from mnemoscope.report.records import AIMS, DIRECTIONS, Cell


def behaviour(name: str, task: Tree, cells: Sequence[Cell]) -> Chapter:
    """Training, answers and margins, without any intervention."""
    curve = figures.emergence(cells) if any(cell.training is not None for cell in cells) else None
    note = "Tune split. Solid: conflicts. Dashed: questions without a conflict."
    if len(cells) > 1:
        note += " Faint: the other seeds."
    stories = [
        story(f"{name}-emergence", "How it came about", [captions.emergence(cells)], note, curve),
        story(
            f"{name}-behaviour",
            "What it answers",
            [captions.behaviour(task)],
            "Test split, no intervention." + (f" Weights: {task['weights']}." if "weights" in task else ""),
            figures.behaviour_bars(task["behaviour"]),
        ),
        story(
            f"{name}-margins",
            "How sure it is",
            [captions.margins(cells)],
            "Right of 0 the answer to be worked out is the likelier of the two. Colour: what it answered. The ends "
            "hold everything beyond.",
            figures.margins(cells),
        ),
    ]
    return Chapter(f"{name}-does", "What does the model do?", stories)


def differ(name: str, task: Tree, cells: Sequence[Cell], seeds: list[dict[str, Any]]) -> Chapter:
    """Which neurons, how strongly, and whether another half of the pairs or another seed finds them again.

    Args:
        seeds: rows of ``results["seeds"]`` for this label.
    """
    contrast, measured = cells[0].contrast, sentences.argmax(task["contrast"]["mean_abs_nmd"]) is not None
    seed = f" Seed {cells[0].seed} is drawn; the sentence averages all seeds." if len(cells) > 1 else ""
    stories = [
        story(
            f"{name}-nmd",
            "Neuron by neuron",
            [captions.heatmap(task)],
            "NMD: mean state when working it out minus mean state when remembering. One strip per layer, neurons "
            f"sorted.{seed}",
            figures.heatmap(contrast) if measured else None,
        ),
        story(
            f"{name}-rho",
            "How strong one neuron is",
            [captions.correlations(contrast, task)],
            "|rho|: correlation of a neuron's activity with the behaviour, over the pairs of the fit split.",
            figures.correlations(contrast) if measured else None,
        ),
    ]
    again = panels(
        f"{name}-steady",
        "The same again?",
        captions_detection.steadiness(task, seeds),
        "Halves: the fit pairs cut in two, 20 times; bars span all of them. Tick: what chance gives. By layer: rank "
        "correlation of rho" + (" and, after rotation, cosine of NMD between seeds; band: chance." if seeds else "."),
        figures_detection.steadiness(task, seeds) if measured and figures_detection.overlaps(task, seeds) else [],
    )
    return Chapter(f"{name}-differ", "Do they differ?", [*stories, again] if measured else stories[:1])


def read(name: str, task: Tree) -> Chapter:
    """What a probe reads, beside all that it has to beat."""
    measured = sentences.argmax([entry["estimate"] for entry in task["probe"]["accuracy"]]) is not None
    note = (
        "A linear probe per layer, learned on the fit split, scored on the test split. Grey band: a probe that "
        "sees only the input. Bars: 95\u00a0% intervals."
    )
    plot = figures.probes(task["probe"]) if measured else None
    layers = story(f"{name}-probe", "Layer by layer", [captions_detection.probe(task)], note, plot)
    if not measured:
        return Chapter(f"{name}-read", "Can it be read?", [layers])
    rivals = panels(
        f"{name}-rivals",
        "What it has to beat",
        captions_detection.rivals(task),
        "Test states. Layer chosen on other test groups. Dotted: chance. How early: states of earlier tokens. From how "
        "many pairs: the band spans the draws.",
        figures_detection.reading(task),
    )
    found = [layers, rivals]
    if "detection" in task:
        found.append(_detector(name, task["detection"]))
    elif "no_detector" in task:
        why = f"No detector could be fitted: {task['no_detector']}."
        found.append(story(f"{name}-detector", "Before it answers", [why], "", None))
    return Chapter(f"{name}-read", "Can it be read?", found)


def _detector(name: str, detection: Tree) -> Story:
    return panels(
        f"{name}-detector",
        "Before it answers",
        captions_detector.detector(detection),
        "Test prompts, pairs or not. Dotted: chance, and perfect reliability. Bars: 95\u00a0% intervals.",
        figures_detector.detector(detection),
        tables.detection(detection),
    )


def turn(name: str, task: Tree, cells: Sequence[Cell]) -> Chapter:
    """Does it work, beside which control, at what cost; then how, and below the fold what a doubter would ask."""
    measured = any(sentences.known(task["steering"][d][aim]["shift"]) for d in DIRECTIONS for aim in AIMS)
    switch = story(
        f"{name}-steering",
        "The switch and its controls",
        [captions_steering.turning(task, d) for d in DIRECTIONS],
        "Strong colour: turned. Grey: neither answer. Pale: unmoved. Line: 95\u00a0% interval of the turned "
        "share; tick: the worst draw of a control. Controls have the same norm; the mean of all their draws is shown."
        + (" Dots: single seeds." if len(task["seeds"]) > 1 else ""),
        figures_steering.steering_bars(task) if measured else None,
    )
    if not measured:
        return Chapter(f"{name}-turn", "Can it be turned?", [switch], [], "", [tables.steering(task)])
    main = [
        switch,
        _methods(name, task),
        _elsewhere(name, task),
        _cost(name, task),
        _gated(name, task),
        _neutral(name, task.get("neutral", {})),
        _dose(name, task),
        _simpler(name, task),
        _depth(name, task),
    ]
    return Chapter(
        f"{name}-turn",
        "Can it be turned?",
        [entry for entry in main if entry.drawing],
        [entry for entry in _folded(name, task, cells) if entry.drawing],
        "What a doubter would ask: all settings, needed neurons, upper bounds, all numbers",
        [tables.steering(task), tables.collateral(task)],
    )


def _methods(name: str, task: Tree) -> Story:
    return panels(
        f"{name}-methods",
        "Which way of turning",
        [captions_steering.methods(task, d) for d in DIRECTIONS],
        "Share of test pairs turned. Each method beside five controls of its own norm, each the mean of its draws.",
        figures_methods.methods(task, "pairs"),
        tables.methods(task),
    )


def _elsewhere(name: str, task: Tree) -> Story:
    return panels(
        f"{name}-elsewhere",
        "The behaviour, or one way of asking",
        [captions_steering.elsewhere(task, d) for d in DIRECTIONS],
        "Share of test pairs turned by the chosen vector. Hollow: of what nothing was fitted or chosen on.",
        figures_methods.elsewhere(task),
    )


def _cost(name: str, task: Tree) -> Story:
    notes = [captions_steering.collateral(task, direction) for direction in DIRECTIONS]
    if task["memory_is_conflict"]:
        notes.append(
            "Towards working it out, damage to facts to recall is left out for this task: its memory examples are the "
            "conflicts themselves, and turning them is the aim."
        )
    note = "Change in accuracy on test examples that should stay as they are. Grey: not counted as damage."
    return panels(f"{name}-cost", "What else changes", notes, note, figures_methods.cost(task))


def _gated(name: str, task: Tree) -> Story:
    return panels(
        f"{name}-gated",
        "Only where it is needed",
        [captions_detector.gated(task, direction) for direction in DIRECTIONS],
        "The chosen vector by itself (hollow) and behind a gate, which lets it act only where the detector expects the "
        "other behaviour in a conflict like those it knows. In points.",
        figures_detector.gated(task),
    )


def _neutral(name: str, found: Tree) -> Story:
    return panels(
        f"{name}-neutral",
        "Where nothing is asked",
        [captions_detector.neutral(found, direction) for direction in DIRECTIONS],
        "Kullback-Leibler divergence from the unsteered model, on text that it wrote itself, from a random token on.",
        figures_detector.neutral(found),
    )


def _dose(name: str, task: Tree) -> Story:
    return panels(
        f"{name}-dose",
        "A switch or a dial",
        [captions_steering.dose(task, d) for d in DIRECTIONS],
        "Test pairs under multiples of the chosen shift; below 0 it points the other way. Black: the paper's method, "
        "where another was chosen. Grey: Gaussian shifts of the same norm.",
        figures_effects.dose(task) if task["dose"] else [],
    )


def _simpler(name: str, task: Tree) -> Story:
    return panels(
        f"{name}-simpler",
        "Beside simpler ways",
        [captions_steering.simpler(task, d) for d in DIRECTIONS],
        "Share of test pairs turned. The same push to all: the vector's mean effect on the margin, added to every pair "
        "whatever it asks. Whole state put in: the other phrasing's state at the best layer and site, an upper bound.",
        figures_methods.simpler(task),
    )


def _depth(name: str, task: Tree) -> Story:
    found = [task["by_layer"]["shift"][direction] for direction in DIRECTIONS]
    tried = any(entry["methods"] for entry in found)
    return panels(
        f"{name}-depth",
        "Where it shows, where it acts",
        [captions_steering.depth(task, d) for d in DIRECTIONS],
        "Above: how far the states differ in a layer. Below: tune pairs turned by a shift of that layer alone, all at "
        "one strength, each method at its best site. Dashed: test pairs turned by the other phrasing's whole state of "
        "that layer.",
        figures_effects.depth(task) if tried or task["patch"].get("to_generalized") else [],
    )


def _folded(name: str, task: Tree, cells: Sequence[Cell]) -> list[Story]:
    return [
        panels(
            f"{name}-methods-conflict",
            "Which way of turning, on any conflict",
            [
                "Conflicts as they are drawn, pairs among them: most lie further from the tipping point and take a "
                "larger norm, chosen apart."
            ],
            "Share of test conflicts turned, beside controls of the same norm.",
            figures_methods.methods(task, "conflict"),
        ),
        panels(
            f"{name}-sweep",
            "How hard to push",
            [captions_steering.sweep(task, d) for d in DIRECTIONS],
            "Tune split, in per cent. Down: share of neurons. Across: strength. Turned, answers that are neither, and "
            "the larger loss among facts to recall and new questions. Above each row: site and layers. Frame: chosen"
            + (f" (seed {cells[0].seed})." if len(cells) > 1 else "."),
            figures_effects.sweep(task),
        ),
        panels(
            f"{name}-ablation",
            "Are its neurons needed",
            [captions_steering.ablation(task, d) for d in DIRECTIONS],
            "Separation: mean margin of the sides worked out minus that of the sides remembered. Grey: "
            "as many random neurons in each layer.",
            figures_effects.ablation(task),
        ),
        panels(
            f"{name}-patch",
            "The most that one place can do",
            [captions_steering.patches(task, d) for d in DIRECTIONS],
            "Share of test pairs turned when one layer's state at the decision is replaced by the other phrasing's.",
            figures_effects.patches(task),
        ),
    ]
