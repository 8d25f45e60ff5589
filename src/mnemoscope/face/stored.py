"""What runs hold of fits: the files of levers and detectors, by cell and direction."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mnemoscope.behaviour import Prompting
from mnemoscope.interventions import (
    Binding,
    Intervention,
    SteeringVector,
    Toward,
    best_paths,
    chosen_paths,
    load_intervention,
)
from mnemoscope.interventions.artefact import tensors_file
from mnemoscope.interventions.detect import Detector
from mnemoscope.runs.digests import check_closed, chosen_cells, in_cells, intact, is_there
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.schemas import CellFacts
from mnemoscope.runs.strict import read_json, read_text

if TYPE_CHECKING:
    from mnemoscope.auditing.origins import Reader

_TOLD: set[str] = set()  # warnings that were given


def vector_file(source: Path, toward: str | None) -> Path:
    """The file of the best vector of a run with one cell, or of a cell, that steers to a behaviour.

    Raises:
        InputError: it has no vectors, several cells, or no such vector; or ``toward`` is no behaviour.
    """
    check_closed(source)
    cells = chosen_cells(source)
    if len(cells) > 1:
        raise InputError(f"FILE: {source} has several cells; name one of {', '.join(map(str, cells))}")
    found = best_paths(cells[0]).get(Toward.of(toward).direction)
    if found is None:
        raise InputError(f"toward: {source} has no vector to {toward}")
    return found


def artefacts_of(
    source: Path, found: Binding
) -> tuple[dict[Toward, dict[str, Intervention]], Detector | None, Detector | None]:
    """The levers and detectors of a file, a cell or a run; of a lever with several methods the best one."""
    if (source := tensors_file(source)).is_file():
        described = source.with_suffix(".json")
        if described.is_file() and '"toward"' in read_text(described):
            one = load_intervention(source)
            return {one.toward: {one.lever: one}}, None, None
        return {}, Detector.load(source), None
    check_closed(source)
    cell = cell_of(source, found)
    others = (intact(path) for path in chosen_paths(cell).values())
    best = [*best_paths(cell, levers=True).values(), *best_paths(cell).values()]
    levers: dict[Toward, dict[str, Intervention]] = {}
    for path in dict.fromkeys([*best, *others]):
        one = load_intervention(path)
        levers.setdefault(one.toward, {}).setdefault(one.lever, one)
    paths = [cell / f"{name}.safetensors" for name in ("detector", "detector_below")]
    detector, lower = (Detector.load(intact(path)) if is_there(path) else None for path in paths)
    return levers, detector, lower


def reader_of(source: Path) -> tuple[Reader | None, bool]:
    """The reader of answers in a folder, or in a file, and whether nothing else is there."""
    path = source / "reader.safetensors" if source.is_dir() else source
    described = path.with_suffix(".json")
    if not (path.is_file() and described.is_file() and '"whole_form"' in read_text(described)):
        return None, False
    from mnemoscope.auditing.origins import Reader  # most runs have none

    return Reader.load(path), source.is_file() or not in_cells(source, "records/chosen.json")


def vectors_of(levers: Mapping[Toward, Mapping[str, Intervention]]) -> dict[Toward, SteeringVector]:
    """The first vector of each direction."""
    every = ((toward, one) for toward, named in levers.items() for one in reversed(list(named.values())))
    return {toward: one for toward, one in every if isinstance(one, SteeringVector)}


def cell_of(source: Path, found: Binding) -> Path:
    """The only cell of a run (or the cell itself), or the one whose vectors were fitted on this model."""
    cells = chosen_cells(source)
    if len(cells) == 1:
        return cells[0]
    bound = ((cell, read_json(intact(cell / "cell.json"), CellFacts).get("binding")) for cell in cells)
    with refusing(f"binding: {source} cannot be read"):
        fitting = [cell for cell, facts in bound if facts and Binding(**facts).has_weights_of(found)]
    if len(fitting) > 1:
        names = ", ".join(map(str, fitting))
        raise InputError(f"from: several cells of the run were fitted on this model; name one of {names}")
    if not fitting:
        raise InputError(f"weights: no cell of {source} was fitted on this model, which has {found.weights}")
    return fitting[0]


def agreed(stored: Prompting, asked: Prompting | None) -> Prompting:
    """The format of prompts, which must be that of the fit."""
    if asked is None:
        return stored
    if asked.chat != stored.chat:
        how = "by the chat template" if stored.chat else "as they are"
        wrong = f"chat: {asked.chat}; allowed is {stored.chat}: it was fitted on prompts formatted {how}"
        raise InputError(f"{wrong}; {'add --chat' if stored.chat else 'leave --chat out'}, or fit again")
    if asked.system is not None and asked.system != stored.system:
        raise InputError(f"system: {asked.system!r}; this was fitted with {stored.system!r}")
    if stored.begun and not asked.begun:
        raise InputError("reply: this was fitted where the beginning of the reply was given; give it (reply, --reply)")
    return Prompting(stored.chat, stored.system, asked.reply, asked.split)


def warn_if_the_input_does(detector: Detector) -> None:
    """Warn, once for each detector, where it ranks test prompts no better than their tokens alone do."""
    if detector.as_good_as_the_input is None:
        return
    ours, beside = detector.as_good_as_the_input
    told = f"P(memorized) ranks test prompts {ours:.2f} right, the input alone {beside:.2f}"
    if told not in _TOLD:
        _TOLD.add(told)
        logging.getLogger("mnemoscope").warning("detector: %s; it may read no more than the wording", told)
