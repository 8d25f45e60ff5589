"""The JSON API: each call is one call of the library."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import StreamingResponse

from mnemoscope.config import NAME
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.shapes import (
    About,
    Answer,
    Asked,
    Look,
    NeuronMap,
    OpenedFacts,
    Pair,
    Question,
    ReadSoFar,
    Refusal,
    RunFacts,
)

Name = Annotated[str, Path(pattern=NAME)]
Index = Annotated[int, Path(ge=0, le=2**24)]
CELL = "/runs/{run}/cells/{cell}"
REFUSALS = (400, 401, 403, 404, 411, 413, 422)
router = APIRouter(prefix="/api", responses={code: {"model": Refusal} for code in REFUSALS})


def _at(request: Request, run: Name, cell: Annotated[str, Path(max_length=200)]) -> Any:
    """A function that does work on the cell in the path while the client waits; work takes the ``OpenedCell``."""
    return partial(request.app.state.opened.ask, run, cell, left=request.is_disconnected)


At = Annotated[Any, Depends(_at)]


class JsonLines(StreamingResponse):
    """One JSON object a line, each sent when it is there."""

    media_type = "application/x-ndjson"


@router.get("/runs")
def list_runs(request: Request) -> list[RunFacts]:
    """The runs in the folder, with their studies, cells and first numbers."""
    runs = request.app.state.runs
    return [runs.facts(name) for name in runs.names()]


@router.get(CELL)
async def show_cell(at: At) -> OpenedFacts:
    """An opened cell: its layers and vectors."""
    return await at(OpenedCell.facts)


@router.get(CELL + "/questions")
async def list_questions(at: At, n: Annotated[int, Query(ge=1, le=100)] = 12) -> list[Pair]:
    """Test pairs, one of every group before a second of any."""
    return await at(lambda cell: cell.pairs(n))


@router.post(CELL + "/rephrase")
async def rephrase(at: At, question: Question, seed: Annotated[int, Query(ge=0, le=2**31)] = 0) -> Question:
    """Another phrasing of a question of the run."""
    return await at(lambda cell: cell.rephrase(question, seed))


@router.post(CELL + "/ask")
async def ask(at: At, asked: Asked) -> Answer:
    """The model's answer to a prompt, steered or not."""
    return await at(lambda cell: cell.answer(asked.question, asked.steering))


@router.post(CELL + "/read", response_class=JsonLines, responses={200: {"model": ReadSoFar}})
async def read(at: At, about: About) -> JsonLines:
    """Answer a question about a document: a line every few tokens, with where each part comes from."""
    steps = await at(lambda cell: cell.read(about))
    first = await at(lambda _: next(steps))

    async def lines() -> AsyncIterator[str]:
        found = first
        while found:
            yield found.model_dump_json() + "\n"
            found = await at(lambda _: next(steps, None), left=None)

    return JsonLines(lines())


@router.get(CELL + "/neurons")
async def map_neurons(at: At) -> NeuronMap:
    """How every neuron differs between the two behaviours, on the fit pairs."""
    return await at(lambda cell: cell.neurons.map())


@router.post(CELL + "/neurons/{layer}/{neuron}", response_class=JsonLines, responses={200: {"model": Look}})
async def watch_neuron(request: Request, at: At, layer: Index, neuron: Index) -> JsonLines:
    """Look at one neuron: a line for each step, the last with its distributions, its ranks and its effect alone.

    Other requests are answered between two steps; nothing more is done for a client that leaves.
    """
    steps = await at(lambda cell: cell.neurons.watch(layer, neuron))

    async def lines() -> AsyncIterator[str]:
        async with request.app.state.looking:
            while look := await at(lambda _: next(steps, None), left=None):
                yield look.model_dump_json() + "\n"

    return JsonLines(lines())
