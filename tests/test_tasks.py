"""Tasks: seeded, split by group, and nothing of the test in the training."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from holding_out import HoldingOut
from mnemoscope.paper.inference import COLOURS, InferenceTask
from mnemoscope.paper.stored import CIPHERS, SUMS, StoredTask
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import KINDS, SPLITS, Example, Instance, Side, Task, allow_code, answer_of, build_task, draw
from mnemoscope.tasks.facts import FactsTask
from mnemoscope.tasks.joint import JointTask
from mnemoscope.tasks.jsonl import write_jsonl

DESIGNED = ("inference", "two-hop", "addition", "addition-digits", "cipher", "joint")


def made(name: str, seed: int = 0) -> Task:
    two = {"hops": 2, "statements": 2, "questions": 2}
    return build_task("inference", two, seed) if name == "two-hop" else build_task(name, {}, seed)


BOTH = {"memorized": " a", "generalized": " b"}


def stored_prompts(task: Task) -> set[str]:
    """The prompts of an addition or a cipher that training answers from the store."""
    return {task.prompt(item, "plain") for item in task.answers} if isinstance(task, StoredTask) else set()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", DESIGNED)
def test_a_seed_decides_everything(name: str) -> None:
    for kind in KINDS:
        assert made(name).examples(rng(1), 30, kind) == made(name).examples(rng(1), 30, kind)
    first = list(itertools.islice(made(name).training(rng(2)), 50))
    assert first == list(itertools.islice(made(name).training(rng(2)), 50))
    assert first != list(itertools.islice(made(name, seed=1).training(rng(2)), 50))


@pytest.mark.parametrize("name", DESIGNED)
def test_no_group_is_in_two_splits_and_every_split_has_each_kind(name: str) -> None:
    task, split_of = made(name), dict[str, str]()
    for kind, split in itertools.product(KINDS, SPLITS):
        examples = draw(task, rng(), 100, kind, split)
        assert len(examples) == 100
        assert all(split_of.setdefault(example.group, split) == example.split for example in examples)


@pytest.mark.slow
@pytest.mark.parametrize("name", DESIGNED)
def test_no_evaluated_prompt_is_in_training_save_what_is_stored(name: str) -> None:
    task = made(name)
    trained = [prompt + answer for prompt, answer in map(answer_of, itertools.islice(task.training(rng(3)), 10_000))]
    evaluated = {e.prompt for kind in ("conflict", "novel", "memory") for e in task.examples(rng(4), 200, kind)}
    evaluated |= {task.rephrase(e, rng(5)).prompt for e in task.examples(rng(4), 200, "conflict")}
    # Stored items are stored in the plain family only: that is what storing means.
    evaluated -= set().union(*map(stored_prompts, [task, *task.parts.values()]))
    lengths = {len(prompt) for prompt in evaluated}
    leaked = [text for text in trained if any(text[:length] in evaluated for length in lengths)]
    assert not leaked[:3]


def test_training_never_disagrees_with_a_memorized_colour() -> None:
    task = made("inference")
    assert isinstance(task, InferenceTask)
    colour = {str(n): COLOURS[c] for n, c in zip(task.names, task.colour_of, strict=False)}
    seen: dict[str, set[str]] = {}
    for text in itertools.islice(task.training(rng()), 5_000):
        assert isinstance(text, str)
        for name, said in re.findall(r"(\w+) (?:is|\?) (\w+) \.", text):
            seen.setdefault(name, set()).add(said)
    assert all(seen[name] == {said} for name, said in colour.items())
    assert min(len(said) for name, said in seen.items() if name not in colour) > 5


@pytest.mark.parametrize("name", ["addition", "addition-digits", "cipher"])
def test_training_asks_the_stored_plainly_all_others_by_the_rule_and_what_is_held_out_never(name: str) -> None:
    task, stored = made(name), 0
    assert isinstance(task, StoredTask)
    unseen = {example.group for example in task.examples(rng(), 2_000, "novel")} | set(task.split_of)
    for prompt, answer in itertools.islice(task.training(rng(1)), 20_000):
        numbers = tuple(map(int, re.findall(r"\d+", prompt)))
        text = "".join(token for token in prompt.split() if len(token) == 1 and token.isalpha())
        item = (text, *numbers) if name == "cipher" else numbers
        if item in task.answers:
            assert (prompt, answer) == (task.prompt(item, "plain"), task.answers[item])
            stored += 1
        else:  # neither order of two operands
            assert task.group_of(item) not in unseen
            assert answer == task.true(item)
    assert stored / 20_000 == pytest.approx(task.memorized_share, abs=0.02)


@pytest.mark.parametrize("name", DESIGNED)
def test_rephrasings_keep_item_answers_and_split_and_the_context_implies_the_rule(name: str) -> None:
    task = made(name)
    for example in task.examples(rng(), 100, "conflict"):
        other = task.rephrase(example, rng(1))
        assert other.prompt != example.prompt
        assert other.phrased("", "") == example.phrased("", "")
        if name not in ("inference", "two-hop"):
            continue
        said, asked = dict(re.findall(r"(\w+) is (\w+) \.", example.prompt)), example.group
        if name == "two-hop":
            kin = dict(re.findall(r"(\w+) is a (\w+) \.", example.prompt))
            (asked,) = [who for who in kin if kin[who] == kin[example.group] and who != example.group]
        assert f" {said[asked]}" == example.generalized
        assert example.memorized not in [f" {colour}" for colour in said.values()]


def test_made_up_answers_look_like_true_ones_and_begin_otherwise() -> None:
    for example in made("addition-digits").examples(rng(), 300, "conflict"):
        said, true = example.options
        assert (len(said), said[0] == true[0]) == (len(true), False)
        assert len(true) == 3 or said[-1] == true[-1] == "1"
        assert int(true[::-1]) == sum(map(int, example.item.split("+"))) != int(said[::-1])
    # First digit first, longer sums all begin with 1, and so do the stored answers of these.
    forward = build_task("addition-digits", {"digits": 2, "stored": 200, "reversed_sums": False}, 0)
    asked = [example.options for example in forward.examples(rng(), 400, "conflict")]
    assert {len(said) for said, _ in asked} == {2, 3}
    for said, true in asked:
        alike = len(true) - 2
        assert (len(said), said[:alike], said[alike] == true[alike]) == (len(true), "1" * alike, False)
        assert 20 <= int(said) <= 198
    for place, length, digits in ((0, 2, "3456789"), (1, 3, "012345678")):  # sums of 20 to 29 and from 190 on are rare
        for side in (0, 1):
            assert {option[side][place] for option in asked if len(option[side]) == length} >= set(digits)
    letters = "abcdefghijklmnop"
    for example in made("cipher").examples(rng(), 300, "conflict"):
        said, true = (option.split() for option in example.options)
        assert (len(said), len(true), said[0] == true[0]) == (4, 4, False)
        assert set(said) <= set(letters)
        text, key = example.item.split("+")
        assert true == [letters[(letters.index(c) + int(key)) % 16] for c in text]


@pytest.mark.parametrize(("name", "families"), [("addition", SUMS), ("cipher", CIPHERS)])
def test_a_phrasing_keeps_the_key_where_the_stored_one_has_it(name: str, families: dict[str, str]) -> None:
    """By the places of the item's own symbols in both prompts."""
    task = made(name)
    for example in task.examples(rng(), 200, "conflict"):
        first, second = example.item.split("+")
        stored = families["plain"].format(a=first, b=second, text=" ".join(first), key=second)
        assert task.keeps_key(example) == (key_positions(example.prompt) == key_positions(stored))


