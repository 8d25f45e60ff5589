"""The JSON API: each call is one call of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request

from mnemoscope.bench import Bench
from mnemoscope.errors import InputError
from mnemoscope.report import compare_briefs, draw_neuron
from mnemoscope.web import shapes
from mnemoscope.web.jobs import Job, Jobs
from mnemoscope.web.rooms import NAME, Rooms
from mnemoscope.web.snippets import snippets

Run = Annotated[str, Path(pattern=NAME)]
CellName = Annotated[str, Path(max_length=200)]
Index = Annotated[int, Path(ge=0, le=2**24)]
JobName = Annotated[str, Path(max_length=64)]
T = TypeVar("T")


def _rooms(request: Request) -> Rooms:
    return request.app.state.rooms


def _jobs(request: Request) -> Jobs:
    return request.app.state.jobs


class AtBench:
    """Calls of one cell."""

    def __init__(self, request: Request, run: Run, cell: CellName) -> None:
        self.request, self.run, self.cell = request, run, cell

    async def __call__(self, work: Callable[[Bench], T]) -> T:
        """What the work finds."""
        return await self.request.app.state.opened.ask(self.run, self.cell, work)


Opened = Annotated[Rooms, Depends(_rooms)]
AtWork = Annotated[Jobs, Depends(_jobs)]
Asks = Annotated[AtBench, Depends(AtBench)]
CELL = "/runs/{run}/cells/{cell}"
REFUSALS = (400, 401, 403, 404, 413, 422, 429)
router = APIRouter(prefix="/api", responses={code: {"model": shapes.ErrorOut} for code in REFUSALS})


@router.get("/runs")
def list_runs(rooms: Opened) -> list[shapes.RunOut]:
    """The runs in the folder, with their studies, cells and first numbers."""
    return [_run(rooms, name) for name in rooms.runs()]


@router.get("/runs/{run}")
def show_run(rooms: Opened, run: Run) -> shapes.RunOut:
    """One run."""
    return _run(rooms, run)


@router.get("/compare")
def compare(
    rooms: Opened, first: Annotated[str, Query(pattern=NAME)], second: Annotated[str, Query(pattern=NAME)]
) -> list[shapes.RowOut]:
    """Two runs side by side, a row for each number that either has."""
    for field, name in (("first", first), ("second", second)):
        if name not in rooms.runs():
            raise InputError(f"{field}: {name!r} is not one of {', '.join(rooms.runs()) or 'none'}")
    return [shapes.RowOut(**row) for row in compare_briefs(rooms.brief(first), rooms.brief(second))]


@router.get(CELL)
async def show_cell(asks: Asks) -> shapes.CellOut:
    """An opened cell: what its model can be turned with."""

    def facts(bench: Bench) -> shapes.CellOut:
        methods = [shapes.MethodOut.model_validate(row) for row in bench.vectors.methods()]
        return shapes.CellOut(run=asks.run, cell=asks.cell, layers=bench.layers, detects=bench.detects, methods=methods)

    return await asks(facts)


@router.get(CELL + "/questions")
async def list_questions(asks: Asks, n: Annotated[int, Query(ge=1, le=100)] = 12) -> list[shapes.PairOut]:
    """Test pairs of different groups."""
    return [
        shapes.PairOut(memorized=shapes.QuestionOut.of(m), generalized=shapes.QuestionOut.of(g))
        for m, g in await asks(lambda bench: bench.questions(n))
    ]


@router.post(CELL + "/rephrase")
async def rephrase(asks: Asks, asked: shapes.RephraseIn) -> shapes.QuestionOut:
    """An item of the run's own in other words."""
    found = await asks(lambda bench: bench.rephrased(asked.item, asked.prompt, asked.seed))
    return shapes.QuestionOut.of(found)


@router.post(CELL + "/ask")
async def ask(asks: Asks, asked: shapes.AskIn) -> shapes.AnswerOut:
    """What the model makes of a prompt, by itself or turned."""
    example = asked.question.example()
    turning = asked.turning.turning() if asked.turning else None
    if example is None:
        return shapes.AnswerOut.of(await asks(lambda bench: bench.go_on(asked.question.prompt, turning)))
    return shapes.AnswerOut.of(await asks(lambda bench: bench.ask(example, turning)))


@router.post(CELL + "/snippets")
async def show_snippets(asks: Asks, asked: shapes.AskIn) -> dict[str, str]:
    """The lines of Python, and the command, that do what ``ask`` does."""
    run = _rooms(asks.request).run(asks.run)
    return await asks(lambda bench: snippets(bench, run, asked))


@router.get(CELL + "/neurons")
async def map_neurons(asks: Asks) -> shapes.NeuronsOut:
    """How every neuron differs between the two behaviours, on the fit pairs."""
    return await asks(lambda bench: shapes.NeuronsOut.of(bench.contrast))


@router.post(CELL + "/neurons/{layer}/{neuron}", status_code=202)
async def watch_neuron(asks: Asks, jobs: AtWork, layer: Index, neuron: Index) -> shapes.JobOut:
    """Look at one neuron; the job's result has its distributions, its ranks and what it does alone."""

    def checked(bench: Bench) -> Bench:
        bench.neurons.check(layer, neuron)
        return bench

    bench = await asks(checked)
    if await asks.request.is_disconnected():
        raise HTTPException(499, "request: whoever asked has left")

    def work(tell: Callable[[float], None], wanted: Callable[[], bool]) -> shapes.WatchedOut:
        seen = bench.neurons.watch(layer, neuron, tell, wanted)
        label = f"Neuron {neuron} of layer {layer} where the model remembered and where it worked it out"
        return shapes.WatchedOut.of(seen, draw_neuron(seen.generalized_P, seen.memorized_P, label), layer, neuron)

    return _job(jobs.start(work))


@router.get("/jobs/{job}")
async def show_job(jobs: AtWork, job: JobName) -> shapes.JobOut:
    """How far a job is, and its result once it is done."""
    return _job(jobs.get(job))


@router.delete("/jobs/{job}")
async def cancel_job(jobs: AtWork, job: JobName) -> shapes.JobOut:
    """Cancel a job."""
    return _job(jobs.cancel(job))


def _job(job: Job | None) -> shapes.JobOut:
    if job is None:
        raise HTTPException(404, "job: there is none of that name (any more)")
    return shapes.JobOut(job=job.name, state=job.state, share=job.share, result=job.result, error=job.error)


def _run(rooms: Rooms, name: str) -> shapes.RunOut:
    results = rooms.results(name)
    return shapes.RunOut(
        run=name,
        study=results.get("study"),
        finished=bool(results),
        cells=rooms.cells(name),
        tasks=shapes.first_numbers(rooms.brief(name)),
    )
