"""An arena from its lists to its page: what is frozen, how settings are chosen, resuming, results, and bad input."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import arena
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mnemoscope as ms
from arena_lists import SIZES
from little_facts import LittleFacts
from mnemoscope.behaviour import PLAIN, Asking, Prompting, Scores
from mnemoscope.bench import choose
from mnemoscope.bench import run as runs
from mnemoscope.bench.lists import DrawnBench, Lists
from mnemoscope.cli import app
from mnemoscope.config import parse_arena
from mnemoscope.interventions import Intervention, SteeringVector, Toward
from mnemoscope.report import build_arena
from mnemoscope.report.rows import parts_of, to_json
from mnemoscope.report.stories.arena import ArenaRecords, results_of
from mnemoscope.report.words import percent
from mnemoscope.runs.digests import write_marker
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.locks import locked

CHAT = Prompting(chat=True)
CHEAP = ("prompt", "cad", "caa", "nmd", "low-rank")


def run(little: Asking, out: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"task": LittleFacts(), "methods": CHEAP, "sizes": SIZES, **changes}
    page = ms.arena(little.model, little.tokenizer, out=out, **given)
    assert page == out / "arena.html"
    return dict(json.loads((out / "arena" / "results.json").read_text()))


@pytest.fixture(scope="module")
def finished(little: Asking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arena")
    run(little, out)
    return out


def test_the_test_set_is_frozen_before_anything_is_applied(little: Asking, finished: Path) -> None:
    results = json.loads((finished / "arena" / "results.json").read_text())
    table = pd.read_parquet(finished / "arena" / "set.parquet")
    task = LittleFacts()
    assert set(table["group"].map(task.split_of)) == {"test"}
    assert results["known"] == 48
    counts = table["list"].value_counts().to_dict()
    assert counts == results["lists"]
    assert set(table.loc[table["list"] == "conflict", "kind"]) == {"conflict"}
    for kept in ("agreeing", "bare"):
        assert set(table.loc[table["list"] == kept, "unsteered"]) == {"correct"}
    assert {"longer text", "few-shot", "instruction in French", "both answers", "paraphrase"} <= set(counts)
    for name in (*CHEAP, "unsteered"):
        answers = pd.read_parquet(finished / "arena" / f"{name}-answers.parquet")
        for (_, listed, _, _), part in answers.groupby(["toward", "list", "role", "draw"]):
            assert len(part) == counts[listed], (name, listed)


def test_no_group_is_fitted_on_and_judged(little: Asking) -> None:
    bench = DrawnBench.of(little, LittleFacts(), parse_arena(SIZES))
    groups = {
        "fit": {e.group for prompts in bench.fit.values() for e in prompts.examples},
        "tune": {e.group for prompts in bench.tune.values() for e in prompts.examples},
        "test": {e.group for prompts in bench.test.values() for e in prompts.examples},
    }
    assert not groups["fit"] & groups["tune"]
    assert not groups["fit"] & groups["test"]
    assert not groups["tune"] & groups["test"]
    assert {pair.group for pair, _ in bench.pairs} <= groups["fit"]


@pytest.mark.parametrize("toward", ["generalized", "memorized"])
def test_results_follow_from_the_records(finished: Path, toward: str) -> None:
    records = ArenaRecords.of(finished / "arena")
    results = results_of(records)
    written = (finished / "arena" / "results.json").read_text()
    assert to_json(parts_of(json.loads(written))) == written == to_json(results)
    right = {name: records.hits(name, Toward(toward), "wanted").mean(0) for name in CHEAP}
    assert results.winner[toward] in CHEAP
    best = results.best[toward]
    assert (best.words, best.passes, best.adapter) == ("prompt", "cad", None)
    assert best.hooks in set(CHEAP) - {"prompt", "cad"}
    for name in CHEAP:
        found = results.methods[name][toward]
        assert found.wanted.estimate == pytest.approx(np.mean(right[name]))
        assert found.wanted.estimate + found.opposite.estimate + found.neither.estimate == pytest.approx(1)
        lists = {one: records.rows(name, toward, one).behaviour for one in ("conflict", "agreeing", "bare")}
        shares = [np.mean(lists[one] == (toward if one == "conflict" else "correct")) for one in lists]
        assert found.mix.thirds.estimate == pytest.approx(np.mean(shares))
        assert found.mix["20 %"].estimate == pytest.approx(0.2 * shares[0] + 0.4 * shares[1] + 0.4 * shares[2])
        fits, taught = results.methods[name].fits, name == "low-rank"
        assert fits == 2 if taught else fits in (1, 2)
        drawn = {"gaussian": 2 * fits} if name not in ("prompt", "cad") else {}
        drawn |= {"permuted_answers": 1} if taught else {}
        assert {role: control.draws for role, control in found.controls.items()} == drawn
        assert set(found.tests) >= {"prompt", "cad"} - {name}
        for baseline, test in found.tests.items():
            difference = np.mean(right[name] - right[baseline])
            assert test.difference.estimate == pytest.approx(difference)
            assert test.p_holm >= test.p
    assert np.isnan(results.methods.cad[toward].divergence.first)
    assert np.isfinite(results.methods.nmd[toward].divergence.first)


def test_a_gate_leaves_answers_as_they_were_where_it_does_not_act(finished: Path) -> None:
    """A gate that acts on every second prompt in place of the run's own."""
    records = ArenaRecords.of(finished / "arena")
    assert records.frame["no_gate"] == ""
    assert records.frame["gates"] == ["whole", "behaviour", "early", "asked"]
    records = replace(records, set=records.set.assign(whole_generalized=np.arange(len(records.set)) % 2.0))
    results = results_of(records)
    for name in CHEAP:
        right = []
        for listed in ("conflict", "agreeing", "bare"):
            acts = records.set.loc[records.set["list"] == listed, "whole_generalized"].to_numpy()
            rows, own = records.rows(name, "generalized", listed), records.labels("unsteered", "generalized", listed)
            side = "generalized" if listed == "conflict" else "correct"
            mine = zip(rows.behaviour, rows.example, strict=True)
            right.append(np.mean([(label if acts[n] else own[n]) == side for label, n in mine]))
        found = results.methods[name].generalized
        assert found.gated.whole.thirds.estimate == pytest.approx(np.mean(right))
        by_gate = found.tune.by_gate
        assert by_gate[found.default.gate] == max(by_gate.values())
        assert found.default.mix == (found.gated[found.default.gate] if found.default.gate else found.mix)
    rows = records.set[records.set["list"] == "conflict"]
    acting, needed = results.gates.whole.generalized, rows["unsteered"] == "memorized"
    assert acting.needed.estimate == pytest.approx(rows.loc[needed, "whole_generalized"].mean(), nan_ok=True)
    assert acting.conflict.estimate == pytest.approx(rows["whole_generalized"].mean())


