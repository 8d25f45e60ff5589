"""Tasks on what a model knows: what is known, what contradicts it, what is held out, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import KINDS, Example, Kind, Task, build_task, draw
from mnemoscope.tasks.known import KnownTask
from mnemoscope.tasks.memotrap import FAMILIES
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
PASSAGE = "Book {0} was written by Writer {0} Wrong in a small town. Writer {0} Wrong was young then."
ROWS = [
    {"q": f"Who wrote book {n}?", "text": PASSAGE.format(n), "said": f"Writer {n} Wrong", "true": f"Author {n}"}
    for n in range(8)
]
FIELDS = {"question": "q", "context": "text", "context_answer": "said", "memory_answer": "true"}
SAID = 'Write a quote that ends in the word "{}": {}'


def proverb(beginning: str, true: str, wrong: str, place: int = 0) -> dict[str, object]:
    answers = [f" {one}." for one in ((wrong, true), (true, wrong))[place]]
    return {"prompt": SAID.format(wrong, beginning), "classes": str(answers), "answer_index": place}


def facts(folder: Path, **options: Any) -> KnownTask:
    return build_task("facts", {"held_out_relations": ["language"]} | options, 0)  # type: ignore[return-value]


def memotrap(folder: Path, rows: list[dict[str, object]] | None = None, **options: Any) -> KnownTask:
    rows = rows or [proverb(said, *two, n % 2) for n, (said, two) in enumerate(PROVERBS.items())]
    with (folder / "proverbs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return build_task("memotrap", {"file": str(folder / "proverbs.csv")} | options, 0)  # type: ignore[return-value]


def pararel(folder: Path, patterns: dict[str, list[str]] = PATTERNS, **options: Any) -> KnownTask:
    for place in ("facts", "patterns"):
        (folder / place).mkdir(exist_ok=True)
    for relation, texts in patterns.items():
        two = [(f"Person {n} of {relation}", CITIES[n % 8]) for n in range(24)]
        two += [("Person 2 of born", "Lima"), ("Old Oslo", "oslo")]
        lines = [{"sub_label": subject, "obj_label": value} for subject, value in two]
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


Make = Callable[..., KnownTask]
each_task = pytest.mark.parametrize("make", [facts, memotrap, pararel, qa])


@each_task
def test_conflicts_state_the_generalized_answer_and_never_the_memorized_one(make: Make, tmp_path: Path) -> None:
    task, prompts = make(tmp_path), defaultdict[str, set[str]](set)
    conflicts = everything(task, "conflict")
    for example in conflicts:
        prompts[example.item].add(example.prompt)
    assert min(map(len, prompts.values())) >= 3, "wordings of each item in each family"
    assert {item.split("|")[-1] for item in prompts} == set(task.frames)
    for example in conflicts[:500]:
        known, said = (option.strip() for option in example.options)
        assert said in example.prompt
        assert known not in example.prompt.replace(example.group, "")
        assert not said.startswith(known)
        assert not known.startswith(said)
        bare = task.without_context(example)
        assert bare is not None
        assert said not in bare.prompt.replace(example.group, "")
        assert bare.options == example.options
        assert example.prompt.endswith(bare.prompt.rpartition("\n")[2].split(". ")[-1])
        other = task.rephrase(example, np.random.default_rng(0))
        assert other.prompt != example.prompt
        assert other.phrased(example.prompt, example.family) == example
        assert task.prompted(example, "memorized").prompt.endswith(example.prompt)  # type: ignore[union-attr]


@each_task
def test_groups_are_in_one_split_and_what_is_held_out_shares_them(make: Make, tmp_path: Path) -> None:
    task, split = make(tmp_path), dict[str, str]()
    parts = {"": task, **task.held_out()}
    assert set(parts) == {"", "frame", *(["relation"] if task.held_out_relations else [])}
    mine = {example.prompt for example in everything(task, "conflict")}
    for name, part in parts.items():
        for kind in KINDS:
            for example in everything(part, kind):
                assert split.setdefault(example.group, example.split) == example.split
        conflicts = everything(part, "conflict")
        assert conflicts
        assert not name or not mine & {example.prompt for example in conflicts}
        relations, frames = ({example.item.split("|")[place] for example in conflicts} for place in (0, -1))
        assert relations == set(task.held_out_relations if name == "relation" else task.asked)
        assert frames == set(task.held_out_frames if name == "frame" else task.frames)
    assert set(split.values()) == {"fit", "tune", "test"}


@each_task
def test_only_known_items_are_asked(make: Make, tmp_path: Path) -> None:
    task = make(tmp_path)
    asked, before = task.facts_to_know(), len(everything(task, "conflict"))
    assert len({example.item for example in asked}) == len(asked)
    chosen = {example.item for example in asked[::3]}
    known = task.knowing(chosen)
    for kind in ("conflict", "memory"):
        items = {"|".join(example.item.split("|")[:2]) for example in everything(known, kind)}
        assert items <= chosen
        assert items
    with pytest.raises(InputError, match="knows none of the task's facts by heart"):
        task.knowing(set())
    assert len(everything(task, "conflict")) == before, "the task itself stays as it is"


@each_task
def test_memory_examples_are_bare_or_agree_in_wordings_of_conflicts(make: Make, tmp_path: Path) -> None:
    task = make(tmp_path)
    known, families = {e.item: str(e.answer) for e in task.facts_to_know()}, Counter[str]()
    agreeing = [example for example in everything(task, "memory") if example.family == "agreeing"]
    for example in everything(task, "memory"):
        families[example.family] += 1
        stated = str(example.answer).strip() in example.prompt.replace(example.group, "")
        assert stated == (example.family == "agreeing")
        assert known["|".join(example.item.split("|")[:2])] == example.answer
    assert set(families) == {"bare", "agreeing"}
    bare = {example.prompt for example in everything(task, "memory") if example.family == "bare"}
    assert {example.prompt for example in task.facts_to_know() if example.item.split("|")[0] in task.asked} <= bare
    assert len({example.item for example in agreeing}) * len(task.frames) == len(agreeing)
    if make is memotrap:  # every wording of a conflict may be that of a text that agrees
        said = ((e.prompt.replace(e.group, "{s}"), str(e.answer).strip()) for e in agreeing)
        words = {prompt.replace(answer, "{v}") for prompt, answer in said}
        assert words <= {wording for frame in task.frames for wording in FAMILIES[frame]}
        assert len(words) > len(task.frames)


@each_task
def test_equal_seeds_give_equal_examples_and_shares_are_kept(make: Make, tmp_path: Path) -> None:
    one, same = (draw(make(tmp_path), np.random.default_rng(1), 20, "conflict", "test") for _ in range(2))
    assert one == same
    wide = make(tmp_path, shares=[0.25, 0.25, 0.5])
    assert list(wide.split_of.values()).count("test") == pytest.approx(len(wide.split_of) / 2, abs=1)


@each_task
def test_replies_begin_with_the_end_of_the_prompt(make: Make, tmp_path: Path) -> None:
    task = make(tmp_path)
    for example in [*everything(task, "conflict")[:200], *task.facts_to_know()]:
        message, begun = task.split_reply(example.prompt)
        assert message
        assert begun
        assert example.prompt.endswith(begun)
        assert example.kind == "memory" or str(example.generalized).strip() in message


def test_proverbs_of_one_beginning_are_one_item(tmp_path: Path) -> None:
    """Other true endings are no contradictions; the first is asked for."""
    rows = [proverb("Time is", true, wrong) for true, wrong in (("money", "gold"), ("rare", "money"), ("money", "no"))]
    task = memotrap(tmp_path, rows)
    assert [example.answer for example in task.facts_to_know()] == [" money"]
    assert {example.generalized for example in everything(task, "conflict")} == {" gold", " no"}


def test_proverbs_that_say_their_ending_or_differ_in_case_are_left_out(tmp_path: Path) -> None:
    asked = (
        ("Fight fire  with", "Fire", "flames"),
        ("Time is", "money", "Money"),
        ("Haste makes", "waste", "speed"),
        ("To haste  makes", "waste", "sense"),
        ("Practice makes", "perfect", "noise"),
    )
    task = memotrap(tmp_path, [proverb(*one) for one in asked])
    assert {example.group for example in everything(task, "conflict")} == {"Haste makes", "Practice makes"}
    assert not any("  " in example.prompt for example in everything(task, "conflict"))
    assert {e.prompt for e in task.facts_to_know()} == {"Time is", "Haste makes", "To haste makes", "Practice makes"}


def test_facts_shown_before_a_bare_question_are_no_answer_to_it_and_asked_nowhere(tmp_path: Path) -> None:
    """Neither the true values nor those that a text states, and the same whatever it states."""
    task = pararel(tmp_path, held_out_relations=[], shots=2)
    shown, groups = defaultdict[tuple[str, str], set[str]](set), {example.group for example in task.facts_to_know()}
    for example in everything(task, "conflict"):
        before, _, last = task.without_context(example).prompt.rpartition(". ")
        assert len(before.split(". ")) == 2
        assert not any(str(answer).strip() in before for answer in example.options)
        assert not any(group in before for group in groups)
        shown[example.group, last].add(before)
    assert max(map(len, shown.values())) == 1
    alone = pararel(tmp_path, held_out_relations=[], shots=0)
    assert {e.prompt for e in alone.facts_to_know() if e.item.startswith("died")} >= {"Person 3 of died died in"}


def test_objects_are_swapped_within_a_relation(tmp_path: Path) -> None:
    conflicts = everything(pararel(tmp_path, held_out_relations=["died"], wrong_values=7), "conflict")
    assert not any("Old Oslo" in example.prompt for example in conflicts), "the subject says it"
    both = [e for e in conflicts if e.item.startswith("born|Person 2 of born|")]
    if both:  # not where it is one of the facts shown
        assert {e.memorized for e in both} == {" Rome"}
        assert " Lima" not in {e.generalized for e in both}, "true as well"
    for example in conflicts:
        assert not example.prompt.endswith((".", "is where"))
        assert not any(part in example.prompt for part in ("[X]", "[Y]", "-born")), "no article fits both answers"


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


def test_a_csv_whose_fields_do_not_fit_its_names_is_refused(tmp_path: Path) -> None:
    for text, told in (
        ("q,text,said,true\nWho?,In Rome, he wrote,Rome,Oslo\n", "Expected 4 fields in line 2, saw 5"),
        ("q,text,said,true,text\nWho?,a,b,c,d\n", "line 1: 'text' names two columns"),
        ("", "cannot be read"),
        ("q,text,said,true\n", "has no row"),
    ):
        (tmp_path / "some.csv").write_text(text)
        with pytest.raises(InputError, match=f"^file: .*some.csv.*{told}"):
            build_task("qa", {"file": str(tmp_path / "some.csv")} | FIELDS, 0)


def test_questions_about_one_passage_are_one_group(tmp_path: Path) -> None:
    both = "Passage {}: Writer {} Wrong and Writer {} Wrong wrote."
    task = qa(tmp_path, [row | {"text": both.format(n // 2, n // 2 * 2, n // 2 * 2 + 1)} for n, row in enumerate(ROWS)])
    groups = [task.group_of[str(row["q"])] for row in ROWS]
    assert groups[::2] == groups[1::2]
    assert len(set(groups)) == 4


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
    assert {(e.group, e.answer) for e in everything(task, "novel")} == {(row["q"], f" {row['said']}") for row in rows}
    mixed = qa(tmp_path, [*ROWS[:4], *(row | {"true": None} for row in ROWS[4:])])
    assert {e.group for e in everything(mixed, "novel")} == {row["q"] for row in ROWS[4:]}
    assert {e.group for e in everything(mixed, "conflict")} == {row["q"] for row in ROWS[:4]}


ASKED = SAID.format("early", "Better late than")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (facts, {"relations": ["mayor"]}, "relations: 'mayor' is not one of capital, language, continent"),
        (facts, {"frames": ["rhymed"]}, "frames: 'rhymed' is not one of context-first"),
        (facts, {"held_out_relations": ["capital"]}, "cannot be fitted on as well"),
        (facts, {"wrong_values": 0}, "at least one"),
        (facts, {"table": "/nowhere.csv"}, "table: /nowhere.csv cannot be read"),
        (memotrap, {"answers": "options"}, "there is no field 'options'; there are prompt, classes, answer_index"),
        (memotrap, {"frames": []}, "frames: at least one is needed"),
        (memotrap, {"file": "/nowhere.csv"}, "file: /nowhere.csv cannot be read"),
        (memotrap, {"rows": [{**proverb("", "a", "b"), "prompt": "Better"}]}, "row 1: prompt is 'Better'; want"),
        (memotrap, {"rows": [{"prompt": ASKED, "classes": "[' a.']", "answer_index": 0}]}, "wanted are two answers"),
        (memotrap, {"rows": [{"prompt": ASKED, "classes": "[' a', ' b']", "answer_index": 2}]}, "answer_index '2'"),
        (memotrap, {"rows": [proverb("Better", "earl", "early")]}, "ending is 'earl' and asked_for 'early'; neither"),
        (pararel, {"subject": "who"}, "there is no field 'who'; there are sub_label, obj_label"),
        (pararel, {"relations": ["married"]}, "relations: 'married' is not one of born, died, job"),
        (pararel, {"phrasings": 1}, "phrasings: 1 is not between 2"),
        (pararel, {"patterns": {}}, "has no facts/RELATION.jsonl"),
        (pararel, {"patterns": {"born": ["[Y] saw [X]."]}}, "no pattern without a comma that ends in [Y]"),
        (pararel, {"patterns": {"born": ["born in [Y]."]}}, "one [X] and one [Y]"),
        (qa, {"question": "asked"}, "there is no field 'asked'; there are q, text, said, true"),
        (qa, {"rows": [ROWS[0] | {"said": "Author 01"}]}, "memory_answer is 'Author 0' and context_answer 'Author 01'"),
        (qa, {"rows": [ROWS[0] | {"said": 7}]}, "line 1: said is 7; a text or a list of texts is wanted"),
        (qa, {"rows": [ROWS[0] | {"q": "a|b"}]}, "line 1: q is 'a|b'; | is not allowed in it"),
        (qa, {"rows": [ROWS[0] | {"text": " "}]}, "line 1: text is empty"),
        (
            qa,
            {"file": "questions.txt"},
            "'questions.txt' is not a file that ends in .jsonl, .csv, .parquet, .json; as a data",
        ),
        (qa, {"shares": [1, 1, 1]}, "shares: [1, 1, 1]; allowed are three numbers above 0 that add up to 1"),
        (qa, {"boundary": "."}, "task.options.boundary: Input should be a valid array (got '.')"),
    ],
)
def test_bad_input_is_one_line(make: Make, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        make(tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_published_files_are_read() -> None:
    proverbs = build_task("memotrap", {"file": str(data_folder("memotrap") / "1-proverb-ending.csv")}, 0)
    first = next(e for e in everything(proverbs, "conflict") if e.group == "Absence makes the heart grow")
    assert (first.memorized, first.generalized) == (" fonder", " heavy")
    options = {"folder": str(data_folder("pararel")), "relations": ["P36", "P103"], "facts_each": 10**4}
    published = build_task("pararel", options, 0)
    asked = {e.item: e.answer for e in published.facts_to_know()}
    assert (asked["P36|South Australia"], asked["P103|Joseph Reinach"]) == (" Adelaide", " French")
    assert {example.kind for example in published.examples(np.random.default_rng(0), 10, "conflict")} == {"conflict"}
