"""The JSON API: each call is one call of the library."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request

from mnemoscope.report import compare_briefs
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.runs import NAME, Runs
from mnemoscope.web.shapes import Answer, Asked, CellFacts, Job, NeuronMap, Pair, Question, Refusal, RunFacts

Name = Annotated[str, Path(pattern=NAME)]
NameAsked = Annotated[str, Query(pattern=NAME)]
Index = Annotated[int, Path(ge=0, le=2**24)]
JobName = Annotated[str, Path(max_length=64)]
CELL = "/runs/{run}/cells/{cell}"
REFUSALS = (400, 401, 403, 404, 411, 413, 422, 429)
router = APIRouter(prefix="/api", responses={code: {"model": Refusal} for code in REFUSALS})


def _at(request: Request, run: Name, cell: Annotated[str, Path(max_length=200)]) -> Any:
    """Called with work, a function of an ``OpenedCell``, it does it on the cell in the path, if the client waits."""
    return partial(request.app.state.opened.ask, run, cell, left=request.is_disconnected)


At = Annotated[Any, Depends(_at)]


@router.get("/runs")
def list_runs(request: Request) -> list[RunFacts]:
    """The runs in the folder, with their studies, cells and first numbers."""
    runs: Runs = request.app.state.runs
    return [runs.facts(name) for name in runs.names()]


@router.get("/runs/{run}")
def show_run(request: Request, run: Name) -> RunFacts:
    """One run."""
    return request.app.state.runs.facts(run)


@router.get("/compare")
def compare(
    request: Request, first: NameAsked, second: NameAsked
) -> list[dict[Literal["task", "what", "first", "second"], str]]:
    """Two runs side by side, in words: a row for each number that either has."""
    runs: Runs = request.app.state.runs
    for field, name in (("first", first), ("second", second)):
        runs.folder(name, field)
    return compare_briefs(runs.brief(first), runs.brief(second))  # type: ignore[return-value]


@router.get(CELL)
async def show_cell(at: At) -> CellFacts:
    """An opened cell: its layers and vectors."""
    return await at(OpenedCell.facts)


@router.get(CELL + "/questions")
async def list_questions(at: At, n: Annotated[int, Query(ge=1, le=100)] = 12) -> list[Pair]:
    """Test pairs of different groups."""
    return await at(lambda cell: cell.pairs(n))


@router.post(CELL + "/rephrase")
async def rephrase(at: At, question: Question, seed: Annotated[int, Query(ge=0, le=2**31)] = 0) -> Question:
    """Another phrasing of a question of the run."""
    return await at(lambda cell: cell.rephrase(question, seed))


@router.post(CELL + "/ask")
async def ask(at: At, asked: Asked) -> Answer:
    """The model's answer to a prompt, steered or not."""
    return await at(lambda cell: cell.answer(asked.question, asked.steering))


@router.post(CELL + "/snippets")
async def show_snippets(at: At, asked: Asked) -> dict[str, str]:
    """The lines of Python, and the command, that do what ``ask`` does."""
    return await at(lambda cell: cell.snippets(asked))


@router.get(CELL + "/neurons")
async def map_neurons(at: At) -> NeuronMap:
    """How every neuron differs between the two behaviours, on the fit pairs."""
    return await at(lambda cell: cell.neurons.map())


@router.post(CELL + "/neurons/{layer}/{neuron}", status_code=202)
async def watch_neuron(request: Request, at: At, layer: Index, neuron: Index) -> Job:
    """Look at one neuron; the job's result has its distributions, its ranks and its effect alone."""
    steps = await at(lambda cell: cell.neurons.watch(layer, neuron))
    step = partial(at.func, *at.args)  # a job is not dropped when its first request has been answered
    return request.app.state.jobs.start(lambda: step(lambda cell: next(steps)))


@router.get("/jobs/{job}")
async def show_job(request: Request, job: JobName) -> Job:
    """How far a job is, and its result once it is done."""
    return request.app.state.jobs.get(job)


@router.delete("/jobs/{job}")
async def cancel_job(request: Request, job: JobName) -> Job:
    """Cancel a job."""
    return request.app.state.jobs.cancel(job)
