"""Facts: what is contradicted, what is held out, and tables of the user's own."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import KINDS, Example, Kind, Task, build_task
from mnemoscope.tasks.facts import FactsTask
from mnemoscope.tasks.known import dealt

RNG = np.random.default_rng(0)
SIDES = ("memorized", "generalized")


def everything(task: Task, kind: Kind) -> list[Example]:
    return task.examples(np.random.default_rng(0), 10**6, kind)


@pytest.fixture(scope="module")
def task() -> FactsTask:
    return build_task("facts", {"held_out_relations": ["language"]}, 0)  # type: ignore[return-value]


def test_conflicts_contradict_the_fact_in_the_prompt(task: FactsTask) -> None:
    conflicts = everything(task, "conflict")
    assert len(conflicts) > 5_000
    for example in conflicts[:500]:
        said, known = example.generalized.strip(), example.memorized.strip()  # type: ignore[union-attr]
        assert said in example.prompt
        assert known not in example.prompt.replace(example.group, "")
        assert not said.startswith(known)
        assert not known.startswith(said)
    france = next(e for e in conflicts if e.group == "France" and e.item.startswith("capital"))
    assert france.memorized == " Paris"


def test_what_is_held_out_shares_nothing_but_the_countries(task: FactsTask) -> None:
    parts = task.held_out()
    assert set(parts) == {"frame", "relation"}
    mine = {e.prompt for e in everything(task, "conflict")}
    for part in parts.values():
        assert isinstance(part, FactsTask)
        assert part.split_of == task.split_of
        theirs = everything(part, "conflict")
        assert theirs
        assert not mine & {e.prompt for e in theirs}
    assert {e.item.split("|")[0] for e in everything(parts["relation"], "conflict")} == {"language"}
    assert {e.family for e in everything(parts["frame"], "conflict")} == {"context-last", "inverted"}
    assert set(build_task("facts", {}, 0).held_out()) == {"frame"}


def test_what_is_also_true_is_no_contradiction() -> None:
    task = build_task("facts", {"relations": ["language"], "wrong_values": 60}, 0)
    said = {e.generalized.strip() for e in everything(task, "conflict") if e.group == "Canada"}  # type: ignore[union-attr]
    assert "Spanish" in said
    assert not {"English", "French"} & said


def test_how_common_an_answer_is_does_not_tell_whether_it_is_remembered() -> None:
    """A rule that sees the answer alone, learned on countries to fit, is at chance on those of test; it was not."""
    right = []
    for seed in range(6):
        conflicts = everything(build_task("facts", {"relations": ["language"]}, seed), "conflict")
        said = {(e.split, e.item, side): getattr(e, side) for e in conflicts for side in SIDES}
        counts = {
            side: Counter(v for (split, _, s), v in said.items() if (split, s) == ("fit", side)) for side in SIDES
        }
        for split, item, side in said:
            if split == "test" and side == "memorized":
                odds = [
                    np.log(counts["memorized"][v] + 0.5) - np.log(counts["generalized"][v] + 0.5)
                    for v in (said[split, item, one] for one in SIDES)
                ]
                right.append(0.5 + 0.5 * np.sign(odds[0] - odds[1]))
    assert np.mean(right) == pytest.approx(0.5, abs=0.12)


def test_values_are_dealt_so_that_each_contradicts_as_often_as_it_is_true() -> None:
    values = [*"AAAABBBCCD", *"EEFFGHIJKL"]
    true = {("made", f"thing{n:02}"): [value] for n, value in enumerate(values)}
    true["made", "thing00"] = ["A", "B"]  # both are true
    halves = {fact: "fit" if n < 10 else "test" for n, fact in enumerate(true)}
    for seed in range(20):
        found = dealt(true, 1, seed, halves.__getitem__)  # type: ignore[arg-type]
        assert Counter(v for given in found.values() for v in given) == Counter(values)
        assert not set(found["made", "thing00"]) & {"A", "B"}
        assert all(v in "ABCD" for fact, given in found.items() if halves[fact] == "fit" for v in given)
    most = {("made", f"thing{n:02}"): [value] for n, value in enumerate("AAAAAAABBC")}
    given = dealt(most, 1, 0, lambda fact: "fit")
    assert Counter(v for some in given.values() for v in some) == Counter("AAABBC"), "no more than there are others"


def test_groups_are_countries_of_one_split(task: FactsTask) -> None:
    split: dict[str, str] = {}
    for kind in KINDS:
        for example in everything(task, kind):
            assert split.setdefault(example.group, example.split) == example.split


def test_a_rephrasing_keeps_item_and_frame(task: FactsTask) -> None:
    for example in everything(task, "conflict")[:300]:
        other = task.rephrase(example, RNG)
        assert other.prompt != example.prompt
        facts = ("item", "family", "memorized", "generalized", "group", "split")
        assert [getattr(other, f) for f in facts] == [getattr(example, f) for f in facts]


def test_the_examples_of_a_seed_stay_what_they_are() -> None:
    """Digests of every prompt, answer and split, in the order of version 0.2 (countryinfo 1.0)."""
    task = build_task("facts", {"held_out_relations": ["language"], "wrong_values": 2}, 0)
    known = task.knowing({example.item for n, example in enumerate(task.facts_to_know()) if n % 3 == 0})
    assert digest(task) == "31b576b8e56c1cac"
    assert digest(known) == "b7ee27c65346719e"
    assert {name: digest(part) for name, part in known.held_out().items()} == {
        "frame": "c330fb262741c8de",
        "relation": "339388bc67e70a29",
    }


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


def test_one_known_fact_more_moves_no_other_example() -> None:
    task = build_task("facts", {}, 0)
    items = sorted(example.item for example in task.facts_to_know())
    drawn = [
        [example.prompt for example in task.knowing(set(known)).examples(np.random.default_rng(3), 200, "conflict")]
        for known in (items, [item for item in items if not item.startswith("capital|Japan")])
    ]
    assert [prompt for prompt in drawn[0] if "Japan" not in prompt] == drawn[1][
        : 200 - sum("Japan" in p for p in drawn[0])
    ]


def test_no_country_weighs_more_for_being_known_better(task: FactsTask) -> None:
    well, little = {f"{r}|Japan" for r in ("capital", "language")}, {"capital|France", "capital|Peru"}
    both = build_task("facts", {"relations": ["capital", "language"]}, 0).knowing(well | little)
    counts = Counter(example.group for example in both.examples(RNG, 90, "conflict"))
    assert counts == {"Japan": 30, "France": 30, "Peru": 30}


def test_only_what_is_known_is_contradicted(task: FactsTask) -> None:
    asked = task.facts_to_know()
    assert all(e.kind == "memory" and e.answer not in e.prompt for e in asked), "the question does not say it"  # type: ignore[operator]
    known = task.knowing({"capital|France", "capital|Japan", "language|Japan"})
    assert {e.group for e in everything(known, "conflict")} == {"France", "Japan"}
    assert len({e.generalized for e in everything(known, "conflict") if e.group == "France"}) == 2
    with pytest.raises(InputError, match="knows none"):
        task.knowing(set())
    assert len(everything(task, "conflict")) > 10_000, "the task itself stays as it is"


def test_words_and_bare_questions_as_baselines(task: FactsTask) -> None:
    example = everything(task, "conflict")[7]
    assert task.prompted(example, "memorized").prompt.endswith(example.prompt)
    bare = task.without_context(example)
    assert example.generalized not in bare.prompt  # type: ignore[operator]
    assert bare.prompt.splitlines()[-1] == example.prompt.splitlines()[-1]


def test_a_table_brings_facts_and_relations(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    words = "Who made {n}?,{n} was made by,{n} was made by {v}.,{v} made {n}.,It was {v} who made {n}."
    rows = [f"maker,thing{i},person{i},{words}" for i in range(12)]
    path.write_text("relation,subject,value,question,stem,statement,inverted,reported\n" + "\n".join(rows))
    task = build_task("facts", {"table": str(path), "relations": ["maker"]}, 0)
    example = task.examples(RNG, 1, "conflict")[0]
    assert "was made by" in example.prompt
    path.write_text(f"{path.read_text()}\nmaker,thing0,person7,{words}", encoding="utf-8-sig")
    task = build_task("facts", {"table": str(path), "relations": ["maker"], "wrong_values": 11}, 0)
    of_first = [e for e in everything(task, "conflict") if e.group == "thing0"]
    assert {e.memorized for e in of_first} == {" person0"}
    assert " person7" not in {e.generalized for e in of_first}
    for line, message in (
        (f"maker,thing0,,{words}", "line 2: value is missing"),
        ("owner,thing0,person0,,,,,", "relation 'owner' is new and needs question"),
        (f"maker,thing|0,person0,{words}", "line 2: subject is 'thing|0'"),
        (f"maker,thing0,person0,{words.replace('{v}', '{value}')}", "only {n} and {v} may be in braces"),
    ):
        path.write_text("relation,subject,value,question,stem,statement,inverted,reported\n" + line)
        with pytest.raises(InputError, match=message):
            build_task("facts", {"table": str(path), "relations": ["capital"]}, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": ["mayor"]}, "relations: 'mayor' is not one of capital, language, continent"),
        ({"frames": ["rhymed"]}, "frames: 'rhymed' is not one of context-first"),
        ({"held_out_relations": ["capital"]}, "cannot be fitted on as well"),
        ({"wrong_values": 0}, "at least one"),
        ({"table": "/nowhere.csv"}, "table: /nowhere.csv cannot be read"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("facts", options, 0)
