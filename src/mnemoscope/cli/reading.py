"""The commands that tell where each part of an answer comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import mnemoscope as ms
from mnemoscope.cli import given
from mnemoscope.cli.shared import app, formatted, open_model, say, weights_note
from mnemoscope.runs.errors import InputError

_TEXTS = "Rows with question and document, and answer where there is one to read: JSONL, CSV, Parquet or JSON."
_FORM = "How a question is asked about a document: a text with {document} and {question} in it."
_BARE = "How it is asked without one."
_DOCUMENT = "A file with the document; none: nothing comes from one."
_READER = "A folder with a reader, see fit-reader, or its file."
_REWRITE = "Write again, towards the document, what comes from memory with this probability or more."
_ANSWER = "The answer to read, as it stands behind the prompt; default: what the model writes."


@app.command()
@given.taking("force", "layout")
def fit_reader(
    how: given.How,
    model: given.Model,
    texts: Annotated[Path, typer.Option(help=_TEXTS)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the reader; that of a fit, or a new one.")],
    form: Annotated[str, typer.Option(help=_FORM)] = "{document}\n\n{question}",
    bare: Annotated[str, typer.Option(help=_BARE)] = "{question}",
    seed: Annotated[int, typer.Option(min=0, help="Draws swaps and splits.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer that the model writes, at most.")] = 24,
) -> None:
    """Fit a reader of answers on questions about documents. No labels are needed: swaps in the documents make them."""
    import pandas as pd

    from mnemoscope.auditing.origins import Form, fit_reader, read_texts
    from mnemoscope.behaviour import Asking
    from mnemoscope.report.stories.origins import build_reader

    asked, found = Form(form, bare), read_texts(texts)
    opened, tokenizer = open_model(model, how)
    reader, judged = fit_reader(Asking(opened, tokenizer, None, 16, formatted(how)), asked, found, seed, tokens)
    out.mkdir(parents=True, exist_ok=True)
    path = reader.save(out / "reader.safetensors")[0]
    told = ", ".join(f"{number:g} {name}" for name, number in reader.figures.items() if name != "loss")
    page = build_reader(out, model, pd.DataFrame([one.row() for one in judged]))
    facts = {"reader": path, "page": page, "figures": reader.figures}
    say(how.as_json, f"{told} names and numbers, blocks {reader.layers}\n{path}\n{page}", **facts)


@app.command()
@given.taking()
def read(
    how: given.How,
    model: given.Model,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="About the document.")],
    source: Annotated[Path, typer.Option("--from", help=_READER, callback=given.of_source)],
    document: Annotated[Path | None, typer.Option(help=_DOCUMENT)] = None,
    answer: Annotated[str | None, typer.Option(help=_ANSWER)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer that is written, at most.")] = 64,
    rewrite: Annotated[float | None, typer.Option(min=0, max=1, help=_REWRITE)] = None,
) -> None:
    """Tell where each name and number of an answer comes from: the document, memory, or neither."""
    from rich.console import Console
    from rich.text import Text as Coloured

    from mnemoscope.auditing.origins import Text
    from mnemoscope.auditing.origins.reader import COLOURS, MARKS
    from mnemoscope.runs.strict import read_text

    if answer is not None and rewrite is not None:
        raise InputError("rewrite: an answer that is given is read, not written; leave out one of the two")
    if document is not None and not document.is_file():
        raise InputError(f"document: the file {document} does not exist")
    said = read_text(document) if document is not None else ""
    fitted = ms.Fitted.open(source, *open_model(model, how), prompting=formatted(how), force=how.force)
    if fitted.reader is None:
        raise InputError(f"from: {source} has no reader; fit one on texts with documents (mnemoscope fit-reader)")
    prompt, again = fitted.reader.asks(Text(question, said)).prompt, list[tuple[str, str]]()
    if rewrite is None:
        found = fitted.read(prompt, said, answer, max_new_tokens)
    else:
        anew = fitted.rewrite(prompt, said, rewrite, max_new_tokens)
        found, again = anew.origins, anew.spans
    line = found.line + "".join(f"; {before} was written again: {after}" for before, after in again)
    if Console().is_terminal and not how.as_json:
        text = Coloured(found.answer)
        for part in found.parts:
            text.stylize(COLOURS[part.verdict], part.span.start, part.span.end)
        Console().print(text, Coloured(line), sep="\n")
        return
    written_again = [{"before": before, "after": after} for before, after in again]
    facts = {**found.told(), "model": model, "weights": weights_note(model), "line": line}
    say(how.as_json, f"{found.marked(MARKS)}\n{line}", **facts, written_again=written_again)
