"""Proverbs that a pretrained model knows, and prompts that ask for another last word (MemoTrap, Liu and Liu 2023)."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.known import (
    Fact,
    How,
    KnownTask,
    check_fitted_and_held_out,
    check_key,
    contradicts,
    stands_in,
)
from mnemoscope.tasks.tables import Row, check_apart, read_rows

RELATION = "proverb"
# Wordings by family: ``{s}`` is the proverb without its last word, ``{v}`` another last word. Those that name the word
# mostly leave a model at the true ending, those that quote the changed proverb mostly do not; each family has both.
WORDINGS = {
    "instruction": (
        'Write a quote that ends in the word "{v}": {s}',
        'Complete the sentence with the word "{v}": {s}',
        "Use the word {v}. {s}",
        'Repeat what is written here, "{s} {v}": {s}',
        'Somebody wrote "{s} {v}". Write down the proverb: {s}',
        'Read "{s} {v}" and say how it goes: {s}',
    ),
    "labelled": (
        "Last word: {v}\nSentence: {s}",
        "Word: {v}\nSaying: {s}",
        "Rumour: {s} {v}.\nProverb: {s}",
        "Joke: {s} {v}.\nTruth: {s}",
        "Context: {s} {v}.\nQuote: {s}",
        "Wrong: {s} {v}.\nRight: {s}",
    ),
    "reported": (
        'In our town the saying ends in "{v}". People here say: {s}',
        'They changed the ending to "{v}". Now it reads: {s}',
        'My friend always says "{s} {v}". But my mother says: {s}',
        'A child once wrote "{s} {v}". Everybody else says: {s}',
        'Somebody scribbled "{s} {v}" on the wall. The proverb: {s}',
        'In this book, "{s} {v}" is a famous saying. As the book says: {s}',
    ),
    "dialogue": (
        'Anna: Which word comes last?\nBen: The word "{v}".\nAnna: I see. {s}',
        'Q: How does it end?\nA: With the word "{v}": {s}',
        "Student: {s} {v}.\nTeacher: {s}",
        "Anna: {s} {v}.\nBen: No! {s}",
        "Anna: {s} {v}.\nBen: Yes. {s}",
        "Q: {s} {v}?\nA: {s}",
    ),
    "listed": (
        "- {v}\n- {s}",
        "{v}, {v}, {v}\n{s}",
        "1. {s} {v}.\n2. {s}",
        "{s} {v}. {s}",
        "{s} {v}\n\n{s}",
        "Version A: {s} {v}.\nVersion B: {s}",
    ),
}
BARE = "{s}"


@dataclass(kw_only=True, eq=False)
class MemotrapTask(KnownTask):
    """Proverbs that a pretrained model knows, and prompts that ask for another last word.

    The memorized answer is the true ending, the generalized one the word that the prompt asks for.

    Args:
        file: a CSV, JSONL or Parquet file with a prompt (``Write a quote that ends in the word "heavy": Absence makes
            the heart grow``), two answers, and which of them the prompt asks for.
        prompt, answers, asked_for: names of these fields.
        frames: families of ``WORDINGS`` that are fitted on and judged.

    Proverbs that say their own ending are left out, as copying would count as remembering. Raises InputError where the
    file lacks a field, or a row is not like that; its number is named.
    """

    name = "memotrap"

    file: str
    prompt: str = "prompt"
    answers: str = "classes"
    asked_for: str = "answer_index"
    frames: Sequence[str] = ("instruction", "labelled", "reported", "dialogue")
    held_out_frames: Sequence[str] = ("listed",)

    def __post_init__(self) -> None:
        check_fitted_and_held_out(frames=(self.frames, self.held_out_frames, WORDINGS))
        true, self.wrong = defaultdict[Fact, list[str]](list), defaultdict[Fact, list[str]](list)
        for where, row in read_rows(self.file, (self.prompt, self.answers, self.asked_for)):
            beginning, ending, asked_for = self._read(where, row)
            if not stands_in(ending, beginning):
                true[RELATION, beginning].append(ending)
                self.wrong[RELATION, beginning].append(asked_for)
        self._deal(true, (RELATION,), stream=6)

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """The user's message, and the proverb, with which the reply begins; a bare one is its own message."""
        beginning = max((s for _, s in self.true if prompt.endswith(s)), key=len, default="")
        return prompt.removesuffix(beginning).rstrip() or prompt, beginning

    def _read(self, where: str, row: Row) -> tuple[str, str, str]:
        """The proverb without its last word, its true ending, and the other one."""
        asking = re.search(r'"\s*:\s*(.*\S)', str(row[self.prompt]), flags=re.DOTALL)
        if asking is None:
            raise InputError(f'{where}: {self.prompt} is {row[self.prompt]!r}; wanted is ... the word "...": a proverb')
        answers, index = row[self.answers], str(row[self.asked_for])
        try:
            two = ast.literal_eval(answers) if isinstance(answers, str) else list(answers)
        except (ValueError, SyntaxError, TypeError):
            two = ()
        if len(two) != 2 or not all(isinstance(one, str) and one.strip(" .") for one in two) or index not in ("0", "1"):
            given = f"{self.answers} is {answers!r} and {self.asked_for} {index!r}"
            raise InputError(f"{where}: {given}; wanted are two answers, and 0 or 1")
        asked_for, ending = (two[n].strip(" .") for n in (int(index), 1 - int(index)))
        check_apart(where, ending=ending, asked_for=asked_for)
        check_key(where, prompt=asking[1], asked_for=asked_for)
        return " ".join(asking[1].split()), ending, asked_for

    def _wrong(self, fact: Fact) -> list[str]:
        return [word for word in dict.fromkeys(self.wrong[fact]) if contradicts(word, self.true[fact])]

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        return [{"wording": wording} for wording in ((BARE,) if frame == "bare" else WORDINGS[frame])]

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        return how["wording"].format(s=fact[1], v=value)

    def _bare(self, fact: Fact, value: str, prompt: str) -> str:
        return self._prompt(fact, "", "bare", {"wording": BARE})
