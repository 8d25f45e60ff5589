"""`mnemoscope doctor --server`: a server that runs, proven on the user's own vectors."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from mnemoscope.cli.given import How
from mnemoscope.cli.shared import open_model, say, weights_note
from mnemoscope.runs.digests import in_cells, intact
from mnemoscope.runs.errors import InputError

PLAIN = "note: unsteered answers differ already: does the server have this model, in this precision (--dtype)?"


def prove_server(
    url: str,
    source: Path | None,
    model: str | None,
    how: How,
    prompts: list[str] | None,
    long: int | None,
    certified: bool,
) -> bool:
    """Print a table, or JSON, of the checks of a server; whether all have passed.

    ``certified``: cards say what was shown where all have passed.
    """
    from mnemoscope.face.fitted import Fitted
    from mnemoscope.interventions import Binding
    from mnemoscope.serving.client import Server
    from mnemoscope.serving.proof import LONG, certify, cost, prove
    from mnemoscope.serving.served import quantize

    if source is None:
        raise InputError("from: missing; name the run that the server has: --from RUN")
    server, named = Server(url), model or _model_of(source)
    opened = open_model(named, how)
    fitted, texts, found = Fitted.open(source, *opened), prompts or _prompts_of(source), []
    binding = Binding.of(*opened) if certified else None  # of whole weights
    if server.quantization:
        quantize(opened[0], server.quantization)
    for proof in prove(server.ask, fitted, texts, server.room, long or LONG):
        found.append(proof)
        if not how.as_json:
            typer.echo(proof)
    ratios = cost(server.ask, fitted, texts)
    well, median, written = all(proof.passed for proof in found), statistics.median(ratios), list[Path]()
    if binding and well:
        precision = str(opened[0].dtype).removeprefix("torch.") + (" quantized" if server.quantization else "")
        written = certify(source, binding, server.engine, precision, found)
    about: dict[str, Any] = {"server": server.url, "engine": server.engine, "model": named}
    about |= {"weights": weights_note(named), "passed": well}
    about |= {"checks": [asdict(proof) | {"passed": proof.passed} for proof in found]}
    about |= {"steered_to_unsteered_seconds": {"median": median, "rounds": ratios}}
    spread = f"median of {len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f}"
    text = f"      a steered token takes {median:.2f} of the seconds of an unsteered one ({spread})"
    certificates = list(map(str, written))
    say(how.as_json, "\n".join([text, *certificates]), **about, certified=certificates)
    if not how.as_json and not found[0].passed:
        typer.echo(PLAIN, err=True)
    return well


def _model_of(source: Path) -> str:
    """The folder of the model that a run, or a cell of one, has trained; InputError where it is another's."""
    found = in_cells(source, "model")
    if len(found) != 1:
        what = "holds no model" if not found else "holds several"
        raise InputError(f"model: {source} {what}; name the one that the server has: --model MODEL")
    return str(found[0])


def _prompts_of(source: Path) -> list[str]:
    """Test prompts of the only cell of a run, so that gates may open on some; without any, the doctor's own."""
    import pandas as pd

    from mnemoscope.face.doctor import PROMPTS
    from mnemoscope.runs.strict import bounded_table, read_bytes
    from mnemoscope.serving.proof import MOST_PROMPTS

    for name, column in (("detection", "prompt"), ("pairs", "prompt_a")):
        paths = in_cells(source, f"records/{name}.parquet")
        if len(paths) == 1:
            table = bounded_table(intact(paths[0]), read_bytes(paths[0]))
            texts = pd.read_parquet(table, columns=[column])[column].unique().tolist()
            if len(texts) > 1:
                return texts[:: -(-len(texts) // MOST_PROMPTS)]
    return list(PROMPTS)
