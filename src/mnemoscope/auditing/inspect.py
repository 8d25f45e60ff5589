"""An audit as a task of Inspect: originals and variants are its samples, ``behaviour`` is its scorer.

::

    inspect eval mnemoscope/auditing/inspect.py@recited --model MODEL -T items=items.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from mnemoscope.auditing.answers import Kind, found_in, label_of, stated
from mnemoscope.auditing.named import named_items
from mnemoscope.auditing.replies import Form, places_of


@task
def recited(items: str, variants: int = 8, seed: int = 0, form: str = "{prompt}", answers: Kind | None = None) -> Task:
    """Every item of a file or folder of templates, and its variants; arguments else as of ``mnemoscope audit``."""
    kind = answers or ("number" if Path(items).is_dir() else "short")
    how = Form(kind, form)
    samples = [
        Sample(
            input=how.asked(one),
            target=one.answer.strip(),
            id=f"{item.item}-{place}",
            metadata={"item": item.item, "place": place, "original": item.answer.strip()},
        )
        for item in named_items(items, variants, seed)
        for place, one in enumerate(places_of(item))
    ]
    return Task(dataset=MemoryDataset(samples, name="recited"), solver=generate(), scorer=behaviour(kind))


def _share(label: str, of_originals: bool) -> Callable[..., Metric]:
    def share() -> Metric:
        def shown(scores: list[SampleScore]) -> float:
            told = [one.score.metadata or {} for one in scores]  # of the values Inspect makes numbers
            found = [one["label"] == label for one in told if (not one["place"]) == of_originals]
            return sum(found) / len(found) if found else float("nan")

        return shown

    return metric(name=f"{'originals' if of_originals else 'variants'}_{label}")(share)


METRICS: Sequence[Metric] = [
    made() for made in (_share("right", True), _share("solved", False), _share("recited", False))
]


@scorer(metrics=list(METRICS))
def behaviour(kind: Kind = "short") -> Scorer:
    """Of an original ``right`` or ``wrong``; of a variant ``solved``, ``recited`` or ``neither``."""

    async def score(state: TaskState, target: Target) -> Score:
        about: dict[str, Any] = state.metadata
        found, own = found_in(state.output.completion, kind), stated(target.text, kind)
        label = label_of(found, own, stated(about["original"], kind), about["place"])
        told = {"label": label, "place": about["place"], "item": about["item"]}
        return Score(value=float(label in ("right", "solved")), answer=found, metadata=told)

    return score