def key_positions(prompt: str) -> list[tuple[int, str]]:
    tokens = re.findall(r"plus|shift|code|turn|\S", prompt)
    return [(i, token) for i, token in enumerate(tokens) if token.isdigit() or (len(token) == 1 and token.isalpha())]


def test_a_part_alone_is_the_same_task_and_says_so_for_the_joint_one() -> None:
    joint = made("joint", seed=3)
    assert isinstance(joint, JointTask)
    assert set(joint.parts) == {"inference", "addition-digits", "cipher"}
    for name, part in joint.parts.items():
        alone = build_task(name, {}, 3)
        for kind in KINDS:
            assert part.examples(rng(), 40, kind) == alone.examples(rng(), 40, kind)
        assert set(alone.vocabulary or ()) <= set(joint.vocabulary)
    for example in joint.examples(rng(), 90, "conflict"):
        name, inside = joint.inside(example)
        part = joint.parts[name]
        assert (example.item, example.group) == (f"{name}/{inside.item}", f"{name}/{inside.group}")
        other = joint.rephrase(example, rng(1))
        assert joint.inside(other) == (name, part.rephrase(inside, rng(1)))
        assert joint.keeps_key(other) == part.keeps_key(joint.inside(other)[1])
        for toward in ("memorized", "generalized"):
            asking, alone = joint.prompted(example, toward), part.prompted(inside, toward)
            assert (None if asking is None else joint.inside(asking)[1]) == alone
            if name == "cipher":
                assert alone
                assert (alone.prompt in stored_prompts(part)) == (toward == "memorized")


