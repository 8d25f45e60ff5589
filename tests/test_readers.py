"""Readers of public data: what is known, what contradicts it, what is held out, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import KINDS, Example, Kind, Task, build_task, draw
from mnemoscope.tasks.known import KnownTask, grouped
from mnemoscope.tasks.memotrap import WORDINGS
from public_data import data_folder

PROVERBS = {  # beginning: true ending, the word that is asked for
    "A stitch in time saves": ("nine", "money"),
    "Better late than": ("never", "early"),
    "Birds of a feather flock": ("together", "south"),
    "The early bird catches the": ("worm", "bus"),
    "An apple a day keeps the doctor": ("away", "busy"),
    "All is well that ends": ("well", "happily"),
    "Practice makes": ("perfect", "noise"),
    "Two wrongs don't make a": ("right", "wrong"),
}
CITIES = ["Paris", "Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito", "Tunis"]
PATTERNS = {
    "born": ["[X] was born in [Y].", "[X] is a [Y]-born person.", "[Y] is where [X] was born.", "[X] came from [Y] ."],
    "died": ["[X] died in [Y].", "[X] passed away in [Y]."],
    "job": ["[X] is an [Y] by profession.", "[X] works as [Y].", "the job of [X] is [Y]"],
}
ROWS = [
    {
        "q": f"Who wrote book {n}?",
        "text": f"Book {n} was written by Writer {n} Wrong in a small town. Writer {n} Wrong was young then.",
        "said": f"Writer {n} Wrong",
        "true": f"Author {n}",
    }
    for n in range(8)
]
FIELDS = {"question": "q", "context": "text", "context_answer": "said", "memory_answer": "true"}


def memotrap(folder: Path, rows: list[dict[str, object]] | None = None, **options: Any) -> KnownTask:
    rows = rows or [
        {
            "prompt": f'Write a quote that ends in the word "{wrong}": {beginning}',
            "classes": str([f" {one}." for one in ((true, wrong), (wrong, true))[n % 2]]),
            "answer_index": (n + 1) % 2,
        }
        for n, (beginning, (true, wrong)) in enumerate(PROVERBS.items())
    ]
    with (folder / "proverbs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return build_task("memotrap", {"file": str(folder / "proverbs.csv")} | options, 0)  # type: ignore[return-value]


def pararel(folder: Path, patterns: dict[str, list[str]] = PATTERNS, **options: Any) -> KnownTask:
    for place in ("facts", "patterns"):
        (folder / place).mkdir(exist_ok=True)
    for relation, texts in patterns.items():
        lines = [{"sub_label": f"Person {n} of {relation}", "obj_label": CITIES[n % 8]} for n in range(24)]
        lines += [
            {"sub_label": "Person 2 of born", "obj_label": "Lima"},
            {"sub_label": "Old Oslo", "obj_label": "oslo"},
        ]
        (folder / "facts" / f"{relation}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        lines = [{"pattern": text} for text in texts]
        (folder / "patterns" / f"{relation}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return build_task("pararel", {"folder": str(folder)} | options, 0)  # type: ignore[return-value]


def qa(folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> KnownTask:
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = str(folder / "questions.jsonl")
    return build_task("qa", {"file": file} | FIELDS | options, 0)  # type: ignore[return-value]


def everything(task: Task, kind: Kind) -> list[Example]:
    return task.examples(np.random.default_rng(0), 10**6, kind)


MAKERS: list[Callable[[Path], KnownTask]] = [memotrap, pararel, qa]


@pytest.mark.parametrize("make", MAKERS)
def test_each_item_has_three_wordings_in_each_of_four_families(
    make: Callable[[Path], KnownTask], tmp_path: Path
) -> None:
    task = make(tmp_path)
    prompts = defaultdict[str, set[str]](set)
    for example in everything(task, "conflict"):
        prompts[example.item].add(example.prompt)
    assert min(map(len, prompts.values())) >= 3
    assert {item.split("|")[-1] for item in prompts} == set(task.frames)
    assert len(task.frames) >= 4
    assert not set(task.frames) & set(task.held_out_frames)


@pytest.mark.parametrize("make", MAKERS)
def test_conflicts_state_the_generalized_answer_and_never_the_memorized_one(
    make: Callable[[Path], KnownTask], tmp_path: Path
) -> None:
    task = make(tmp_path)
    for example in everything(task, "conflict"):
        known, said = example.options
        assert said.strip() in example.prompt
        assert known.strip() not in example.prompt.replace(example.group, "")
        assert said[0] == known[0] == " "
        bare = task.without_context(example)
        assert bare is not None
        assert said.strip() not in bare.prompt.replace(example.group, "")
        assert bare.options == example.options
        assert example.prompt.endswith(bare.prompt.rpartition("\n")[2].split(". ")[-1])
        other = task.rephrase(example, np.random.default_rng(0))
        assert other.prompt != example.prompt
        assert (other.item, other.family, other.options) == (example.item, example.family, example.options)


@pytest.mark.parametrize("make", MAKERS)
def test_groups_are_in_one_split_and_what_is_held_out_shares_them(
    make: Callable[[Path], KnownTask], tmp_path: Path
) -> None:
    task, split = make(tmp_path), {}
    parts = [task, *task.held_out().values()]
    assert len(parts) > 1
    mine = {example.prompt for example in everything(task, "conflict")}
    for part in parts:
        for kind in KINDS:
            for example in everything(part, kind):
                assert split.setdefault(example.group, example.split) == example.split
        assert part is task or not mine & {example.prompt for example in everything(part, "conflict")}
    assert set(split.values()) == {"fit", "tune", "test"}


@pytest.mark.parametrize("make", MAKERS)
def test_only_known_items_are_asked(make: Callable[[Path], KnownTask], tmp_path: Path) -> None:
    task = make(tmp_path)
    asked = task.facts_to_know()
    assert len({example.item for example in asked}) == len(asked)
    chosen = {example.item for example in asked[::3]}
    known = task.knowing(chosen)
    for kind in ("conflict", "memory"):
        items = {"|".join(example.item.split("|")[:2]) for example in everything(known, kind)}
        assert items <= chosen
        assert items
    with pytest.raises(InputError, match="knows none of the task's facts by heart"):
        task.knowing(set())


@pytest.mark.parametrize("make", MAKERS)
def test_memory_examples_are_bare_or_agree(make: Callable[[Path], KnownTask], tmp_path: Path) -> None:
    task = make(tmp_path)
    families = defaultdict[str, int](int)
    for example in everything(task, "memory"):
        families[example.family] += 1
        stated = str(example.answer).strip() in example.prompt.replace(example.group, "")
        assert stated == (example.family == "agreeing")
    assert set(families) == {"bare", "agreeing"}
    bare = {example.prompt for example in everything(task, "memory") if example.family == "bare"}
    assert {example.prompt for example in task.facts_to_know() if example.item.split("|")[0] in task.asked} <= bare


@pytest.mark.parametrize("make", MAKERS)
def test_equal_seeds_give_equal_examples_and_shares_are_kept(make: Callable[..., KnownTask], tmp_path: Path) -> None:
    one, same = make(tmp_path), make(tmp_path)
    assert draw(one, np.random.default_rng(1), 20, "conflict", "test") == draw(
        same, np.random.default_rng(1), 20, "conflict", "test"
    )
    wide = make(tmp_path, shares=[0.25, 0.25, 0.5])
    count = list(wide.split_of.values()).count("test")
    assert count == pytest.approx(len(wide.split_of) / 2, abs=1)


@pytest.mark.parametrize("make", MAKERS)
def test_replies_begin_with_the_end_of_the_prompt(make: Callable[[Path], KnownTask], tmp_path: Path) -> None:
    task = make(tmp_path)
    for example in [*everything(task, "conflict")[:200], *task.facts_to_know()]:
        message, begun = task.split_reply(example.prompt)
        assert begun
        assert example.prompt.endswith(begun)
        assert message
        assert example.kind == "memory" or str(example.generalized).strip() in message


def test_proverbs_of_one_beginning_are_one_item(tmp_path: Path) -> None:
    """Other true endings are no contradictions; the first is asked for."""
    said = 'Write a quote that ends in the word "{}": Time is'
    rows: list[dict[str, object]] = [
        {"prompt": said.format(wrong), "classes": f"[' {wrong}.', ' {true}.']", "answer_index": 0}
        for true, wrong in (("money", "gold"), ("precious", "money"), ("money", "short"))
    ]
    task = memotrap(tmp_path, rows)
    assert [example.answer for example in task.facts_to_know()] == [" money"]
    assert {example.generalized for example in everything(task, "conflict")} == {" gold", " short"}


def test_proverbs_that_say_their_ending_or_differ_in_case_are_left_out(tmp_path: Path) -> None:
    said = 'Write a quote that ends in the word "{}": {}'
    rows: list[dict[str, object]] = [
        {"prompt": said.format(wrong, s), "classes": f"[' {wrong}.', ' {true}.']", "answer_index": 0}
        for s, true, wrong in (
            ("Fight fire  with", "Fire", "flames"),
            ("Time is", "money", "Money"),
            ("Haste makes", "waste", "speed"),
            ("To haste  makes", "waste", "sense"),
            ("Practice makes", "perfect", "noise"),
        )
    ]
    task = memotrap(tmp_path, rows)
    assert {example.group for example in everything(task, "conflict")} == {"Haste makes", "Practice makes"}
    assert not any("  " in example.prompt for example in everything(task, "conflict"))
    assert {e.prompt for e in task.facts_to_know()} == {"Time is", "Haste makes", "To haste makes", "Practice makes"}


def test_subjects_that_say_the_same_are_one_group() -> None:
    true = {
        ("capital", "Finland"): ["Helsinki"],
        ("capital", "Grand Duchy of Finland"): ["Helsinki"],
        ("capital", "Kingdom of Finland"): ["Turku"],  # shares no fact
        ("language", "Kingdom of Finland"): ["Finnish"],
        ("capital", "North Island"): ["Helsinki"],  # shares a fact and no word
        ("language", "Ada Byron King"): ["English"],
        ("language", "Ada Byron Noel"): ["English"],  # two words of three
    }
    found = grouped(true)
    assert found["Grand Duchy of Finland"] == found["Finland"] == "Finland"
    assert len(set(found.values())) == len(found) - 1
    assert grouped({}) == {}


@pytest.mark.parametrize("make", MAKERS)
def test_texts_that_agree_are_worded_as_conflicts_are(make: Callable[[Path], KnownTask], tmp_path: Path) -> None:
    """Every wording of a conflict may be that of a text that agrees, one for each fact and frame."""
    task = make(tmp_path)
    known = {e.item: str(e.answer) for e in task.facts_to_know()}
    of_conflicts = {example.prompt.replace(str(example.generalized), "*") for example in everything(task, "conflict")}
    agreeing = [example for example in everything(task, "memory") if example.family == "agreeing"]
    for example in agreeing:
        assert known["|".join(example.item.split("|")[:2])] == example.answer
    if make is memotrap:
        said = ((e.prompt.replace(e.group, "{s}"), str(e.answer).strip()) for e in agreeing)
        words = {prompt.replace(answer, "{v}") for prompt, answer in said}
        assert words <= {wording for frame in task.frames for wording in WORDINGS[frame]}
        assert len(words) > len(task.frames)
    assert len(of_conflicts) > len(task.frames)
    assert len({example.item for example in agreeing}) * len(task.frames) == len(agreeing)


def test_nothing_that_is_shown_before_a_bare_question_is_an_answer_to_it(tmp_path: Path) -> None:
    """Neither the true values nor those that a text states, and the same whatever it states."""
    task = pararel(tmp_path, held_out_relations=[], shots=2)
    shown = defaultdict[tuple[str, str], set[str]](set)
    for example in everything(task, "conflict"):
        bare = task.without_context(example)
        assert bare is not None
        before = bare.prompt.rpartition(". ")[0]
        assert before
        assert not any(str(answer).strip() in before for answer in example.options)
        shown[example.group, bare.prompt.rpartition(". ")[2]].add(before)
    assert max(map(len, shown.values())) == 1


def test_objects_are_swapped_within_a_relation(tmp_path: Path) -> None:
    task = pararel(tmp_path, held_out_relations=["died"], wrong_values=7)
    conflicts = everything(task, "conflict")
    assert {example.item.split("|")[0] for example in conflicts} == {"born", "job"}
    assert {e.item.split("|")[0] for e in everything(task.held_out()["relation"], "conflict")} == {"died"}
    assert not any("Old Oslo" in example.prompt for example in conflicts), "the subject says it"
    both = [e for e in conflicts if e.item.startswith("born|Person 2 of born|")]
    if both:  # not where it is one of the facts shown
        assert {e.memorized for e in both} == {" Rome"}
        assert " Lima" not in {e.generalized for e in both}, "true as well"
    for example in conflicts:
        assert not example.prompt.endswith(".")
        assert "[X]" not in example.prompt
        assert "[Y]" not in example.prompt
        assert "-born" not in example.prompt, "no article fits both answers"
        assert not example.prompt.endswith("is where")


def test_facts_shown_before_a_bare_question_are_asked_nowhere(tmp_path: Path) -> None:
    task = pararel(tmp_path, held_out_relations=[], shots=2)
    bare = task.facts_to_know()[0].prompt
    shown = [sentence.split(" was born in ") for sentence in bare.split(". ")[:2]]
    assert len({place for _, place in shown}) == 2
    assert not {person for person, _ in shown} & {
        example.group for example in task.facts_to_know() if "born" in example.item
    }
    alone = pararel(tmp_path, held_out_relations=[], shots=0)
    assert {e.prompt for e in alone.facts_to_know() if e.item.startswith("died")} >= {"Person 3 of died died in"}


def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = everything(qa(tmp_path), "conflict")
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "q.csv", index=False)
    frame.to_parquet(tmp_path / "q.parquet")
    asked: list[tuple[str, str]] = []

    def load_dataset(source: str, split: str) -> list[dict[str, str]]:
        asked.append((source, split))
        return ROWS

    made: Any = ModuleType("datasets")
    made.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", made)
    monkeypatch.setattr("mnemoscope.tasks.tables.find_spec", lambda name: name)
    for file in (str(tmp_path / "q.csv"), str(tmp_path / "q.parquet"), "someone/questions"):
        assert everything(build_task("qa", {"file": file, "dataset_split": "dev"} | FIELDS, 0), "conflict") == wanted
    assert asked == [("someone/questions", "dev")]


def test_passages_agree_where_the_true_answer_stands_in_them(tmp_path: Path) -> None:
    task = qa(tmp_path)
    agreeing = [example for example in everything(task, "memory") if example.family == "agreeing"]
    assert {example.group for example in agreeing} == {row["q"] for row in ROWS}
    for example in agreeing:
        assert str(example.answer).strip() in example.prompt
        assert "Wrong" not in example.prompt


def test_questions_about_one_passage_are_one_group(tmp_path: Path) -> None:
    rows = [row | {"text": f"Passage {n // 2}. Writer {n} Wrong wrote it."} for n, row in enumerate(ROWS)]
    for n, row in enumerate(rows):
        row["text"] = f"Passage {n // 2}: Writer {n // 2 * 2} Wrong and Writer {n // 2 * 2 + 1} Wrong wrote."
    task = qa(tmp_path, rows)
    groups = [task.group_of[str(row["q"])] for row in rows]
    assert groups[::2] == groups[1::2]
    assert len(set(groups)) == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("q,text,said,true\nWho?,In Rome, he wrote,Rome,Oslo\n", "row 1: 5 fields for 4 names; a text with a comma"),
        ("q,text,said,true,text\nWho?,a,b,c,d\n", "line 1: 'text' names two columns"),
    ],
)
def test_a_csv_whose_fields_do_not_fit_its_names_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "some.csv").write_text(text)
    with pytest.raises(InputError, match=told):
        build_task("qa", {"file": str(tmp_path / "some.csv")} | FIELDS, 0)


def test_several_true_answers_and_passages(tmp_path: Path) -> None:
    """The first true answer is asked for; a passage that gives another true one is no conflict."""
    own = {"q": "Who?", "text": "It was B. T., they say.", "said": "B. T.", "true": ["Bob Tree", "B. T."]}
    task = qa(tmp_path, [*ROWS, own, own | {"said": "Zoe", "text": "It was Zoe."}])
    found = [example for example in everything(task, "conflict") if example.group == "Who?"]
    assert {example.options for example in found} == {(" Bob Tree", " Zoe")}


def test_rows_without_a_true_answer_only_show_whether_the_passage_is_followed(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "true"} for row in ROWS]
    task = qa(tmp_path, rows, memory_answer=None)
    assert (everything(task, "conflict"), everything(task, "memory"), task.facts_to_know()) == ([], [], [])
    novel = everything(task, "novel")
    assert {(e.group, e.answer) for e in novel} == {(row["q"], f" {row['said']}") for row in rows}
    mixed = qa(tmp_path, [*ROWS[:4], *(row | {"true": None} for row in ROWS[4:])])
    assert {e.group for e in everything(mixed, "novel")} == {row["q"] for row in ROWS[4:]}
    assert {e.group for e in everything(mixed, "conflict")} == {row["q"] for row in ROWS[:4]}


ASKED = 'Write a quote that ends in the word "early": Better late than'


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            memotrap,
            {"answers": "options"},
            "row 1: there is no field 'options'; there are prompt, classes, answer_index",
        ),
        (memotrap, {"frames": ["sung"]}, "frames: 'sung' is not one of instruction, labelled"),
        (memotrap, {"held_out_frames": ["labelled"]}, "what is held out cannot be fitted on as well"),
        (memotrap, {"file": "/nowhere.csv"}, "file: /nowhere.csv cannot be read"),
        (
            memotrap,
            {"rows": [{"prompt": "Better", "classes": "[]", "answer_index": 0}]},
            "row 1: prompt is 'Better'; want",
        ),
        (memotrap, {"rows": [{"prompt": ASKED, "classes": "[' a.']", "answer_index": 0}]}, "wanted are two answers"),
        (memotrap, {"rows": [{"prompt": ASKED, "classes": "[' a.', ' b.']", "answer_index": 2}]}, "answer_index '2'"),
        (
            memotrap,
            {"rows": [{"prompt": ASKED, "classes": "[' early.', ' earl.']", "answer_index": 0}]},
            "ending is 'earl' and asked_for 'early'; neither may begin the other",
        ),
        (pararel, {"subject": "who"}, "line 1: there is no field 'who'; there are sub_label, obj_label"),
        (pararel, {"relations": ["married"]}, "relations: 'married' is not one of born, died, job"),
        (pararel, {"phrasings": 1}, "phrasings: 1 is not between 2"),
        (pararel, {"patterns": {}}, "has no facts/RELATION.jsonl"),
        (pararel, {"patterns": {"born": ["[Y] saw [X]."]}}, "no pattern without a comma that ends in [Y]"),
        (pararel, {"patterns": {"born": ["born in [Y]."]}}, "one [X] and one [Y]"),
        (qa, {"question": "asked"}, "line 1: there is no field 'asked'; there are q, text, said, true"),
        (qa, {"rows": [ROWS[0] | {"said": "Author 01"}]}, "memory_answer is 'Author 0' and context_answer 'Author 01'"),
        (qa, {"rows": [ROWS[0] | {"said": 7}]}, "line 1: said is 7; a text or a list of texts is wanted"),
        (qa, {"rows": [ROWS[0] | {"q": "a|b"}]}, "line 1: q is 'a|b'; | is not allowed in it"),
        (qa, {"rows": [ROWS[0] | {"text": " "}]}, "line 1: text is empty"),
        (
            qa,
            {"file": "questions.txt"},
            "file: 'questions.txt' is not a file that ends in .jsonl, .csv, .parquet; as a data",
        ),
        (qa, {"shares": [1, 1, 1]}, "shares: [1, 1, 1]; allowed are three numbers above 0 that add up to 1"),
        (qa, {"boundary": "."}, "task.options.boundary: Input should be a valid array (got '.')"),
    ],
)
def test_bad_input_is_one_line(
    make: Callable[..., KnownTask], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        make(tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_published_files_are_read() -> None:
    proverbs = build_task("memotrap", {"file": str(data_folder("memotrap") / "1-proverb-ending.csv")}, 0)
    first = next(e for e in everything(proverbs, "conflict") if e.group == "Absence makes the heart grow")
    assert (first.memorized, first.generalized) == (" fonder", " heavy")
    facts = build_task(
        "pararel", {"folder": str(data_folder("pararel")), "relations": ["P36", "P103"], "facts_each": 10**4}, 0
    )
    asked = {e.item: e.answer for e in facts.facts_to_know()}
    assert asked["P36|South Australia"] == " Adelaide"
    assert asked["P103|Joseph Reinach"] == " French"
    assert {example.kind for example in facts.examples(np.random.default_rng(0), 10, "conflict")} == {"conflict"}
