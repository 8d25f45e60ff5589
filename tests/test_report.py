"""The page: bytes, damaged records, sentences and their verdicts, and how it looks in a browser."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import claims
import numpy as np
import pandas as pd
import printing
import pytest
import review

from made_up import SOURCE, mark, results_of, write_json, write_run
from mnemoscope.report import build_report, summary_of
from mnemoscope.report.drawing import canvas, draw
from mnemoscope.report.page import tint
from mnemoscope.report.records import read_run
from mnemoscope.report.results import compute_results
from mnemoscope.report.rows import Part, over_all, rows_of, view
from mnemoscope.report.stories import holds, read, steer_page
from mnemoscope.report.stories.behaviour import difference
from mnemoscope.report.stories.cost import measure_kept
from mnemoscope.report.summary import verdict
from mnemoscope.report.words import TOWARDS, control_names, interval, percent, points, ranged
from mnemoscope.runs.processes import in_processes
from mnemoscope.statistics import Estimate, proportion

PAGES = ("results.json", "report.html")


@pytest.fixture(scope="module")
def nothing_flips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a single pair; reported."""
    folder = write_run(tmp_path_factory.mktemp("report") / "nothing", {"inference": {"flips": False, "size": 60}})
    build_report(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Only the cell of addition, to be changed."""
    ignored = shutil.ignore_patterns("inference-*", "transfer_*", "seeds.parquet")
    copied = shutil.copytree(run, tmp_path / "copy", ignore=ignored)
    mark(copied)
    return copied


def edit(run: Path, name: str, change: Any) -> None:
    path = run / "cells" / "addition-0" / "records" / f"{name}.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    mark(run)


def test_equal_records_give_equal_bytes_wherever_they_are_computed(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(*PAGES))
    manifest = json.loads((again / "manifest.json").read_text())
    write_json(again / "manifest.json", manifest | {"finished": "2031-01-01T00:00:00Z", "seconds": 99.0})
    mark(again)
    with in_processes(2) as parallel:
        build_report(again, parallel)
    assert [(again / name).read_bytes() for name in PAGES] == [(run / name).read_bytes() for name in PAGES]


# One table is read like another.
BROKEN = ("records/training.parquet", "records/steering.parquet", "records/chosen.json", "contrast.safetensors")


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    (svg,) = draw("dollar", "what it costs", [lambda: canvas(100, "5 $ or \\frac{ 6 $")[0]])
    assert "5 $ or \\frac{ 6 $" in svg


@pytest.mark.parametrize("file", BROKEN)
def test_a_damaged_record_is_named_in_one_line(copy: Path, file: str) -> None:
    path, before = copy / "cells" / "addition-0" / file, (copy / "report.html").read_bytes()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for _ in ("cut", "gone"):
        with pytest.raises(ValueError, match=re.escape(file)) as error:
            build_report(copy)
        assert "\n" not in str(error.value)
        path.unlink(missing_ok=True)
    assert (copy / "report.html").read_bytes() == before


def test_contradictions_between_records_are_named(copy: Path) -> None:
    state = "kind == 'state' and layer == 2"
    edit(copy, "probes", lambda rows: rows.drop(index=rows.query(state).index[0]))
    with pytest.raises(ValueError, match=r"probes\.parquet: the states of layer 2, offset 0 are not those of 'inp"):
        build_report(copy)
    edit(copy, "pairs", lambda rows: rows.drop(columns="margin_b"))
    with pytest.raises(ValueError, match=r"pairs\.parquet: column 'margin_b' is missing"):
        build_report(copy)


def test_cells_that_are_only_trained_are_no_part_of_the_report(run: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("inference-1"))
    donor = mine / "cells" / "inference-0"
    write_json(donor / "cell.json", json.loads((donor / "cell.json").read_text()) | {"analysed": False})
    shutil.rmtree(donor / "records")
    shutil.rmtree(mine / "records")
    mark(mine)
    results = compute_results(read_run(mine))
    assert (list(results.tasks), results.seeds, results.transfer) == (["addition"], {}, {})


def test_nothing_of_torch_is_imported(nothing_flips: Path) -> None:
    code = "import sys, mnemoscope.report as r; r.build_report(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(nothing_flips)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Page(HTMLParser):
    """Every opening tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("which", ["run", "nothing_flips"])
def test_the_page_loads_nothing_and_can_be_read_aloud_and_linked(which: str, request: pytest.FixtureRequest) -> None:
    text = (request.getfixturevalue(which) / "report.html").read_text()
    tags = Page(text).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), attributes
    assert re.findall(r"@import|url\((?!#)|https?:", text) == []
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    identifiers = [attributes["id"] for _, attributes in tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))
    links = {str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"}
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert set() < links <= set(identifiers)
    assert drawings
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 30 for a in drawings)
    assert all(attributes.get("scope") for tag, attributes in tags if tag == "th")