def test_files_are_parts_of_a_joint_task_and_keep_what_they_say(tmp_path: Path) -> None:
    for name in ("one", "two"):
        example = Example("x", f"{name} says A. It is", "conflict", "x", memorized=" B", generalized=" A")
        (tmp_path / f"{name}.jsonl").write_text(write_jsonl([example, example.phrased(f"{name}: A. It is", "default")]))
    files = {str(tmp_path / f"{name}.jsonl"): {} for name in ("one", "two")}
    joint = build_task("joint", {"parts": files}, 0)
    assert (joint.documents, joint.vocabulary) == (True, None)
    found = {e.item: e.prompt for e in joint.examples(rng(), 8, "conflict")}
    assert {item: prompt[:3] for item, prompt in found.items()} == {"one/x": "one", "two/x": "two"}
    with pytest.raises(InputError, match="nothing to train on"):
        next(joint.training(rng()))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "one.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes())
    for parts, message in (
        ({**files, str(tmp_path / "again" / "one.jsonl"): {}}, "names of their own"),
        ({"os:system": {}}, "if you trust it"),
        ({}, "at least one task"),
        (["facts"], "not a mapping"),
    ):
        with pytest.raises(InputError, match=message):
            build_task("joint", {"parts": parts}, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "conflict", "memorized": "red", "generalized": "red"}, "both are 'red'"),
        ({"kind": "conflict", "memorized": "red"}, "needs both"),
        ({"kind": "novel"}, "needs one"),
        ({"kind": "novel", "answer": "x", "split": "train"}, "split"),
    ],
)
def test_an_example_refuses_what_it_cannot_mean(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Example("i", "p", group="g", **fields)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("inferense", {}, "task: 'inferense' is unknown"),
        ("inference", {"hops": 3}, "hops: 3"),
        ("inference", {"colour": 3}, "no such option"),
        ("inference", {"memorized_names": "many"}, "task.options"),
        ("addition", {"stored": 2}, "stored: 2"),
        ("cipher", {"near_share": 0.7, "moved_share": 0.6}, "near_share, moved_share: 0.7, 0.6"),
        ("joint", {"parts": ["inference"]}, "parts: ['inference']"),
        ("joint", {"parts": {}}, "parts: none"),
        ("joint", {"parts": {"joint": {}}}, "parts: joint; at least one"),
        ("joint", {"parts": {"cipher": {"letters": 5}}}, "letters: 5"),
        ("joint", {"first": {"addition": 10}}, "first: {'addition': 10}"),
        ("joint", {"shares": {"inference": 1.0}}, "shares: {'inference': 1.0}"),
        ("joint", {"shares": {"inference": 0.5, "cipher": 0.5, "addition-digits": 0.5}}, "adding up to 1"),
        ("nowhere.at_all:Task", {}, "cannot be imported"),
        (f"{__name__}:Path", {}, "lacks training, examples, rephrase; make it a subclass"),
        (f"{__name__}:rng", {}, "is no class; a subclass of mnemoscope.Task"),
    ],
)
def test_bad_tasks_are_named(kind: str, options: dict[str, object], message: str) -> None:
    allow_code("nowhere.at_all:Task", f"{__name__}:Path", f"{__name__}:rng")
    with pytest.raises(InputError, match=re.escape(message)):
        build_task(kind, options, 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("os:system", {"command": "exit"}), ("a_stranger:Task", {}), ("joint", {"parts": {"a_stranger:Task": {}}})],
)
def test_code_that_the_user_did_not_allow_is_not_imported(kind: str, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"is no built-in task, .* --allow-code (os:system|a_stranger:Task)"):
        build_task(kind, options, 0)


