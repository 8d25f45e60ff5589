"""An audit: every item and its variants asked of one checkpoint, chunk by chunk, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mnemoscope.auditing.answers import stated
from mnemoscope.auditing.items import Item
from mnemoscope.auditing.named import named_items
from mnemoscope.auditing.proof import prove
from mnemoscope.auditing.replies import SHORT, Form, rows_of
from mnemoscope.auditing.verdict import LEAST, evidence, in_words, summary, verdicts
from mnemoscope.behaviour import PLAIN, Asking, Prompting
from mnemoscope.config import AuditConfig, parse_audit
from mnemoscope.interventions import Binding
from mnemoscope.models import load_model
from mnemoscope.report import build_audit
from mnemoscope.runs.digests import STAGES, intact, write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.files import plain, write_atomically
from mnemoscope.runs.locks import locked
from mnemoscope.runs.schemas import AuditFacts
from mnemoscope.runs.strict import bounded_table, read_json
from mnemoscope.runs.telling import shown
from mnemoscope.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

AT_ONCE = 4  # items of a chunk; the first is of one, which tells how long all take
SCHEMA = 3
MOST_LACKING = 0.5  # share of replies in which no answer is found, from which on nothing can be said
CHOICES = ("sizes", "prompting", "name", "progress", "opening", "against", "prove")


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        out: the run folder, with ``audit.html``; ``table``: a row an item, with its verdict and what speaks for it.
        results: of the whole benchmark, as ``audit/results.json`` has it.
    """

    out: Path
    table: pd.DataFrame
    results: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n".join(in_words(self.results))


def audit(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    items: Sequence[Item] | Task | str | Path | None = None,
    out: str | Path = "runs/audit",
    **choices: Any,
) -> Audit:
    """Find out which items of a benchmark a checkpoint recites and which it solves, and write a page of it.

    Args:
        model: an open causal language model, which stays unchanged, or a name or path for ``load_model``.
        tokenizer: of an open model.
        items: ``Item`` objects, a file of rows (``item``, ``prompt``, ``answer``, ``variants``), a folder of templates,
            or a task.
        out: the run folder; an interrupted audit continues there.
        choices: ``sizes``, fields of ``AuditConfig``; ``prompting``, the format of prompts; ``name`` of the model on
            the page; ``progress``; ``opening``, other arguments of ``load_model``; ``against``, the run folder of an
            audit of another checkpoint on the same items: what counts then is how much less a text costs this one;
            ``prove``, True to steer what is accused away from memory (``auditing.proof``).

    Raises:
        InputError: an argument cannot be used, items have no variants, or no answer is found in most replies.
    """
    for choice in choices:
        if choice not in CHOICES:
            raise InputError(f"{choice}: audit has no such argument; it has {', '.join(CHOICES)}")
    config = parse_audit(dict(choices.get("sizes") or {}))
    found = named_items(items, config.variants, config.seed) if items is not None else []
    form = _form(config, items)
    _check(found, form)
    name = choices.get("name") or (Path(str(model)).name if isinstance(model, str | Path) else type(model).__name__)
    if isinstance(model, str | Path):
        model, tokenizer = load_model(model, **(choices.get("opening") or {}))
    if tokenizer is None:
        raise InputError("tokenizer: None; an open model needs its tokenizer (or give the model by name)")
    prompting: Prompting = choices.get("prompting") or PLAIN
    asking, training = Asking(model, tokenizer, None, config.batch_size, prompting), model.training
    run = _Run(Path(out), asking, form, found, {"model": name, "sizes": config.model_dump()})
    model.eval()
    try:
        with locked(run.folder, lambda: run.done("frame")), shown(choices.get("progress"), {"asking": 1.0}) as tell:
            rows = run.rows(tell)
            _check_found(rows)
            return _told(run, rows, choices)
    finally:
        model.train(training)


def _check(items: Sequence[Item], form: Form) -> None:
    if not items:
        raise InputError("items: none; give a file of rows, a folder of templates, a task, or Item objects")
    if len({item.item for item in items}) < len(items):
        raise InputError("items: two have one name")
    if all(not item.variants for item in items):
        what = "costs and completion alone could be told, and whether an item was recited could not"
        raise InputError(f"items: none of {len(items)} has variants, so {what}; add variants to each")
    for item in items:
        original = stated(item.answer, form.kind)
        if same := next((one for one in item.variants if stated(one.answer, form.kind) == original), None):
            raise InputError(
                f"items: a variant of {item.item!r} has the original's answer: {same.answer!r} is {original}"
            )


def _form(config: AuditConfig, items: Any) -> Form:
    are_templates = isinstance(items, str | Path) and Path(items).is_dir()
    kind = config.answers or ("number" if are_templates else "short")
    return Form(kind, config.form, min(config.tokens, SHORT) if kind == "short" else config.tokens)


def _check_found(rows: pd.DataFrame) -> None:
    """Raises InputError where most replies hold no answer."""
    lacking = rows[rows["found"].isna()]
    if len(lacking) > MOST_LACKING * len(rows):
        shown = "; ".join(repr(reply[-60:]) for reply in lacking["reply"].head(3))
        raise InputError(f"answers: none is found in {len(lacking)} of {len(rows)} replies, such as {shown}")


