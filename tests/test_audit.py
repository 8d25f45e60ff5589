"""Audits: variants of templates, answers in replies, costs of texts, verdicts, and a run that goes on."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mnemoscope as ms
from little_facts import LittleFacts
from mnemoscope.auditing.answers import found_in, normal, stated, states_one
from mnemoscope.auditing.expressions import Expression
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.named import items_of, named_items
from mnemoscope.auditing.replies import Form, likelihoods, rows_of
from mnemoscope.auditing.templates import LISTS, Template, _said, read_templates
from mnemoscope.auditing.verdict import _by_rank, evidence, in_words, summary, verdicts
from mnemoscope.behaviour import Asking
from mnemoscope.cli import app
from mnemoscope.models import end_ids
from mnemoscope.runs.errors import InputError
from public_data import data_folder

TEMPLATE = '''
question = "Ann has 12 figs and buys twice as many. She gives 1/2 of all to Bob. How many now?"
answer = """
12 * 2 = <<12*2=24>>24
#### 18
"""
question_annotated = """
{name,Ann} has {n,12} figs and buys {times_txt,twice} as many. {p,She} gives {part,1/2} of all to Bob. How many now?

#init:
- name, p = sample([("Ann", "She"), ("Carl", "He")])
- $n = range(2, 40)
- times_txt, times = sample(multi_times)
- $part = sample(fractions)

#conditions:
- is_int(part * n * (1 + times))
- 5 < n < 30

#answer: n * (1 + times) - int(part * n * (1 + times))
"""
answer_annotated = "#### {(n + n*times) * (1 - part)}"
'''


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "templates" / "figs.toml"
    path.parent.mkdir()
    path.write_text(TEMPLATE)
    return path


# --- expressions and templates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1/3 + 1/6", Fraction(1, 2)), ("7 // 2 * 2", 6), ("2 < 3 < 4", True), ("0.1 + 0.2 == 0.3", True)),
        *(("divides(12, 4) and not is_int(1/2)", True), ("round(2.5)", 2), ("3**2 - int(7/2)", 6), ("-5 % 3", 1)),
    ],
)
def test_expressions_are_exact(text: str, value: Any) -> None:
    assert Expression(text)() == value


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').system('true')", "().__class__", "'a' * 10", "'%99d' % 1", "[x for x in [1]]", "lambda: 1"),
        *("9**9**9", "10**12 * 10**12 * 10**12", "f'{1}'", "x := 1", "open('x')", "1 +", "[1][0]", "(" * 3000),
        *("n.real", "print(1)", "1 << 3", "1j", "1/0", "{1: 2}", "exec('1')", "1 +" * 900 + "1"),
    ],
)
def test_a_hostile_expression_executes_nothing_and_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(InputError, match="expression"):
        Expression(text)({"n": Fraction(1)})


def values_of(template: Template, prompt: str) -> dict[str, Any]:
    """The values that a variant states, read back from its text."""
    place = re.compile(r"\\\{\s*(\w+)\s*,[^{}]*\\\}")
    seen: set[str] = set()

    def group(at: re.Match[str]) -> str:
        first = at[1] not in seen
        seen.add(at[1])
        return f"(?P<{at[1]}>.+?)" if first else f"(?P={at[1]})"

    found = re.fullmatch(place.sub(group, re.escape(template.text)), prompt)
    assert found, prompt
    said = found.groupdict()
    values: dict[str, Any] = dict(said)
    for names, draw in template.drawn:
        for row in draw.options if len(names) > 1 and draw.count is None else ():
            if all(said.get(name, str(part)) == str(part) for name, part in zip(names, row, strict=True)):
                values |= dict(zip(names, row, strict=True))
    return {name: Fraction(v) if re.fullmatch(r"-?[\d./]+", str(v)) else v for name, v in values.items()}


def recomputed(template: Template) -> Fraction:
    """The answer of the original, from the values that its question states."""
    known = {words: value for name in ("numbers", "multi_times", "fraction_alnum") for words, value in LISTS[name]}
    values: dict[str, Any] = {}
    for names, draw in template.drawn:
        words = [template.original.get(name) for name in names]
        rows = draw.options if draw.count is None and len(names) > 1 else []
        values |= {name: said for name, said in zip(names, words, strict=True) if said is not None}
        for row in rows:
            if all(said in (None, _said(part)) for said, part in zip(words, row, strict=True)):
                values |= dict(zip(names, row, strict=True))
                break
    for name, said in values.items():
        if isinstance(said, str) and re.fullmatch(r"\$?[\d.,/]+", said):
            values[name] = Fraction(said.strip("$").replace(",", ""))
    return Fraction(template.answer({name: known.get(value, value) for name, value in values.items()}))


def check_template(template: Template, variants: int) -> None:
    """Against the last line of the template's own solution, another expression than its answer."""
    assert recomputed(template) == Fraction(template.stated[1])
    (said,) = re.findall(r"####\s*\{(.*)\}", template.steps)
    solution, item = Expression(said), template.item(variants, 0)
    assert len({one.prompt for one in item.variants} | {item.prompt}) == variants + 1
    for one in item.variants:
        values = values_of(template, one.prompt)
        assert all(condition(values) for condition in template.conditions), one
        assert Fraction(solution(values)) == Fraction(one.answer), one
        assert one.answer != item.answer


