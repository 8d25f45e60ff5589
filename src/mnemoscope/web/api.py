"""The JSON API: each call is one call of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request

from mnemoscope.errors import InputError
from mnemoscope.report import compare_briefs
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.opened import Jobs
from mnemoscope.web.runs import NAME, RunFacts, Runs
from mnemoscope.web.shapes import Answer, Asked, CellFacts, Job, NeuronMap, Pair, Question, Refusal
from mnemoscope.web.snippets import snippets

Name = Annotated[str, Path(pattern=NAME)]
Index = Annotated[int, Path(ge=0, le=2**24)]
T = TypeVar("T")


def _runs(request: Request) -> Runs:
    return request.app.state.runs


def _jobs(request: Request) -> Jobs:
    return request.app.state.jobs


class AtCell:
    """Calls it with work to do that work on the cell in the path."""

    def __init__(self, request: Request, run: Name, cell: Annotated[str, Path(max_length=200)]) -> None:
        self.request, self.run, self.cell = request, run, cell

    async def __call__(self, work: Callable[[OpenedCell], T]) -> T:
        """The result of the work."""
        return await self.request.app.state.opened.ask(self.run, self.cell, work)


InRuns = Annotated[Runs, Depends(_runs)]
InJobs = Annotated[Jobs, Depends(_jobs)]
At = Annotated[AtCell, Depends(AtCell)]
CELL = "/runs/{run}/cells/{cell}"
REFUSALS = (400, 401, 403, 404, 411, 413, 422, 429)
router = APIRouter(prefix="/api", responses={code: {"model": Refusal} for code in REFUSALS})


@router.get("/runs")
def list_runs(runs: InRuns) -> list[RunFacts]:
    """The runs in the folder, with their studies, cells and first numbers."""
    return [runs.facts(name) for name in runs.names()]


@router.get("/runs/{run}")
def show_run(runs: InRuns, run: Name) -> RunFacts:
    """One run."""
    return runs.facts(run)


@router.get("/compare")
def compare(
    runs: InRuns, first: Annotated[str, Query(pattern=NAME)], second: Annotated[str, Query(pattern=NAME)]
) -> list[dict[Literal["task", "what", "first", "second"], str]]:
    """Two runs side by side, in words: a row for each number that either has."""
    for field, name in (("first", first), ("second", second)):
        if name not in runs.names():
            raise InputError(f"{field}: {name!r} is not one of {', '.join(runs.names()) or 'none'}")
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
async def show_snippets(at: At, runs: InRuns, asked: Asked) -> dict[str, str]:
    """The lines of Python, and the command, that do what ``ask`` does."""
    return await at(lambda cell: snippets(cell, runs.folder(at.run), asked))


@router.get(CELL + "/neurons")
async def map_neurons(at: At) -> NeuronMap:
    """How every neuron differs between the two behaviours, on the fit pairs."""
    return await at(lambda cell: cell.neurons.map())


@router.post(CELL + "/neurons/{layer}/{neuron}", status_code=202)
async def watch_neuron(at: At, jobs: InJobs, layer: Index, neuron: Index) -> Job:
    """Look at one neuron; the job's result has its distributions, its ranks and its effect alone."""
    steps = await at(lambda cell: cell.neurons.watch(layer, neuron))
    if await at.request.is_disconnected():
        raise HTTPException(499, "request: the client has left")
    return jobs.start(lambda: at(lambda cell: next(steps)))


@router.get("/jobs/{job}")
async def show_job(jobs: InJobs, job: Annotated[str, Path(max_length=64)]) -> Job:
    """How far a job is, and its result once it is done."""
    return jobs.get(job)


@router.delete("/jobs/{job}")
async def cancel_job(jobs: InJobs, job: Annotated[str, Path(max_length=64)]) -> Job:
    """Cancel a job."""
    return jobs.cancel(job)