def test_the_page_and_its_markdown_show_every_method(finished: Path) -> None:
    page = build_arena(finished, beside=[finished]).read_text()
    assert page.count("<svg") == 6  # of either arena, and of their model
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "To memory: answers" in page
    results = results_of(ArenaRecords.of(finished / "arena"))
    printed = "\n".join(arena.page([results, results]))
    for name in (*CHEAP, "unsteered"):
        assert f'<th scope="row">{name}</th>' in page
        assert f"| {name} | " in printed
    aims = printed.split("## Aims")[1].split("## ")[0]
    for toward in ("generalized", "memorized"):
        (ours,) = [name for name in arena.OURS if name in CHEAP]  # so it is the best of ours
        difference = results.methods[ours][toward].tests.prompt.exact
        assert aims.count(f"| {toward} | {ours} ") == 2
        assert f"prompt {100 * difference.estimate:+.0f} ({100 * difference.low:+.0f} to " in aims
    assert "| no worse than the best adapter | 0 of 4 |" in aims  # none was asked for
    kinds = printed.split("## By what is changed")[1].split("## ")[0]
    words = percent(results.methods.prompt.generalized.wanted.estimate)
    assert f"| a sentence in the prompt | {words} ({words} to {words}) |" in kinds
    build_arena(finished)


