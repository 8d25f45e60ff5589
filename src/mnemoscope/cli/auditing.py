"""The command that audits a checkpoint on a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import mnemoscope as ms
from mnemoscope.cli import given
from mnemoscope.cli.shared import app, formatted, opening, say
from mnemoscope.runs.errors import InputError

_ITEMS = "Rows with item, prompt, answer and variants; a folder of templates; or a task, see `mnemoscope tasks`."
_RUN = "Run folder; an interrupted audit continues there."
_ANSWERS = "How answers are found; default: numbers of templates, else the first phrase."
_FORM = "What is asked, with {prompt} in it."
_AGAINST = "Run of an audit of another checkpoint, whose costs of the same texts are taken off."


@app.command()
@given.taking("force", "layout")
def audit(
    how: given.How,
    model: given.Model,
    items: Annotated[str, typer.Option(help=_ITEMS)],
    out: Annotated[Path, typer.Option("-o", "--out", help=_RUN, callback=given.of_out)],
    option: given.TaskOptions = None,
    answers: Annotated[Literal["number", "choice", "short"] | None, typer.Option(help=_ANSWERS)] = None,
    variants: Annotated[int, typer.Option(min=1, help="Of each item of templates or a task.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Draws these variants.")] = 0,
    form: Annotated[str, typer.Option(help=_FORM)] = "{prompt}",
    tokens: Annotated[int, typer.Option(min=1, help="Of a reply, at most; of a short one 16.")] = 256,
    against: Annotated[Path | None, typer.Option(help=_AGAINST)] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Steer what is accused away from memory, beside controls.")
    ] = False,
) -> None:
    """Find out which items of a benchmark a checkpoint recites, and which it solves."""
    from mnemoscope.cli.shared import options
    from mnemoscope.config import parse_audit

    sizes: dict[str, Any] = {"answers": answers, "variants": variants, "seed": seed, "form": form, "tokens": tokens}
    parse_audit(sizes)
    named = _named(items, options(option), seed)
    asked: dict[str, Any] = {"sizes": sizes, "prompting": formatted(how), "name": model, "progress": not how.as_json}
    found = ms.audit(model, None, named, out, opening=opening(model, how), against=against, prove=prove, **asked)
    page = out / "audit.html"
    say(how.as_json, f"{found}\n{page}", run=out, page=page, results=out / "audit" / "results.json")


def _named(items: str, options: dict[str, Any], seed: int) -> Any:
    """A file or folder as it is, else a task; InputError where it is neither."""
    from mnemoscope.tasks import named_task
    from mnemoscope.tasks.tables import is_file_of_rows

    if Path(items).is_dir() and options:
        raise InputError("option: a folder of templates has none")
    if Path(items).is_dir() or (is_file_of_rows(items) and not options):
        if not Path(items).exists():
            raise InputError(f"items: the file {items} does not exist")
        return items
    return named_task(items, options, seed)