def test_undefined_numbers_say_why(nothing_flips: Path) -> None:
    text = (nothing_flips / "report.html").read_text()
    assert text.count("None of 360\u00a0candidates flipped, so there are no pairs to compare.") >= 3
    assert not re.findall(r"\bnan\b", re.sub(r"<[^>]*>", " ", text), flags=re.IGNORECASE)


def test_a_users_own_file_on_a_model_that_was_not_trained_here(copy: Path) -> None:
    """Conflicts only, all neurons chosen: what does not exist is NaN in the numbers and in words on the page."""
    cell = copy / "cells" / "addition-0"
    info = json.loads((cell / "cell.json").read_text())
    write_json(cell / "cell.json", info | {"task": "jsonl", "label": "capitals", "trained": False, "documents": True})
    mark(copy)
    edit(copy, "behaviour", lambda rows: rows[rows.kind == "conflict"])
    kept = "examples not in ['novel', 'memory'] and role != 'random_neurons'"
    edit(copy, "steering", lambda rows: rows.query(kept))
    text = build_report(copy).read_text()
    task = compute_results(read_run(copy)).tasks["capitals"]
    block = task.steering["to_memorized"]
    control = block.controls["random_neurons"]
    absent = [task.behaviour.recall, block.collateral["novel"], control.pairs.shift, control.worst["conflict"].other]
    assert not any(entry.known for entry in [*absent, block.minus_control["random_neurons"]["pairs"]])
    assert block.controls["gaussian"].pairs.shift.known
    assert math.isnan(task.training["seconds"][0])
    assert "This model was loaded, not trained here" in text
    assert ">capitals</h2>" in text
    assert not re.findall(r"\bnan\b", re.sub(r"<[^>]*>", " ", text), flags=re.IGNORECASE)
    assert "to context, vector's strongest control: " in str(summary_of(copy))
    words = re.sub(r"<[^>]*>", "", text[: text.index("What the words mean")])
    assert not re.findall(r"\b(remember\w*|work\w* (?:it )?out)\b", words)  # which is for sums


def test_what_a_record_holds_is_text_and_never_markup(copy: Path) -> None:
    edit(copy, "pairs", lambda rows: rows.assign(prompt_a="<script>alert(1)</script> " + rows.prompt_a))
    text = build_report(copy).read_text()
    assert "<script" not in text
    assert tint("<b> remembered") == '&lt;b&gt; <span class="memorized">remembered</span>'


@pytest.mark.parametrize(
    ("a", "b", "moved"),
    [
        ("A is red . B is blue . who ?", "B is blue . A is red . who ?", ["A is red", "B is blue"]),
        ("123+456=", "456+123=", ["123", "456"]),
        ("12+34=", "12 plus 34 is ", ["+", "="]),
    ],
)
def test_what_differs_between_two_phrasings(a: str, b: str, moved: list[str]) -> None:
    first, second = difference(a, b)
    assert ("".join(text for text, _ in first), "".join(text for text, _ in second)) == (a, b)
    assert [text for text, what in first if what] == moved


UNDEFINED = Estimate.undefined()


def estimate(middle: float, low: float, high: float) -> Estimate:
    return Estimate(middle, low, high, 100)


def test_numbers_in_words() -> None:
    shares = {0.634: "63", 0.004: "0.4", 0.9961: "99.6", 0.0001: "under 0.1", 0.9999: "over 99.9", 1.0: "100"}
    assert [percent(share) for share in shares] == [f"{text}\u00a0%" for text in shares.values()]
    assert percent(math.nan) == "not measured"
    assert interval(estimate(0.9, 0.6, 1.2)) == "60\u00a0to\u00a0100\u00a0%"  # t may leave what a share can be
    assert interval(estimate(0.009, 0.006, 0.012)) == "0.6\u00a0to\u00a01.2\u00a0%"
    assert interval(estimate(0.9, math.nan, math.nan)) == "no interval"
    assert ranged(estimate(0.339, 0.333, 0.347)) == "33.9\u00a0% (33.3\u00a0to\u00a034.7\u00a0%)"
    assert [points(x) for x in (0.01, -0.004, 0.094)] == ["1\u00a0point", "0\u00a0points", "9\u00a0points"]


