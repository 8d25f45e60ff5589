"""`mnemoscope doctor --server`: a server that runs, proven on the user's own vectors."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from mnemoscope.cli.shared import open_model, weights_note

PLAIN = "note: unsteered answers differ already: does the server have this model, in this precision (--dtype)?"


def prove_server(
    url: str,
    source: Path | None,
    model: str | None,
    prompts: list[str] | None,
    long: int | None,
    certified: bool,
    opening: list[Any],
    as_json: bool,
) -> bool:
    """Print a table, or JSON, of the checks of a server; whether all have passed. ``certified``: cards say so then."""
    from mnemoscope.face.fitted import Fitted
    from mnemoscope.interventions import Binding
    from mnemoscope.runs.errors import InputError
    from mnemoscope.runs.files import dumped
    from mnemoscope.serving.certificate import certify
    from mnemoscope.serving.client import Server
    from mnemoscope.serving.proof import LONG, MOST_PROMPTS, cost, prove

    if source is None:
        raise InputError("from: missing; name the run that the server has: --from RUN")
    if not source.exists():
        raise InputError(f"from: {source} does not exist")
    server = Server(url)
    named = model or str(model_of_run(source))
    opened = open_model(named, *opening)
    fitted = Fitted.open(source, *opened)
    texts = prompts or prompts_of_run(source, MOST_PROMPTS)
    found = []
    for proof in prove(server.ask, fitted, texts, server.room, long or LONG):
        found.append(proof)
        if not as_json:
            typer.echo(proof)
    ratios = cost(server.ask, fitted, texts)
    well, median = all(proof.passed for proof in found), statistics.median(ratios)
    written: list[Path] = []
    if certified and well:
        precision = str(opened[0].dtype).removeprefix("torch.")
        written = certify(source, Binding.of(*opened), server.engine, precision, found)
    if as_json:
        rows = [_finite(asdict(proof)) | {"passed": proof.passed} for proof in found]
        about: dict[str, Any] = {"server": server.url, "engine": server.engine, "model": named}
        about |= {"weights": weights_note(named), "passed": well, "checks": rows}
        about |= {"steered_to_unsteered_seconds": {"median": median, "rounds": ratios}}
        typer.echo(dumped(about | {"certified": [str(path) for path in written]}))
        return well
    spread = f"median of {len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f}"
    typer.echo(f"      a steered token takes {median:.2f} of the seconds of an unsteered one ({spread})")
    for path in written:
        typer.echo(path)
    if not found[0].passed:
        typer.echo(PLAIN, err=True)
    return well


def model_of_run(source: Path) -> Path:
    """The folder of the model that a run, or a cell of one, has trained; InputError where it is another's."""
    from mnemoscope.runs.errors import InputError

    found = [path for place in ("model", "cells/*/model") for path in sorted(source.glob(place)) if path.is_dir()]
    if len(found) != 1:
        what = "holds no model" if not found else "holds several"
        raise InputError(f"model: {source} {what}; name the one that the server has: --model MODEL")
    return found[0]


def prompts_of_run(source: Path, most: int) -> list[str]:
    """Test prompts of the only cell of a run, so that gates may open on some; without any, the doctor's own."""
    import pandas as pd

    from mnemoscope.doctor import PROMPTS
    from mnemoscope.runs.digests import intact
    from mnemoscope.runs.strict import bounded_table, read_bytes

    for name, column in (("detection", "prompt"), ("pairs", "prompt_a")):
        places = (f"records/{name}.parquet", f"cells/*/records/{name}.parquet")
        paths = [path for place in places for path in sorted(source.glob(place))]
        if len(paths) == 1:
            path = intact(paths[0])
            table = pd.read_parquet(bounded_table(path, read_bytes(path)), columns=[column])
            texts = list(dict.fromkeys(table[column]))
            if len(texts) > 1:
                return [texts[n * len(texts) // most] for n in range(min(most, len(texts)))]
    return list(PROMPTS)


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in facts.items()}