def test_variants_have_the_right_answers_and_meet_the_conditions(template: Path) -> None:
    read = Template.read(template)
    check_template(read, 60)
    assert read.item(5, 0) == read.item(5, 0) != read.item(5, 1)
    assert read_templates(template.parent, 3, 0) == [read.item(3, 0)]


@pytest.mark.slow
def test_every_published_template_is_recomputed_and_drawn() -> None:
    """Their answers against the solutions' wherever these can be read back; MNEMOSCOPE_VARIANTS=152: ten thousand."""
    folder, variants = data_folder("gsm_symbolic"), int(os.environ.get("MNEMOSCOPE_VARIANTS", "6"))
    items, checked = read_templates(folder, variants, 1), 0
    assert len(items) == 66
    assert len({one.prompt for item in items for one in item.variants}) == 66 * variants
    for item in items:
        template = Template.read(next(folder.rglob(f"{item.item}.toml")))
        assert recomputed(template) == Fraction(template.stated[1]), item.item
        last = re.findall(r"####\s*\{(.*)\}\s*$", template.steps.strip())
        for one in item.variants if last else ():
            try:
                found = Fraction(Expression(last[0])(values_of(template, one.prompt)))
            except (InputError, AssertionError):
                continue  # what is said twice in other words cannot be read back
            assert found == Fraction(one.answer), (item.item, one)
            checked += 1
    assert checked > 33 * variants


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("5 < n < 30", "n / (n - n) > 1", "no numbers of"),
        ("range(2, 40)", "range(2, 10**9)", "allowed are 10000000"),
        ("sample(fractions)", "__import__('os')", "cannot be evaluated"),
        ("range(2, 40)", "range(2, 40, 0)", "allowed is a number above 0"),
        ("#answer: n", "#answers: n", "no line '#answer:'"),
        ("question_annotated", "question_noted", "is no template"),
        ("sample(multi_times)", "sample(names, 1)", "another number than it has names"),
        ("times_txt, times = sample(multi_times)", "times_txt, times = sample(names, 3)", "another number than it has"),
        ("- $part = sample", "- $share = sample", "part is in the question and in no line of #init"),
        ("#answer: n * (1 + times) - int(part * n * (1 + times))", "#answer: name", "which is no number"),
        ('answer = """\n12 * 2 = <<12*2=24>>24\n#### 18\n"""', "answer = 18", "is no template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_line(template: Path, old: str, new: str, message: str) -> None:
    template.write_text(template.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        Template.read(template).item(1, 0)


# --- items ------------------------------------------------------------------------------------------------------------


def test_items_are_read_from_rows_of_either_kind(tmp_path: Path) -> None:
    both = [{"prompt": "1 + 2 =", "answer": "3"}, {"prompt": "2 + 2 =", "answer": "4"}]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    whole.write_text(json.dumps({"item": "sum", **both[0], "variants": [both[1]]}))
    parts.write_text("".join(json.dumps({"item": "sum", **one}) + "\n" for one in both))
    wanted = [Item("sum", "1 + 2 =", "3", (Variant("2 + 2 =", "4"),))]
    assert named_items(whole, 8, 0) == named_items(parts, 8, 0) == wanted
    for row, message in (
        ({"item": "sum", **both[0], "variants": [{"prompt": "3 + 0 =", "answer": "3 "}]}, "the original's answer '3'"),
        ({"item": "sum", **both[0], "variants": [{"prompt": "1 + 2 =", "answer": "4"}]}, "asks what the original asks"),
        ({"item": "sum", **both[0], "variants": ["x"]}, "each has a prompt and an answer"),
        ({"item": "sum", **both[0], "variants": both[1]}, "is no list"),
        ({"item": "sum", "prompt": "", "answer": "3"}, "prompt is ''"),
    ):
        whole.write_text(json.dumps(row))
        with pytest.raises(InputError, match=message):
            named_items(whole, 8, 0)


def test_a_tasks_conflicts_are_items_whose_originals_are_bare() -> None:
    task = LittleFacts()
    items = items_of(task, 4, 0)
    assert {item.answer.strip() for item in items} <= set(task.true.values())
    assert max(len(item.variants) for item in items) == 4
    with pytest.raises(InputError, match="no bare question"):
        items_of(LittleFacts(bares=False), 4, 0)


# --- answers and costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kind", "answer"),
    [
        ("He has 3 + 4 = 7.\n#### 1,234\nQuestion: 5", "number", "1234"),
        ("so \\boxed{3/4} of it, in 12 parts", "number", "3/4"),
        ("The answer is $12.50, not 13.", "number", "13"),
        ("first 4, then 9.0", "number", "9"),
        ("no idea", "number", None),
        ("I think (B) is right", "choice", "B"),
        ("A man walks. Answer: C.", "choice", "C"),
        (" The Hague. It is", "short", "thehague"),
        ("\n", "short", None),
    ],
)
def test_answers_are_found_in_replies(reply: str, kind: Any, answer: str | None) -> None:
    assert found_in(reply, kind) == answer
    assert answer is None or stated(answer, kind) == answer


def test_costs_of_texts_are_those_of_plain_float64_passes(little: Asking) -> None:
    texts = ["context : land3 has town5 . question land3 ? town5 .", "quiz land7 ? town1", "memo : land1 has town2 ."]
    model = little.model.double()
    try:
        wanted = []
        for text in texts:
            ids = torch.tensor([little.tokenizer(text).input_ids])
            with torch.no_grad():
                logp_TV = model(ids).logits[0, :-1].log_softmax(-1).numpy()
            said_T = logp_TV[np.arange(len(logp_TV)), ids[0, 1:]]
            p_TV = np.exp(logp_TV)
            mean_T = (p_TV * logp_TV).sum(1)
            spread_T = np.sqrt((p_TV * (logp_TV - mean_T[:, None]) ** 2).sum(1))
            least = max(1, int(0.2 * len(said_T)))
            bytes_ = len(zlib.compress(text.encode()))
            standard_T = np.sort((said_T - mean_T) / spread_T)[:least]
            means = [((said_T - mean_T) / spread_T).mean(), np.sort(said_T)[:least].mean(), standard_T.mean()]
            wanted.append([-said_T.mean(), -said_T.sum() / bytes_, *means])
    finally:
        little.model.float()
    found = [
        [row[name] for name in ("nats", "zlib", "standard", "min_k", "min_k_pp")] for row in likelihoods(little, texts)
    ]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def made_up(rng: np.random.Generator, items: int = 60, recited: int = 0, sooner: int = 0, solved: float = 0.5) -> Any:
    """Rows of items with eight variants: the first ``recited`` answer variants as originals, the next are cheaper."""
    rows = []
    for n in range(items):
        level = rng.normal(2, 0.5)
        for place in range(9):
            answer, own = str(100 * n + place), rng.random() < solved
            found = answer if own else str(100 * n + int(rng.integers(9)))
            cost = level + rng.normal(0, 0.2)
            if n < recited and place:
                found = str(100 * n)
            elif recited <= n < recited + sooner and not place:
                cost -= 1.5
            label = ("right" if found == answer else "wrong") if not place else "neither"
            label = "solved" if place and found == answer else "recited" if place and found == str(100 * n) else label
            rows.append({"item": f"i{n}", "place": place, "answer": answer, "found": found, "label": label})
            rows[-1] |= {"nats": cost, "zlib": cost, "standard": -cost, "min_k": -cost, "min_k_pp": -cost}
    return pd.DataFrame(rows)


def test_what_is_recited_is_accused_and_hardly_anything_else() -> None:
    rng, false, found = np.random.default_rng(0), 0, 0
    for _ in range(20):
        table = verdicts(evidence(made_up(rng, recited=5, sooner=5)))
        accused = (table["verdict"] == "recited").to_numpy()
        found, false = found + accused[:10].sum(), false + accused[10:].sum()
    assert found >= 190
    assert false <= 20, "of a thousand clean items ten are expected"


def test_variants_of_accused_items_are_nothing_to_hold_others_against() -> None:
    values = pd.Series({f"i{n}": float(n < 4) * (9 - n) for n in range(40)})
    clean = {f"i{n}": [0.01 * n] * 10 for n in range(4, 40)}
    pseudo = {f"i{n}": [8.5] * 4 * (n == 0) + [0.0] * (10 - 4 * (n == 0)) for n in range(4)} | clean
    once = [(1 + sum(one >= value for of in pseudo.values() for one in of)) / 401 for value in values]
    found = dict(zip(values.index, _by_rank(values, pseudo, 0.009), strict=True))
    assert once[:4] == [1 / 401] + [5 / 401] * 3, "three are above the level as long as the first one's count"
    assert [found[f"i{n}"] for n in range(4)] == [1 / 361] * 4
    few = {item: of[:2] for item, of in pseudo.items()}
    assert _by_rank(values, few, 0.009)[0] == 1 / 81, "too few would be left"
    unknown = pd.Series({"i0": math.nan})
    assert _by_rank(unknown, {"i0": [math.nan]}, 0.009).tolist() == [1.0]


def test_a_model_that_says_one_answer_to_everything_recites_nothing() -> None:
    rows = made_up(np.random.default_rng(3), solved=0.0).assign(found="0")
    rows["label"] = np.where(rows["place"] > 0, np.where(rows["item"] == "i0", "recited", "neither"), "wrong")
    table = evidence(rows)
    assert (table.loc["i0", "recited"], table.loc["i0", "p_recited"]) == (8, 1.0)
    part = rows["item"].isin(["i0", "i1"])
    rows.loc[~part, "found"] = rows.loc[~part, "answer"]
    assert evidence(rows).loc["i0", "p_recited"] < 1e-6, "others are answered otherwise"


def test_a_summary_says_what_is_left_of_the_score() -> None:
    rows = made_up(np.random.default_rng(1), recited=10, solved=1.0)
    table = verdicts(evidence(rows))
    told = summary(table)
    counted = table["verdict"].value_counts().to_dict()
    assert told["verdicts"] == {"recited": 0, "solved": 0, "neither": 0, "cannot tell": 0} | counted
    assert set(told["accused"]) >= {f"i{n}" for n in range(10)}
    left = 50 / 60  # variants of the first ten are all recited, of others all solved
    assert (told["originals"].estimate, told["without_recited"].estimate) == (1.0, pytest.approx(left))
    assert told["fresh"].estimate == pytest.approx(50 / 60)
    assert told["inflation"].estimate == pytest.approx(10 / 60)
    assert not any("cut" in line for line in in_words(told | {"cut": 0.05}))
    assert "50 % of replies were cut before they stated an answer; give them more tokens" in in_words(
        told | {"cut": 0.5}
    )
    few = verdicts(evidence(rows[rows["place"] < 3]))
    assert set(few["verdict"]) == {"cannot tell"}


def test_costs_against_another_checkpoint_leave_out_what_is_likely_to_any() -> None:
    rng = np.random.default_rng(2)
    rows = made_up(rng)
    rows.loc[rows["place"] == 0, "nats"] -= 1.5  # originals have commoner words
    rows["standard"] = -rows["nats"]
    assert (verdicts(evidence(rows))["verdict"] == "recited").mean() > 0.9
    nats_N = rows["nats"] + rng.normal(0, 0.1, len(rows))
    reference = rows.assign(nats=nats_N, standard=-nats_N)
    assert (verdicts(evidence(rows, reference))["verdict"] == "recited").mean() < 0.1


# --- a run ------------------------------------------------------------------------------------------------------------


def test_an_audit_goes_on_where_it_was_stopped_and_says_the_same(
    little: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item for item in items_of(LittleFacts(), 4, 0) if len(item.variants) == 4]
    whole = ms.audit(little.model, little.tokenizer, items, tmp_path / "whole")
    calls = []

    def stopped(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows_of(*given)

    monkeypatch.setattr("mnemoscope.auditing.run.rows_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        ms.audit(little.model, little.tokenizer, items, tmp_path / "parts")
    parts = ms.audit(little.model, little.tokenizer, items, tmp_path / "parts")
    assert len(calls) == 2 + -(-(len(items) - 1) // 4), "the first item alone, then four at a time"
    for name in ("audit/results.json", "audit/items.csv", "audit.html"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert str(parts) == str(whole)
    with pytest.raises(InputError, match="another items"):
        ms.audit(little.model, little.tokenizer, items[1:], tmp_path / "parts")
    beside = ms.audit(little.model, little.tokenizer, items, tmp_path / "beside", against=tmp_path / "whole")
    assert beside.table["sooner"].isna().all(), "of the same model's costs nothing is left"
    page = (tmp_path / "whole" / "audit.html").read_text()
    assert page.count("<svg") == 2
    assert all(item.item in page for item in items)


def test_labels_are_those_of_what_the_model_writes(little: Asking) -> None:
    (item,) = items_of(LittleFacts(), 4, 0)[:1]
    rows = rows_of(little, Form("short", tokens=4), [item])
    for row, asked in zip(rows, (item, *item.variants), strict=True):
        inputs = little.tokenizer([asked.prompt], return_tensors="pt")
        ids = little.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        text = little.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert row["reply"] == text
        own, other = normal(asked.answer, "short"), normal(item.answer, "short")
        said = found_in(text, "short")
        wanted = ("solved" if said == own else "recited" if said == other else "neither") if row["place"] else None
        assert row["label"] == (wanted or ("right" if said == own else "wrong"))
    assert not any(row["cut"] for row in rows), "a reply of a few tokens is its answer alone"
    for row in rows_of(little, Form("number", "{prompt} w", 18), [replace(item, variants=item.variants[:1])]):
        inputs = little.tokenizer([f"{row['prompt']} w"], return_tensors="pt")
        ids = little.model.generate(**inputs, max_new_tokens=18, do_sample=False, pad_token_id=0)
        assert row["cut"] == (ids[0, -1].item() not in end_ids(little.model, little.tokenizer))
    assert states_one("so 3 + 4 = 7. #### 7", "number")
    assert not states_one("so 3 + 4 =", "number")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "nothing.jsonl"], "does not exist"),
        (["--items", "fakts"], "did you mean"),
        (["--items", "facts", "--form", "Question:"], "has no {prompt}"),
    ],
)
def test_a_command_that_cannot_be_run_says_so_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["audit", "nowhere", *arguments, "-o", str(tmp_path / "run")])
    assert found.exit_code == 2
    assert message in found.output or "model" in found.output
    assert not (tmp_path / "run").exists()


def test_items_of_which_nothing_can_be_said_are_refused(little: Asking, tmp_path: Path) -> None:
    plain = [Item("a", "question land1 ?", "town1")]
    alike = [Item("a", "question land1 ?", "Town1", (Variant("quiz land1 ?", "town1."),))]
    for items, message in (
        *(([], "items: none"), (plain, "has variants"), (plain * 2, "one name")),
        (alike, "has the original's answer: 'town1.' is town1"),
    ):
        with pytest.raises(InputError, match=message):
            ms.audit(little.model, little.tokenizer, items, tmp_path / "x")
    letters = [Item("a", "question land1 ?", "A", (Variant("quiz land1 ?", "B"),))]  # it answers with towns
    with pytest.raises(InputError, match=r"none is found in 2 of 2 replies, such as"):
        ms.audit(little.model, little.tokenizer, letters, tmp_path / "y", sizes={"answers": "choice", "tokens": 4})
    assert not (tmp_path / "x").exists()