@pytest.fixture
def task(run: Path) -> Part:
    """The results of the task whose numbers are then replaced."""
    return results_of(run).tasks["addition"]


@pytest.mark.parametrize(
    ("accuracy", "only", "repeats", "verdict"),
    [
        (0.63, 0.09, 0.1, "A probe reads it, beyond the input"),
        (0.63, 0.01, 0.1, "A probe reads it, not surely beyond the input"),
        (0.63, 0.05, -0.1, "A probe reads it, but the input alone is better"),
        (0.51, -0.09, 0.0, "A probe does not surely read it"),
    ],
)
def test_reading_is_held_against_the_stronger_view_of_the_input(
    task: Part, accuracy: float, only: float, repeats: float, verdict: str
) -> None:
    best, found = task.probe.best, [estimate(x, x - 0.04, x + 0.04) for x in (accuracy, only, repeats)]
    best.accuracy, best.minus_input_only, best.minus_input_repeats = found
    answer = read.answer(task)
    assert answer.verdict == verdict
    assert ("more" if min(only, repeats) >= 0 else "fewer") in answer.note


@pytest.mark.parametrize(
    ("shifts", "beyond", "documents", "verdict"),
    [
        ((0.8, 0.7), (0.5, 0.4), False, "Steering works in both directions"),
        ((0.3, 0.7), (0.2, 0.4), True, "Steering works in part, in both directions"),
        ((0.3, 0.7), (0.0, 0.4), False, "Steering works towards remembering"),
        ((0.7, 0.3), (0.4, 0.0), True, "Steering works to context"),
        ((0.9, 0.8), (0.0, 0.1), False, "Steering does not surely work"),
    ],
)
def test_steering_is_told_of_both_directions_in_words_of_the_task(
    task: Part, shifts: tuple, beyond: tuple, documents: bool, verdict: str
) -> None:
    task.documents = documents
    losses = {"memory": estimate(-0.02, -0.04, 0), "novel": estimate(-0.5, -0.6, -0.4), "conflict_rest": UNDEFINED}
    for direction, shift, difference_ in zip(SOURCE, shifts, beyond, strict=True):
        block = task.steering[direction]
        block.pairs.shift, block.collateral = estimate(shift, shift - 0.05, shift + 0.05), losses
        beyond_it = estimate(difference_, difference_ - 0.15, difference_ + 0.15)
        of_control, sure = estimate(shift - difference_, 0, 1), beyond_it.sign > 0
        block.beside.pairs = Part(shift=of_control, difference=beyond_it, names={"gaussian": 1}, exceeded=sure)
    both = [answer := steer_page.answer(task), *answer.others]
    assert answer.verdict == verdict
    assert [one.number for one in both] == [f"{100 * shift:.0f}\u00a0%" for shift in shifts]
    for one, direction in zip(both, SOURCE, strict=True):
        assert f"steered {TOWARDS[documents][direction]};" in one.sentence
    # Towards remembering, new questions do not count; each loss has its direction.
    assert "-50\u00a0points of new questions" in both[0].note
    assert "-2\u00a0points of facts to recall" in both[1].note