class _Run:
    """The run of an audit in its folder."""

    def __init__(self, out: Path, asking: Asking, form: Form, items: Sequence[Item], facts: Mapping[str, Any]) -> None:
        self.out, self.folder, self.asking, self.form, self.items = out, out / "audit", asking, form, items
        told = json.dumps([asdict(item) for item in items], sort_keys=True)
        weights = Binding.of(asking.model, asking.tokenizer).weights
        self.facts = {
            **facts,
            **{"schema": SCHEMA, "weights": weights, "items": hashlib.sha256(told.encode()).hexdigest()},
            **{"form": asdict(form), "prompting": asking.prompting.facts},
            "dtype": str(asking.model.dtype).removeprefix("torch."),
        }

    def rows(self, tell: Any) -> pd.DataFrame:
        """All rows; InputError where the folder holds another audit."""
        before = read_json(intact(self.folder / "frame.json"), AuditFacts) if self.done("frame") else self.facts
        for field, value in self.facts.items():
            if before.get(field) != value:
                raise InputError(f"out: {self.folder} holds an audit with another {field}; give another folder")
        text = json.dumps(plain(dict(self.facts)), indent=1, allow_nan=False) + "\n"
        write_marker(self.folder, "frame", [write_atomically(self.folder / "frame.json", text.encode())])
        parts, starts, began = [], [0, *range(1, len(self.items), AT_ONCE)], time.monotonic()
        fresh = not self.done("rows-00000")  # else the first item tells nothing of the time
        for number, (start, end) in enumerate(pairwise([*starts, len(self.items)])):
            about = f"item {start + 1} on"
            if fresh and number == 1:
                minutes = round((time.monotonic() - began) * len(self.items) / 60)
                about = f"all of them about {max(1, minutes)} min"
            tell("audit", "asking", start, len(self.items), about)
            name = f"rows-{number:05}"
            path = self.folder / f"{name}.parquet"
            if not self.done(name):
                table = pd.DataFrame(rows_of(self.asking, self.form, self.items[start:end]))
                write_atomically(path, partial(table.to_parquet, index=False))
                write_marker(self.folder, name, [path])
            parts.append(pd.read_parquet(bounded_table(intact(path))))
        tell("audit", "asking", len(self.items), len(self.items), "")
        return pd.concat(parts, ignore_index=True)

    def done(self, name: str) -> bool:
        """Whether a stage has finished."""
        return (self.folder / STAGES / f"{name}.json").is_file()


def _told(run: _Run, rows: pd.DataFrame, choices: Mapping[str, Any]) -> Audit:
    """Write results, items and page."""
    config, against = parse_audit(dict(choices.get("sizes") or {})), choices.get("against")
    reference = _rows_of(Path(against), run.facts["items"]) if against is not None else None
    if reference is not None and len(reference) != len(rows):
        raise InputError(f"against: the audit in {against} is not finished; run it again")
    table = verdicts(evidence(rows, reference, config.accused), config.accused)
    found = summary(table, config.accused) | {
        "model": run.facts["model"],
        "dtype": run.facts["dtype"],
        "accused_at": config.accused,
    }
    found |= {"asked": run.facts["form"], "few_variants": int((table["variants"] < LEAST).sum())}
    found["cut"] = float(rows["cut"].mean())
    if reference is not None:
        found["against"] = str(read_json(intact(Path(against or "") / "audit" / "frame.json"), AuditFacts)["model"])
    if choices.get("prove"):
        found["proof"] = _proof(run, rows, found["accused"])
    texts = rows[rows["place"] == 0].set_index("item")[["prompt", "answer", "reply"]]
    files = [
        write_atomically(run.folder / "items.csv", lambda path: table.join(texts).to_csv(path)),
        write_atomically(run.folder / "results.json", _dumped(found | {"table": _records(table)}).encode()),
    ]
    write_marker(run.folder, "report", files)
    build_audit(run.out, rows)
    return Audit(run.out, table, found)


def _proof(run: _Run, rows: pd.DataFrame, accused: Sequence[str]) -> dict[str, Any]:
    try:
        return prove(run.asking, run.form, run.items, rows, accused)
    except InputError as error:
        return {"left_out": str(error)}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.reset_index().to_dict("records")]


def _dumped(found: Mapping[str, Any]) -> str:
    from mnemoscope.report.rows import to_json

    return to_json(found)


def _rows_of(run: Path, items: str) -> pd.DataFrame:
    """The rows of another audit; InputError where it is of other items, or not finished."""
    if not (run / "audit" / "frame.json").is_file():
        raise InputError(f"against: {run} holds no audit")
    if read_json(intact(run / "audit" / "frame.json"), AuditFacts)["items"] != items:
        raise InputError(f"against: {run} is of other items, or of other variants")
    paths = sorted((run / "audit").glob("rows-*.parquet"))
    return pd.concat([pd.read_parquet(bounded_table(intact(path))) for path in paths], ignore_index=True)
