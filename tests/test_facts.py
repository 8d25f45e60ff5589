"""Facts: the examples of a seed, how contradictions are dealt, and tables of the user's own."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import KINDS, Task, build_task
from mnemoscope.tasks.facts import FactsTask
from mnemoscope.tasks.known import dealt, grouped
from test_readers import everything

DIGESTS = {"": "31b576b8e56c1cac", "known": "b7ee27c65346719e", "frame": "c330fb262741c8de"}
DIGESTS |= {"relation": "339388bc67e70a29"}


def test_the_examples_of_a_seed_stay_what_they_are() -> None:
    """Digests of every prompt, answer and split, in the order of version 0.2 (countryinfo 1.0)."""
    task = build_task("facts", {"held_out_relations": ["language"], "wrong_values": 2}, 0)
    known = task.knowing({example.item for n, example in enumerate(task.facts_to_know()) if n % 3 == 0})
    assert {name: digest(part) for name, part in {"": task, "known": known, **known.held_out()}.items()} == DIGESTS


def digest(task: Task) -> str:
    """Of all examples by kind, and of a part of their rephrasings, bare questions and replies."""
    rng = np.random.default_rng(7)
    rows: list[object] = []
    for kind in KINDS:
        examples = task.examples(rng, 10**6, kind)
        rows += [example.to_row() for example in examples]
        if kind == "conflict":
            rows += [task.rephrase(example, rng).to_row() for example in examples[::50]]
            rows += [task.without_context(example).to_row() for example in examples[::50]]  # type: ignore[union-attr]
        rows += [task.split_reply(example.prompt) for example in examples[::100]]
    rows += [example.to_row() for example in task.facts_to_know()]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def test_one_known_fact_more_moves_no_other_example_and_no_country_weighs_more_for_it() -> None:
    task = build_task("facts", {"relations": ["capital", "language"]}, 0)
    items = sorted(example.item for example in task.facts_to_know())
    drawn = [
        [example.prompt for example in task.knowing(set(known)).examples(np.random.default_rng(3), 200, "conflict")]
        for known in (items, [item for item in items if "|Japan" not in item])
    ]
    left = [prompt for prompt in drawn[0] if "Japan" not in prompt]
    assert left == drawn[1][: len(left)]
    both = task.knowing({"capital|Japan", "language|Japan", "capital|France", "capital|Peru"})
    counts = Counter(example.group for example in both.examples(np.random.default_rng(0), 90, "conflict"))
    assert counts == {"Japan": 30, "France": 30, "Peru": 30}


def test_what_is_also_true_is_no_contradiction() -> None:
    task = build_task("facts", {"relations": ["language"], "wrong_values": 60}, 0)
    said = {str(e.generalized).strip() for e in everything(task, "conflict") if e.group == "Canada"}
    assert "Spanish" in said
    assert not {"English", "French"} & said


def test_values_are_dealt_so_that_each_contradicts_as_often_as_it_is_true() -> None:
    """Else how common an answer is would tell whether it is remembered."""
    values = [*"AAAABBBCCD"]
    true = {("made", f"thing{n:02}"): [value] for n, value in enumerate(values)}
    true["made", "thing00"] = ["A", "B"]  # both are true
    for seed in range(20):
        found: dict[tuple[str, str], list[str]] = {fact: [] for fact in true}
        dealt(found, sorted(true), true, np.random.default_rng(seed))
        assert Counter(v for given in found.values() for v in given) == Counter(values)
        assert not set(found["made", "thing00"]) & {"A", "B"}
        assert not any(set(found[fact]) & set(own) for fact, own in true.items())
    most = {("made", f"thing{n:02}"): [value] for n, value in enumerate("AAAAAAABBC")}
    found = {fact: [] for fact in most}
    dealt(found, sorted(most), most, np.random.default_rng(0))
    assert Counter(v for some in found.values() for v in some) == Counter("AAABBC"), "no more than there are others"


def test_values_are_dealt_within_a_relation_and_a_split() -> None:
    task = build_task("facts", {"relations": ["capital", "language"]}, 0)
    assert isinstance(task, FactsTask)
    true = {(f[0], task._split(f), task.facts[f]) for f in task.facts if f[0] in task.asked}
    wrong = {(f[0], task._split(f), value) for f, values in task.wrong.items() if f in task.facts for value in values}
    assert wrong <= true


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


def test_a_table_brings_facts_and_relations(tmp_path: Path) -> None:
    path, columns = tmp_path / "facts.csv", "relation,subject,value,question,stem,statement,inverted,reported\n"
    words = "Who made {n}?,{n} was made by,{n} was made by {v}.,{v} made {n}.,It was {v} who made {n}."
    rows = [f"maker,thing{i},person{i},{words}" for i in range(12)] + [f"maker,thing0,person7,{words}"]
    path.write_text(columns + "\n".join(rows), encoding="utf-8-sig")
    task = build_task("facts", {"table": str(path), "wrong_values": 11}, 0)
    of_first = [e for e in everything(task, "conflict") if e.group == "thing0"]
    assert all("made by" in e.prompt for e in of_first)
    assert {e.memorized for e in of_first} == {" person0"}
    assert " person7" not in {e.generalized for e in of_first}
    for line, message in (
        (f"maker,thing0,,{words}", "row 1: value is empty"),
        ("owner,thing0,person0,,,,,", "relation 'owner' is new and needs question"),
        (f"maker,thing|0,person0,{words}", "row 1: subject is 'thing|0'"),
        (f"maker,thing0,person0,{words.replace('{v}', '{value}')}", "only {n} and {v} may be in braces"),
    ):
        path.write_text(columns + line)
        with pytest.raises(InputError, match=f"^table: .*{message.replace('|', '.')}"):
            build_task("facts", {"table": str(path), "relations": ["capital"]}, 0)