def test_of_a_fit_the_best_lever_is_told_whatever_it_is(task: Part) -> None:
    vector = task.steering.to_generalized
    best = Part({**vector, "pairs": Part({**vector.pairs, "shift": estimate(0.91, 0.8, 0.97)})})
    best.chosen = Part({**vector.chosen, "method": "cad", "lever": "decoding", "passes": 2})
    task.steering_by_method.cad = Part({**task.steering_by_method.gradient, "to_generalized": best})
    task.levers, task.documents = {"to_generalized": "cad", "to_memorized": "gradient"}, True
    answer = steer_page.answer(task)
    assert (answer.verdict[:14], answer.number) == ("Steering works", "91\u00a0%")
    assert "steered to context by contrastive decoding (two passes); " in answer.sentence
    assert "steered to memory; strongest control: " in answer.others[0].sentence


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_page_fits_the_screen(run: Path, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((run / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    shown = tab.evaluate("[...document.querySelectorAll('.hint')].filter(p => p.getClientRects().length).length")
    assert (shown > 0) == (width == 390)  # wide tables say that they go on
    tab.close()


def test_claims_and_tables_are_printed_of_any_run(run: Path, nothing_flips: Path) -> None:
    told = printing.page("claims", claims.sections([run, nothing_flips]))
    assert all(part in told for part in ("| addition (run) | 1 |", "| inference (nothing) | 1 | -"))
    results = results_of(run)
    shared = next(r for r in results.seeds.inference if r.what == "overlap_in_layers" and r.top == 0.1)
    assert f"| inference, block, seeds two by two: 1 (run) | {shared.value.estimate:.2f}" in told
    best = results.tasks.inference.steering.to_generalized
    shift = f"{best.pairs.shift.estimate:.3f} ({best.pairs.shift.low:.2f} to "
    told = printing.page("review", review.sections([run], [run], [run, run]))
    share, seeds = shift.partition(" ")[0], ", ".join(map(str, results.tasks.inference.seeds))
    wanted = f"| inference | 2 | {share} to {share} |", f"to generalized | {seeds} | {shift}", f"| **{shift}"
    assert [part for part in wanted if part not in told] == []
    assert all(f"## {point}" in told for point in ("1 and 3", *map(str, (2, *range(4, 11)))))
    control = max(one.pairs.shift.estimate for one in best.controls.values() if one.pairs.shift.known)
    assert re.search(rf"\| `inference` \| 2 \| {re.escape(shift)}[^|]*, {control:.3f}, ", told)


def within(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 200, 40)


def test_a_claim_holds_or_not_where_its_interval_says_so(run: Path) -> None:
    ends = ((0.8, 0.9), (0.6, 0.79), (0.7, 0.9))
    assert [claims.reaches(within(*each), 0.8) for each in ends] == [True, False, None]
    assert [claims.below(within(low - 0.7, high - 0.6), 0.2) for low, high in ends] == [None, True, None]
    assert claims.reaches(UNDEFINED, 0.8) is claims.below(UNDEFINED, 0.2) is None
    assert [claims.everything(found) for found in ([True, True], [True, None], [None, False])] == [True, None, False]
    task = results_of(run).tasks.inference
    by_seed = iter([True, False, True, True])
    claim = claims.Claim("", lambda cell: ("", None if cell is task else next(by_seed)))
    assert [claims.decided(claim, task)[1] for _ in range(2)] == [None, True]  # two seeds must say the same


def test_a_control_counts_in_the_seeds_that_drew_it_and_random_ones_alone_are_random(run: Path) -> None:
    task = results_of(run).tasks.inference
    first, second = task.per_seed.values()
    for cell in (task, first, second):
        block = cell.steering.to_memorized
        block.pairs.shift = within(0.9, 1.0)
        for name, control in block.controls.items():
            control.exceeded.pairs = cell is not task
            control.pairs.shift = within(0.0, 0.1) if name == "gaussian" else UNDEFINED
    refitted = second.steering.to_memorized.controls.indifference
    refitted.pairs.shift, refitted.exceeded.pairs = within(0.4, 0.5), False
    assert claims.steers("to_memorized", first)[1] is True
    assert claims.steers("to_memorized", second)[1] is None  # neither surely more nor surely less
    refitted.exceeded.pairs = True
    assert claims.steers("to_memorized", task)[1] is True
    for control in second.steering.to_generalized.controls.values():
        control.pairs.shift = UNDEFINED
    assert claims.controls(second) == ("0.05 (0.00 to 0.10), Gaussian; 0.45 (0.40 to 0.50), indifference", True)


def test_a_cell_that_could_not_go_on_counts_where_it_is_asked_for(copy: Path) -> None:
    """Only one that never showed both behaviours: of its task the claims about that are false, others are untouched."""
    facts = json.loads((copy / "results.json").read_text()) | {"seeds": {}, "transfer": {}}
    facts["tasks"] = {"addition": facts["tasks"]["addition"]}
    unmet = "addition-7: after 9 steps the model does not show both behaviours: recall 0.1"
    for failed, told in ({"addition-7": unmet, "addition-8": "its process was lost"}, "0 of 1"), ({}, "1 of 1"):
        (copy / "results.json").write_text(json.dumps(facts | {"failed": failed}))
        found = claims.sections([copy])
        short = {row[0]: row for row in found["In short"][0]["rows"]}
        assert short["Some phrasings of one item flip the behaviour"][2] == f"holds in {told}"
        assert "of 1" in short["A probe predicts the behaviour"][2]
        assert (["addition-7 (copy)", unmet] in found["Cells that could not go on"][0]["rows"]) == bool(failed)


def over_seeds(*seeds: Any) -> Part:
    """What a story measured in each seed, over all."""
    return view(over_all([list(rows_of(found, seed=seed)) for seed, found in enumerate(seeds)]))


def test_over_seeds_each_has_its_own_strongest_control_and_settings_are_not_averaged(task: Part) -> None:
    def beside(name: str, control: float, exceeded: bool = True) -> dict[str, Any]:
        shift, difference = estimate(control, 0, 1), estimate(0.9 - control, 0, 1)
        return {"shift": shift, "difference": difference, "names": {name: 1}, "exceeded": exceeded}

    both = over_seeds(beside("indifference", 0.1), beside("shuffled_labels", 0.2), beside("indifference", 0.3))
    assert both.names == {"indifference": 2, "shuffled_labels": 1}
    assert (both.shift.estimate, both.difference.estimate) == (pytest.approx(0.2), pytest.approx(0.7))
    assert both.exceeded is True
    assert control_names(both) == "indifference in 2, shuffled labels in 1"
    assert over_seeds(beside("gaussian", 0.1), beside("gaussian", 0.1, exceeded=False)).exceeded is False
    names = dict.fromkeys(("random_neurons", "permuted_answers", "indifference", "low_correlation", "random_sign"), 1)
    task.steering.to_generalized.beside.pairs.names = names
    # A label with five names left no room for the axes: a warning.
    steer_page.simpler_panel(task, "to_generalized")().savefig(io.BytesIO(), format="svg")


def test_ranges_of_draws_stay_ranges_and_chance_is_averaged(run: Path) -> None:
    cells = read_run(run).by_label()["inference"]
    each = [view(rows_of(holds.measure(cell))) for cell in cells]
    both = over_seeds(*(holds.measure(cell) for cell in cells)).consistency.halves.overlap
    for top, found in both.items():
        shares, chances = ([one.consistency.halves.overlap[top][key] for one in each] for key in ("share", "chance"))
        assert found.share.high == max(one.high for one in shares)  # not Student's t over two numbers
        assert found.chance.high == pytest.approx(sum(one.high for one in chances) / 2)


def test_a_setting_of_its_own_norm_is_the_first_seeds_beside_all_norms(task: Part) -> None:
    free = task.unpenalized.to_generalized
    assert (free.strength, free.strengths) == (0.4, [0.4])
    free.strengths = [0.1, 0.3]
    (found,) = steer_page.norms_table(task)
    assert found.columns[-2:] == ["at a norm of its own", "which is"]
    assert {len(row) for row in found.rows} == {len(found.columns)}
    assert [row[-1] for row in found.rows if "whatever" in row[0] and "working" in row[0]] == ["0.1, 0.3"]


def test_what_is_lost_is_a_share_of_what_was_right_before(copy: Path) -> None:
    """Gains elsewhere make up for nothing."""
    cells = read_run(copy).by_label()["addition"]
    before = ["correct"] * 4 + ["wrong"] * 4
    after = ["correct", "correct", "correct", "wrong", "correct", "wrong", "wrong", "wrong"]
    rows = pd.DataFrame({"before": before, "after": after, "group": list("abcdefgh")})
    lists = {"memory": rows, "conflict_rest": rows.replace("correct", "memorized")}
    change, lost = measure_kept(cells[0], "to_memorized", lists)
    assert (lost["memory"].estimate, lost["conflict_rest"].estimate, change["memory"].estimate) == (0.25, 0.25, 0)


def share(value: float, groups: int = 40) -> Estimate:
    """A share of as many examples as groups."""
    return proportion(np.arange(groups) < round(value * groups), list(map(str, range(groups))))


NONE, FEW = Estimate.undefined(), Estimate(0.5, math.nan, math.nan, 5, 5)


@pytest.mark.parametrize(
    ("shift", "other", "lost", "beyond", "told"),
    [
        (share(0.9), share(0.0), share(0.0), True, "works with a shift (90\xa0% ("),
        (share(0.4), share(0.1), NONE, True, "works in part with a shift (40\xa0% ("),
        (share(0.9), share(0.0), share(0.5), True, "; loses 50\xa0% of what it should keep"),
        (share(0.6), share(0.4), NONE, True, "; answers 40\xa0% neither way"),
        (share(0.9, 20), NONE, NONE, True, "; add about 40\xa0groups to be sure"),
        (share(0.1), NONE, NONE, True, "do not use a shift (10\xa0% ("),
        (share(0.4), NONE, share(0.6), True, "do not use a shift (40\xa0% ("),
        (share(0.9), NONE, NONE, False, "not surely more than its strongest control"),
        (FEW, NONE, NONE, True, "cannot tell: 5\xa0test groups; add about 100\xa0groups to be sure"),
        (NONE, NONE, NONE, True, "not measured"),
    ],
)
def test_the_verdict_on_a_lever(shift: Estimate, other: Estimate, lost: Estimate, beyond: bool, told: str) -> None:
    assert told in verdict(Part(shift=shift, other=other, lost=lost), "a shift", beyond)