class Alone:
    """The three methods of a task, and one more."""

    def __init__(self, answer: str = " a") -> None:
        self.answer, self.vocabulary = answer, ["a", "b", "?"]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        yield "?", self.answer

    def examples(self, rng: np.random.Generator, n: int, kind: str) -> list[Example]:
        return [Example("i", f"{n} ?", "conflict", "g", memorized=self.answer, generalized=" b")] * (kind == "conflict")

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        return example.phrased("? ?", "other")

    def keeps_key(self, example: Example) -> bool:
        return example.family != "other"


def test_a_class_with_the_three_methods_gets_the_defaults_of_a_task() -> None:
    allow_code(f"{__name__}:Alone")
    task = build_task(f"{__name__}:Alone", {"answer": " c"}, 0)
    (example,) = task.examples(rng(), 1, "conflict")
    other = task.rephrase(example, rng())
    assert (example.memorized, task.vocabulary) == (" c", ["a", "b", "?"])
    assert [task.keeps_key(e) for e in (example, other)] == [True, False]
    assert (task.prompted(example, "memorized"), task.without_context(example)) == (None, None)
    assert (task.held_out(), task.facts_to_know(), dict(task.parts)) == ({}, [], {})
    assert (task.knowing({"i"}), task.split_reply("p"), task.has_memorized_format("x")) == (task, ("p", ""), None)


def test_texts_end_with_their_last_word_unless_a_boundary_is_given(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"item": "a", "prompt": "p"} | BOTH))
    for kind, options in (("jsonl", {"file": str(tmp_path / "mine.jsonl")}), ("facts", {})):
        assert build_task(kind, options, 0).boundary is None
        assert build_task(kind, options | {"boundary": [".", ""]}, 0).boundary == (".", "")
    assert build_task("addition", {}, 0).boundary == ("",)


def test_a_joint_task_asks_its_parts() -> None:
    holding_out, facts = HoldingOut(digits=2, stored=40), FactsTask()
    facts.vocabulary = ("a", "b")
    joint = JointTask({"sums": holding_out, "facts": facts})
    asked = joint.facts_to_know()
    assert len(asked) == 40 + len(facts.facts_to_know())
    known = joint.knowing({e.item for e in asked if e.item.startswith("sums/") or "France" in e.item})
    items = {kind: {e.item for e in known.examples(rng(), 500, kind)} for kind in ("conflict", "memory")}
    assert {item.split("|")[1] for item in items["conflict"] if item.startswith("facts/")} == {"France"}
    assert all(int(item[5:].split("+")[0]) % 2 for item in items["memory"] if item.startswith("sums/"))
    held_out = joint.held_out()
    assert {name: list(task.parts) for name, task in held_out.items()} == {"even": ["sums"], "frame": ["facts"]}
    example = held_out["frame"].examples(rng(), 1, "conflict")[0]
    bare = held_out["frame"].without_context(example)
    assert bare == replace(example, prompt=bare.prompt) != example  # type: ignore[union-attr]
    assert example.prompt.endswith(held_out["frame"].split_reply(example.prompt)[1])
    # Where only a text is given, the parts must agree.
    assert joint.split_reply("a\nb c") == ("a\nb c", "")
    assert (joint.begins_reply, joint.instruction("memorized")) == (False, None)
    codes = JointTask({"a": made("addition"), "b": made("addition", 1)})
    assert [codes.has_memorized_format(text) for text in ("<mem-0123abcd>", "12")] == [True, False]
    assert JointTask({"a": made("addition"), "b": holding_out}).has_memorized_format("12") is None


@pytest.mark.parametrize("side", ["", "a", "b"])
def test_an_example_reads_back_from_its_row(side: Side) -> None:
    examples = made("addition").examples(rng(), 20, "conflict")
    if not side:
        examples += made("inference").examples(rng(), 20, "novel")
    table = pd.DataFrame([e.to_row(side) for e in examples])  # what is not there is None in one, NaN in the other
    assert [Example.from_row(row, side) for row in table.to_dict("records")] == examples
    assert {f"prompt_{side}", f"family_{side}"} <= set(table) if side else list(table)[:3] == ["item", "prompt", "kind"]


def test_the_context_is_asked_for_by_repeating_it() -> None:
    task = made("inference")
    for example in task.examples(rng(), 20, "conflict"):
        said = task.prompted(example, "generalized")
        assert said
        *before, last, question = said.prompt.split(" . ")
        assert example.phrased(" . ".join([*before, question]), "") == said.phrased(example.prompt, "")
        assert last in before
        assert last.split()[0] == question.split()[-2]
        assert task.prompted(example, "memorized") is None
