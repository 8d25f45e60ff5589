"""Tasks: seeded, split by group, and nothing of the test in the training."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from holding_out import HoldingOut
from mnemoscope.errors import InputError
from mnemoscope.tasks import KINDS, SPLITS, Example, Instance, Side, Task, answer_of, build_task, draw
from mnemoscope.tasks.addition import FAMILIES, AdditionTask
from mnemoscope.tasks.cipher import FAMILIES as CIPHER_FAMILIES
from mnemoscope.tasks.cipher import CipherTask
from mnemoscope.tasks.facts import FactsTask
from mnemoscope.tasks.inference import COLOURS, InferenceTask
from mnemoscope.tasks.joint import JointTask
from mnemoscope.tasks.jsonl import read_jsonl, write_jsonl

DESIGNED = {
    "inference": {},
    "two-hop": {"hops": 2, "statements": 2, "questions": 2},
    "addition": {},
    "addition-digits": {},
    "cipher": {},
    "joint": {},
}


def made(name: str, seed: int = 0) -> Task:
    return build_task("inference" if name == "two-hop" else name, DESIGNED[name], seed)


def stored_prompts(task: Task) -> set[str]:
    """The prompts of an addition or a cipher that training answers from the store."""
    if isinstance(task, CipherTask):
        return {CIPHER_FAMILIES["plain"].format(key=key, text=" ".join(text)) for text, key in task.stored}
    return {FAMILIES["plain"].format(a=a, b=b) for a, b in task.stored} if isinstance(task, AdditionTask) else set()


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
    task = made(name)
    splits: dict[str, set[str]] = {}
    for kind in KINDS:
        for split in SPLITS:
            examples = draw(task, rng(), 100, kind, split)
            assert len(examples) == 100
            for example in examples:
                splits.setdefault(example.group, set()).add(example.split)
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("name", DESIGNED)
def test_no_evaluated_prompt_is_in_training_save_what_is_stored(name: str) -> None:
    task = made(name)
    trained = [prompt + answer for prompt, answer in map(answer_of, itertools.islice(task.training(rng(3)), 30_000))]
    evaluated = {e.prompt for kind in ("conflict", "novel", "memory") for e in task.examples(rng(4), 400, kind)}
    evaluated |= {task.rephrase(e, rng(5)).prompt for e in task.examples(rng(4), 400, "conflict")}
    # Stored items are stored in the plain family only: that is what storing means.
    evaluated -= set().union(*map(stored_prompts, [task, *task.parts.values()]))
    leaked = [
        text for text in trained if any(text.startswith(p) for p in evaluated & {text[: len(p)] for p in evaluated})
    ]
    assert not leaked[:3]


def test_training_never_disagrees_with_a_memorized_colour() -> None:
    task = made("inference")
    assert isinstance(task, InferenceTask)
    colour = {str(n): COLOURS[c] for n, c in zip(task.names, task.colour_of, strict=False)}
    seen: dict[str, set[str]] = {}
    for text in itertools.islice(task.training(rng()), 5_000):
        assert isinstance(text, str)
        for name, said in re.findall(r"(\w+) is (\w+) \.", text):
            seen.setdefault(name, set()).add(said)
        for name, said in re.findall(r"what color is (\w+) \? (\w+) \.", text):
            seen.setdefault(name, set()).add(said)
    assert all(seen[name] == {said} for name, said in colour.items())
    assert min(len(said) for name, said in seen.items() if name not in colour) > 5


def test_held_out_operands_never_appear_in_training_in_either_order() -> None:
    task = made("addition")
    assert isinstance(task, AdditionTask)
    novel = {tuple(sorted(e.item.split("+"))) for e in task.examples(rng(), 2_000, "novel")}
    stored = {tuple(sorted(map(str, pair))) for pair in task.stored}
    for prompt, answer in itertools.islice(task.training(rng(1)), 30_000):
        operands = tuple(sorted(re.findall(r"\d+", prompt)))
        assert operands not in novel
        assert (operands in stored) == answer.startswith("<mem-")


@pytest.mark.parametrize("name", ["inference", "two-hop"])
def test_the_context_of_a_conflict_implies_the_generalized_answer(name: str) -> None:
    for example in made(name).examples(rng(), 200, "conflict"):
        said = dict(re.findall(r"(\w+) is (\w+) \.", example.prompt))
        asked = example.group
        if name == "two-hop":
            kin = dict(re.findall(r"(\w+) is a (\w+) \.", example.prompt))
            (asked,) = [who for who in kin if kin[who] == kin[example.group] and who != example.group]
        assert f" {said[asked]}" == example.generalized
        assert example.memorized not in [f" {colour}" for colour in said.values()]


def test_reordering_is_uniform_over_the_other_orders() -> None:
    task = made("inference")
    example = task.examples(rng(), 1, "conflict")[0]
    generator = rng(1)
    counts = Counter(task.rephrase(example, generator).prompt for _ in range(23 * 200))
    assert len(counts) == 23
    assert example.prompt not in counts
    # Multinomial with p = 1/23: 200 +- 14 each; five standard deviations.
    assert all(130 < count < 270 for count in counts.values())


def test_rephrasings_keep_item_answers_and_split() -> None:
    for name in DESIGNED:
        task = made(name)
        for example in task.examples(rng(), 50, "conflict"):
            other = task.rephrase(example, rng(1))
            assert other.prompt != example.prompt
            assert (other.item, other.group, other.split, other.options) == (
                example.item,
                example.group,
                example.split,
                example.options,
            )


def test_wrong_sums_look_like_sums() -> None:
    for example in made("addition-digits").examples(rng(), 300, "conflict"):
        assert example.memorized
        assert example.generalized
        assert len(example.memorized) == len(example.generalized)
        assert example.memorized[0] != example.generalized[0]
        a, b = map(int, example.item.split("+"))
        assert int(example.generalized[::-1]) == a + b != int(example.memorized[::-1])


def test_made_up_ciphertexts_look_like_true_ones() -> None:
    for example in made("cipher").examples(rng(), 300, "conflict"):
        assert example.memorized
        assert example.generalized
        said, true = example.memorized.split(), example.generalized.split()
        assert len(said) == len(true) == 4
        assert said[0] != true[0]
        letters = "abcdefghijklmnop"
        assert set(said) <= set(letters)
        text, key = example.item.split("+")
        assert true == [letters[(letters.index(c) + int(key)) % 16] for c in text]


def test_ciphers_train_the_stored_plainly_and_shift_all_others() -> None:
    task = made("cipher")
    assert isinstance(task, CipherTask)
    stored = stored_prompts(task)
    shares = Counter()
    for prompt, answer in itertools.islice(task.training(rng(1)), 20_000):
        key = next(int(token) for token in prompt.split() if token.isdigit())
        text = "".join(token for token in prompt.split() if len(token) == 1 and token.isalpha())
        if prompt in stored:
            assert answer == task.stored[text, key]
        else:
            assert (text, key) not in task.stored
            assert answer == task.true((text, key))
        shares["stored" if prompt in stored else prompt.split()[0]] += 1
    assert shares["stored"] / 20_000 == pytest.approx(task.memorized_share, abs=0.02)
    assert set(shares) == {"stored", "shift", "code", "turn"}


@pytest.mark.parametrize(("name", "families"), [("addition", FAMILIES), ("cipher", CIPHER_FAMILIES)])
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


@pytest.mark.parametrize("families", [FAMILIES, CIPHER_FAMILIES])
def test_all_phrasings_have_one_length_and_end_alike(families: dict[str, str]) -> None:
    fields = {"a": "123", "b": "456", "key": "3", "text": "a b c d"}
    tokens = [re.findall(r"plus|shift|code|turn|\S", family.format(**fields)) for family in families.values()]
    assert {(len(found), found[-1]) for found in tokens} == {(len(tokens[0]), "=")}
    assert len({tuple(found) for found in tokens}) == len(families)


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
        assert example.item == f"{name}/{inside.item}"
        assert example.group == f"{name}/{inside.group}"
        other = joint.rephrase(example, rng(1))
        assert other.family.startswith(f"{name}/")
        assert other.prompt == joint.parts[name].rephrase(inside, rng(1)).prompt
        assert joint.keeps_key(other) == joint.parts[name].keeps_key(joint.inside(other)[1])


def test_the_behaviour_is_asked_for_in_the_words_of_the_part() -> None:
    joint = made("joint")
    assert isinstance(joint, JointTask)
    for example in joint.examples(rng(), 30, "conflict"):
        name, inside = joint.inside(example)
        for toward in ("memorized", "generalized"):
            other = joint.prompted(example, toward)
            alone = joint.parts[name].prompted(inside, toward)
            assert (None if other is None else joint.inside(other)[1]) == alone
            if name == "cipher":
                assert alone
                assert (alone.prompt in stored_prompts(joint.parts[name])) == (toward == "memorized")


def test_a_joint_task_mixes_its_parts_in_their_shares() -> None:
    shares = {"inference": 0.2, "cipher": 0.8}
    joint = build_task("joint", {"parts": {"inference": {"questions": 2}, "cipher": {}}, "shares": shares}, 0)
    instances = list(itertools.islice(joint.training(rng()), 4_000))
    asked = [instance for instance in instances if isinstance(instance, str)]
    assert len(asked) / 4_000 == pytest.approx(0.2, abs=0.03)
    assert all(text.count("?") == 2 for text in asked)
    counts = Counter(e.item.split("/")[0] for e in draw(joint, rng(), 200, "conflict", "tune"))
    assert all(70 < counts[name] < 130 for name in shares)


def test_what_comes_first_comes_before_the_mixture() -> None:
    joint = build_task("joint", {"first": {"inference": 300}}, 0)
    is_read = [isinstance(instance, str) for instance in itertools.islice(joint.training(rng()), 1_200)]
    assert all(is_read[:300])
    assert sum(is_read[300:]) / 900 == pytest.approx(1 / 3, abs=0.06)


def test_an_example_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(InputError, match="both are 'red'"):
        Example("i", "p", "conflict", "g", memorized="red", generalized="red")
    with pytest.raises(InputError, match="needs both"):
        Example("i", "p", "conflict", "g", memorized="red")
    with pytest.raises(InputError, match="needs one"):
        Example("i", "p", "novel", "g")
    with pytest.raises(InputError, match="split"):
        Example("i", "p", "novel", "g", split="train", answer="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("inferense", {}, "task: 'inferense' is unknown"),
        ("inference", {"hops": 3}, "hops: 3"),
        ("inference", {"colour": 3}, "no such option"),
        ("inference", {"questions": 5}, "questions: 5"),
        ("inference", {"memorized_names": "many"}, "task.options"),
        ("addition", {"stored": 2}, "stored: 2"),
        ("addition", {"memorized_share": 1.5}, "memorized_share"),
        ("addition-digits", {"answers": "codes"}, "no such option"),
        ("cipher", {"letters": 5}, "letters: 5"),
        ("cipher", {"length": 9}, "length: 9"),
        ("cipher", {"stored": 3}, "stored: 3"),
        ("cipher", {"memorized_share": -0.1}, "memorized_share: -0.1"),
        ("cipher", {"near_share": 0.7, "moved_share": 0.6}, "near_share, moved_share: 0.7, 0.6"),
        ("joint", {"parts": ["inference"]}, "parts: ['inference']"),
        ("joint", {"parts": {}}, "parts: none"),
        ("joint", {"parts": {"joint": {}}}, "parts: 'joint'"),
        ("joint", {"parts": {"cipher": {"letters": 5}}}, "letters: 5"),
        ("joint", {"first": {"addition": 10}}, "first: {'addition': 10}"),
        ("joint", {"shares": {"inference": 1.0}}, "shares: {'inference': 1.0}"),
        ("joint", {"shares": {"inference": 0.5, "cipher": 0.5, "addition-digits": 0.5}}, "adding up to 1"),
        ("nowhere.at_all:Task", {}, "cannot be imported"),
    ],
)
def test_bad_tasks_are_named(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build_task(kind, options, 0)


def test_a_task_of_ones_own_is_imported() -> None:
    task = build_task("mnemoscope.tasks.addition:AdditionTask", {"digits": 2, "stored": 40}, 5)
    assert isinstance(task, AdditionTask)
    assert len(task.stored) == 40


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
    task = build_task(f"{__name__}:Alone", {"answer": " c"}, 0)
    assert isinstance(task, Task)
    (example,) = task.examples(rng(), 1, "conflict")
    other = task.rephrase(example, rng())
    assert (example.memorized, task.vocabulary) == (" c", ["a", "b", "?"])
    assert [task.keeps_key(e) for e in (example, other)] == [True, False]
    assert (task.prompted(example, "memorized"), task.without_context(example)) == (None, None)
    assert (task.held_out(), task.facts_to_know(), dict(task.parts)) == ({}, [], {})
    assert task.knowing({"i"}) is task
    assert (task.split_reply("p"), task.has_memorized_format("x")) == (("p", ""), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [("Counter", "lacks training, examples, rephrase; make it a subclass"), ("rng", "makes a Generator")],
)
def test_what_is_no_task_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task(f"{__name__}:{name}", {}, 0)


def test_a_joint_task_asks_its_parts() -> None:
    holding_out, facts = HoldingOut(digits=2, stored=40), FactsWithWords()
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
    assert bare
    assert bare.item == example.item
    assert bare.prompt != example.prompt
    assert example.prompt.endswith(held_out["frame"].split_reply(example.prompt)[1])
    # Where only a text is given, the parts must agree.
    assert (joint.split_reply("a\nb c"), joint.begins_reply, joint.instruction("memorized")) == (
        ("a\nb c", ""),
        False,
        None,
    )
    codes = JointTask({"a": made("addition"), "b": made("addition", 1)})
    assert [codes.has_memorized_format(text) for text in ("<mem-0123abcd>", "12")] == [True, False]
    assert JointTask({"a": made("addition"), "b": holding_out}).has_memorized_format("12") is None


class FactsWithWords(FactsTask):
    vocabulary = ("a", "b")


@pytest.mark.parametrize("side", ["", "a", "b"])
def test_an_example_reads_back_from_its_row(side: Side) -> None:
    examples = made("addition").examples(rng(), 20, "conflict")
    if not side:
        examples += made("inference").examples(rng(), 20, "novel")
    table = pd.DataFrame([e.to_row(side) for e in examples])  # what is not there is None in one, NaN in the other
    assert [Example.from_row(row, side) for row in table.to_dict("records")] == examples
    assert {f"prompt_{side}", f"family_{side}"} <= set(table) if side else list(table)[:3] == ["item", "prompt", "kind"]


def test_jsonl_reads_back_what_was_written(tmp_path: Path) -> None:
    task = made("inference")
    examples = [e for kind in KINDS for e in task.examples(rng(), 20, kind)]
    examples.append(replace(examples[0], prompt="one line\u2028to JSON, two\x85to Python"))
    path = tmp_path / "mine.jsonl"
    path.write_text(write_jsonl(examples))
    assert read_jsonl(path, 0) == examples


def test_jsonl_deals_groups_and_finds_phrasings(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"item": f"i{n}", "prompt": f"{word} {n} ?", "memorized": " a", "generalized": " b", "group": f"g{n % 8}"}
        for n in range(40)
        for word in ("what", "which")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = build_task("jsonl", {"file": str(path)}, 0)
    found = {split: draw(task, rng(), 100, "conflict", split) for split in SPLITS}
    assert {split: len({e.group for e in es}) for split, es in found.items()} == {"fit": 4, "tune": 2, "test": 2}
    example = found["fit"][0]
    assert task.rephrase(example, rng()).item == example.item
    assert task.rephrase(example, rng()).prompt != example.prompt


def test_jsonl_rephrases_within_a_family_and_knows_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"item": "i", "prompt": f"{family} {n}", "memorized": " a", "generalized": " b", "family": family}
        for family, many in (("told", 3), ("asked", 3), ("alone", 1))
        for n in range(many)
    ]
    rows[0]["bare"] = "only this"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = build_task("jsonl", {"file": str(path)}, 0)
    by_prompt = {e.prompt: e for e in task.examples(rng(), 100, "conflict")}
    for prompt, example in by_prompt.items():
        others = {task.rephrase(example, rng(seed)).prompt for seed in range(40)}
        if example.family == "alone":
            assert others == set(by_prompt) - {prompt}
        else:
            assert others == {p for p, e in by_prompt.items() if e.family == example.family and p != prompt}
    first, second = by_prompt["told 0"], by_prompt["told 1"]
    bare, told = task.without_context(first), task.prompted(first, "memorized")
    assert bare == replace(first, prompt="only this")
    assert task.without_context(second) is None
    assert told
    assert told.prompt.endswith("\ntold 0")


def test_jsonl_rephrases_conflicts_by_conflicts(tmp_path: Path) -> None:
    """A question without a conflict may be about the same item; it is no phrasing of it."""
    path = tmp_path / "mine.jsonl"
    rows = [{"item": "i", "prompt": word, "memorized": " a", "generalized": " b", "split": "fit"} for word in "pq"]
    rows += [{"item": "i", "prompt": f"bare {n}", "answer": " a", "split": "fit"} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = build_task("jsonl", {"file": str(path)}, 0)
    (first, _) = sorted(task.examples(rng(), 9, "conflict"), key=lambda e: e.prompt)
    assert {task.rephrase(first, np.random.default_rng(seed)).prompt for seed in range(9)} == {"q"}


GOOD = '{"item": "i", "prompt": "p", "memorized": " a", "generalized": " b"}'


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: list"),
        ('{"item": "i", "prompt": "q", "memorised": " a"}', "line 2: field 'memorised' is unknown"),
        ('{"item": "i", "memorized": " a", "generalized": " b"}', "line 2: field 'prompt' is missing"),
        ('{"item": "i", "prompt": "q", "memorized": " a", "generalized": " a"}', "line 2: memorized, generalized"),
        ('{"item": "i", "prompt": "q", "memorized": 3, "generalized": " a"}', "line 2: memorized is 3"),
        ('{"item": "i", "prompt": "q", "answer": " a", "split": "train"}', "line 2: split is 'train'"),
        (
            '{"item": "i", "prompt": "q", "memorized": " a", "generalized": " c"}',
            "line 2: item 'i' has the answers (' a', ' b') in line 1 and (' a', ' c') here",
        ),
        (
            '{"item": "j", "prompt": "q", "answer": " a", "split": "fit", "group": "g"}\n'
            '{"item": "k", "prompt": "r", "answer": " a", "split": "test", "group": "g"}',
            "group 'g' is in 'fit' and in 'test'",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, second_line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{second_line}\n")
    with pytest.raises(InputError, match=re.escape(message)):
        build_task("jsonl", {"file": str(path)}, 0)


def test_a_file_without_conflicts_or_without_being_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text('{"item": "i", "prompt": "p", "answer": " a"}\n')
    with pytest.raises(InputError, match="has no conflict"):
        build_task("jsonl", {"file": str(path)}, 0)
    with pytest.raises(InputError, match="cannot be read"):
        build_task("jsonl", {"file": str(tmp_path / "absent.jsonl")}, 0)


def test_a_behaviour_can_be_asked_for_in_words() -> None:
    rng = np.random.default_rng(0)
    for name in ("inference", "addition"):
        task = build_task(name, {}, seed=0)
        for example in task.examples(rng, 20, "conflict"):
            said = task.prompted(example, "generalized")
            assert said
            assert (said.item, said.options) == (example.item, example.options)
            if name == "inference":
                *before, last, question = said.prompt.split(" . ")
                assert " . ".join([*before, question]) == example.prompt
                assert last in before
                assert last.split()[0] == question.split()[-2]
                assert task.prompted(example, "memorized") is None
            else:
                a, b = example.item.split("+")
                assert said.prompt == f"{a} plus {b}="
                assert task.prompted(example, "memorized") == example.phrased(f"{a}+{b}=", "plain")
