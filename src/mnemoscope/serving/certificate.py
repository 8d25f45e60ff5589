"""What was proven on an engine goes into the cards of the vectors and detectors it was proven with. Imports no vLLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mnemoscope.face.fitted import artefacts_of, cell_of
from mnemoscope.interventions import Artefact, Binding, Card, SteeringVector, best_paths
from mnemoscope.interventions.detect import Detector
from mnemoscope.runs.digests import intact, is_there, rewriting
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.locks import locked
from mnemoscope.serving.served import Proof


def certify(source: Path, binding: Binding, engine: str, precision: str, proofs: Sequence[Proof]) -> list[Path]:
    """Write into cards on which engine they were proven, and what was shown; their tensors stay as they are.

    Args:
        source: the run, the cell or the file that a server has; ``binding``: of its model.
        engine: its name and version, ``precision`` that of its weights.
        proofs: all of ``prove``.

    Returns the files that were written. InputError where a proof did not pass.
    """
    failed = next((f"{proof.name} was not" for proof in proofs if not proof.passed), None if proofs else "nothing was")
    if failed:
        raise InputError(f"certify: {failed} shown; a certificate says that all checks passed")
    compared = max(proof.difference for proof in proofs)
    shown = f"{precision}, {len(proofs)} checks of {sum(proof.answers for proof in proofs)} answers, "
    shown += f"differences up to {compared:.1e}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    found: dict[Path, Artefact] = {}
    if source.is_file():
        vectors, detector, _ = artefacts_of(source, binding)
        (found[source],) = (one for one in (*vectors.values(), detector) if one)
    else:
        cell = cell_of(source, binding)
        found = {path: SteeringVector.load(path) for path in best_paths(cell).values()}
        for path in (cell / "detector.safetensors", cell / "detector_below.safetensors"):
            found |= {path: Detector.load(intact(path))} if is_there(path) else {}
    written = [path.with_suffix(".json") for path in found]
    with ExitStack() as stack:
        if not source.is_file():
            stack.enter_context(locked(cell.parents[1], lambda: True))
            stack.enter_context(rewriting(cell, [*found, *written]))
        for path, artefact in found.items():
            card = artefact.card or Card(artefact.task)
            replace(artefact, card=replace(card, proven=card.proven | {engine: shown})).save(path)
    return written