def test_a_killed_arena_goes_on_where_it_stopped(little: Asking, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("nmd.json", "nmd-answers.parquet", "results.json"):  # a first fit, whatever was fitted again
        (out / "arena" / name).unlink()
    stamp = (out / "arena" / "cad.json").stat().st_mtime_ns
    before = pd.read_parquet(finished / "arena" / "nmd-answers.parquet")
    seen: list[str] = []
    run(little, out, progress=lambda cell, stage, *_: seen.append(stage))
    assert seen == ["frame", "nmd", "page"]
    assert (out / "arena" / "cad.json").stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(pd.read_parquet(out / "arena" / "nmd-answers.parquet"), before)
    seen.clear()
    run(little, out, progress=lambda cell, stage, *_: seen.append(stage))
    assert seen == []
    with pytest.raises(InputError, match=r"out: .* holds an arena whose sizes is"):
        run(little, out, sizes=SIZES | {"conflicts": 20})
    (out / "arena" / "nmd.json").unlink()
    table = pd.read_parquet(out / "arena" / "set.parquet")
    table.assign(prompt=table["prompt"].shift(1, fill_value="?")).to_parquet(out / "arena" / "set.parquet", index=False)
    write_marker(out / "arena", "frame", [out / "arena" / name for name in ("set.parquet", "frame.json")])
    with pytest.raises(InputError, match="holds an arena on another frozen set"):
        run(little, out)


def test_two_arenas_in_one_folder_do_not_meet(little: Asking, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in sorted((out / "arena").rglob("*.parquet"))}
    with locked(out / "arena", lambda: True), pytest.raises(InputError, match="is in use by another run"):
        run(little, out)
    run(little, out)
    assert before == {path: path.read_bytes() for path in sorted((out / "arena").rglob("*.parquet"))}


def test_the_choice_is_that_of_trying_everything(bench: DrawnBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worth is wanted less lost; a candidate is not asked what it loses once it cannot win any more."""
    shares = {"a": (0.9, 0.5), "b": (0.7, 1.0), "c": (0.5, 1.0), "d": (0.7, 0.9)}
    asked: list[tuple[str, str]] = []

    class Named(list):  # type: ignore[type-arg]
        name, groups = "", tuple(map(str, range(10)))

    def named(name: str) -> Any:
        made = Named(range(10))
        made.name = name
        return made

    def scores(one: Intervention, prompts: Any, **_: Any) -> Scores:
        asked.append((one.method, prompts.name))
        wanted, kept = shares[one.method]
        found = Scores.empty(10)
        label, share = ("generalized", wanted) if prompts.name == "conflict" else ("correct", kept)
        found.behaviour_N = np.array([label if n < round(10 * share) else "other" for n in range(10)], dtype=object)
        return found

    monkeypatch.setattr(choose, "scores", scores)
    lists = Lists(named("conflict"), {name: (named(name), "correct") for name in ("agreeing", "bare")})
    tried = [Intervention(method=name, toward="generalized") for name in shares]
    rated = [choose.rate(one, lists.targets, place) for place, one in enumerate(tried)]
    found = choose.choose(bench, lists, rated, choose.Rule(errors=0.0))
    assert found[0].one.method == "b"
    assert found[0].worth == pytest.approx(0.7)
    assert [tuned.one.method for tuned in found] == ["b"]
    assert ("c", "bare") not in asked


@pytest.mark.parametrize(
    ("rises_to", "scaled", "at_end"), [(1.5, 1.5, False), (0.5, 0.4444, False), (9.0, 5.0625, True)]
)
def test_no_choice_is_where_a_grid_ends(
    bench: DrawnBench, monkeypatch: pytest.MonkeyPatch, rises_to: float, scaled: float, at_end: bool
) -> None:
    """Of what is better the nearer its strength is to ``rises_to``, stronger and weaker forms are tried."""

    def scores(one: Any, prompts: Any, **_: Any) -> Scores:
        found = Scores.empty(100)
        wanted = round(100 - 10 * abs(one.strength - rises_to))
        found.behaviour_N = np.array(["generalized" if n < wanted else "other" for n in range(100)], dtype=object)
        return found

    monkeypatch.setattr(choose, "scores", scores)
    targets: Any = type("Named", (list,), {"groups": tuple(map(str, range(100)))})(range(100))
    lists, rule = Lists(targets, {}), choose.Rule(errors=0.0)
    one = SteeringVector("generalized", {0: torch.ones(64)}, setting={"layer": 0})
    (best,) = choose.choose(bench, lists, [choose.rate(one, targets)], rule)
    found, ended = choose.searched_on(bench, lists, best, rule)
    assert (found.one.setting, ended) == ({"layer": 0, "scaled": scaled}, at_end)
    assert isinstance(found.one, SteeringVector)
    assert found.one.strength == pytest.approx(scaled, abs=1e-3)
    words = Intervention(toward="generalized")  # what has no strength is as it is
    monkeypatch.setattr(choose, "scores", lambda *_, **__: scores(one, targets))
    (asked,) = choose.choose(bench, lists, [choose.rate(words, targets)], rule)
    assert choose.searched_on(bench, lists, asked, rule) == (asked, False)


def test_further_fits_differ_and_processes_give_the_records_of_one(
    little: Asking, finished: Path, shared_folder: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "task": LittleFacts(),
        "methods": ("prompt", "low-rank"),
        "sizes": SIZES,
        "name": "GPT2LMHeadModel",
    }
    ms.arena(shared_folder / "little", out=tmp_path, workers=2, **given)
    for name in ("prompt", "low-rank", "low-rank@2"):
        mine, theirs = (pd.read_parquet(out / "arena" / f"{name}-answers.parquet") for out in (tmp_path, finished))
        pd.testing.assert_frame_equal(mine, theirs)
    first, again = (DrawnBench.of(little, LittleFacts(), parse_arena(SIZES)).again(number) for number in (0, 1))
    assert [e.prompt for e in first.fit_conflicts.examples] != [e.prompt for e in again.fit_conflicts.examples]
    assert [e.prompt for e in first.test["conflict"].examples] == [e.prompt for e in again.test["conflict"].examples]
    with pytest.raises(InputError, match="workers: 2; an open model is in one process"):
        run(little, tmp_path / "open", workers=2)


def test_what_was_fitted_elsewhere_is_judged_here_as_it_is(little: Asking, finished: Path, tmp_path: Path) -> None:
    results = parts_of(run(little, tmp_path, methods=("low-rank",), sizes=SIZES | {"fits": 1}, carry=[finished]))
    carried = [f"{name}-from-little-facts" for name in ("caa", "low-rank", "nmd")]
    assert list(results.methods) == ["low-rank", *carried]
    for name in carried:
        method, origin = results.methods[name].carried
        mine, theirs = (
            pd.read_parquet(out / "arena" / f"{one}-answers.parquet").query("draw == -1").reset_index(drop=True)
            for out, one in ((tmp_path, name), (finished, method))
        )
        pd.testing.assert_frame_equal(mine, theirs)
        assert origin == "little-facts"
    for toward in Toward:
        here, there = (results.methods[name][toward] for name in ("low-rank", carried[1]))
        gained = there.wanted.estimate - results.unsteered[toward].wanted.estimate
        assert there.kept_gain.wanted == pytest.approx(1.0) if gained > 0 else np.isnan(there.kept_gain.wanted)
        assert "kept_gain" not in here
        assert results.winner[toward] == "low-rank"
    assert "fitted elsewhere" in (tmp_path / "arena.html").read_text()


def test_what_cannot_be_fitted_is_left_out_and_named(
    little: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = LittleFacts(bares=False)
    sizes = SIZES | {"varied": 0, "written": 0, "cuts": 0}
    with pytest.raises(InputError, match="cad: task 'little-facts' has no bare question"):
        run(little, tmp_path / "asked", task=task, methods=("cad",), sizes=sizes)
    monkeypatch.setattr(runs, "method_names", lambda: ["cad", "caa"])
    results = run(little, tmp_path / "all", task=task, methods=None, sizes=sizes)
    assert list(results["left_out"]) == ["cad"]
    assert list(results["methods"]) == ["caa"]


def test_the_command_runs_an_arena_and_rebuilds_its_page(little: Asking, shared_folder: Path, tmp_path: Path) -> None:
    sizes = SIZES | {"varied": 0, "written": 0, "cuts": 0}
    given = [f"--size={name}={value}" for name, value in sizes.items()]
    model, out = str(shared_folder / "little"), str(tmp_path / "run")
    command = ["arena", model, "--task", "little_facts:LittleFacts", "-o", out, "--method", "caa", *given, "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    results = json.loads(Path(found["results"]).read_text())
    assert list(results["methods"]) == ["caa"]
    assert Path(found["page"]).is_file()
    Path(found["page"]).unlink()
    again = CliRunner().invoke(app, ["report", out, "--beside", out, "--json"])
    assert again.exit_code == 0, again.output
    assert Path(found["page"]).read_text().count("<svg") == 6
    refused = CliRunner().invoke(app, [*command[:6], "--method", "cda"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: methods: 'cda' is not one of cad, gradient")


def test_a_chat_model_that_is_asked_raw_is_told_of(little: Asking, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = copy.deepcopy(little.tokenizer)
    for template, asked, told in ((None, PLAIN, 0), ("{{ messages }}", PLAIN, 1), ("{{ messages }}", CHAT, 0)):
        tokenizer.chat_template = template
        caplog.clear()
        assert runs._warned(asked, tokenizer) is asked
        assert len(caplog.messages) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("cda",)}, r"methods: 'cda' is not one of cad, gradient"),
        ({"sizes": {"conflicts": 2}}, r"conflicts: Input should be greater than or equal to 6 \(got 2\)"),
        ({"sizes": {"conflict": 20}}, r"conflict: Extra inputs are not permitted"),
        ({"task": None}, r"task: None; give"),
        ({"task": "none.jsonl"}, r"task: the file none.jsonl does not exist"),
        ({"carry": ["none"]}, r"carry: none holds no arena"),
        ({"methods": ("mylab.gradient",)}, r"methods: 'mylab.gradient' has the name of a method that is built in"),
        ({"sizes": {"varied": 0, "long": 500}}, r"varied: 0, and long texts are amid these prompts"),
        ({"opening": {"dtype": "bfloat16"}}, r"opening: not for an open model"),
        ({"size": {}}, r"size: arena has no such argument; it has sizes, prompting"),
    ],
)
def test_bad_input_is_one_line(little: Asking, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        run(little, tmp_path, **changes)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_too_few_groups_and_nothing_known_are_refused(little: Asking, tmp_path: Path) -> None:
    class Few(LittleFacts):
        def examples(self, rng: Any, n: int, kind: Any) -> list[Any]:
            return [e for e in super().examples(rng, n, kind) if e.split != "test" or e.group in ("land0", "land1")]

    class Foreign(LittleFacts):
        def facts_to_know(self) -> list[Any]:
            return [e for e in super().facts_to_know() if e.answer == " nothing"] or [
                ms.Example(e.item, e.prompt, "memory", e.group, answer=" town0" if e.answer != " town0" else " town1")
                for e in super().facts_to_know()
            ]

    with pytest.raises(InputError, match=r"task: the test split has conflicts of \d groups .* at least 6 are needed"):
        run(little, tmp_path, task=Few(known=False))
    with pytest.raises(InputError, match="it knows none of the task's facts by heart"):
        run(little, tmp_path, task=Foreign())
    with pytest.raises(InputError, match="holds no arena"):
        ArenaRecords.of(tmp_path / "arena")
