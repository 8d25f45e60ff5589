"""Proverbs that a pretrained model knows, and prompts that ask for another last word (MemoTrap, Liu and Liu 2023)."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.known import WORDINGS, Fact, How, KnownTask, check_fitted_and_held_out, contradicts
from mnemoscope.tasks.tables import Row, check_apart, names_of, read_rows

RELATION = "proverb"
FAMILIES: dict[str, list[str]] = WORDINGS["memotrap"]  # wordings, with {s} for the proverb and {v} for another ending


@dataclass(kw_only=True, eq=False)
class MemotrapTask(KnownTask):
    """Proverbs that a pretrained model knows, and prompts that ask for another last word.

    The memorized answer is the true ending, the generalized one the word that the prompt asks for.

    Args:
        file: a CSV, JSONL or Parquet file with a prompt (``Write a quote that ends in the word "heavy": Absence makes
            the heart grow``), two answers, and which of them the prompt asks for.
        prompt, answers, asked_for: names of these fields.
        frames: families of wordings that are fitted on and judged.

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
        check_fitted_and_held_out(frames=(self.frames, self.held_out_frames, FAMILIES))
        true, said = defaultdict[Fact, list[str]](list), defaultdict[Fact, list[str]](list)
        fields = (self.prompt, self.answers, self.asked_for)
        for beginning, ending, asked_for in read_rows(self.file, fields, self._read):
            if not re.search(rf"(?<!\w){re.escape(ending)}(?!\w)", beginning, flags=re.IGNORECASE):
                true[RELATION, beginning].append(ending)
                said[RELATION, beginning].append(asked_for)
        self.wrong = {fact: [w for w in dict.fromkeys(said[fact]) if contradicts(w, true[fact])] for fact in true}
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
        names_of(where, {"prompt": asking[1], "asked_for": asked_for}, "prompt", "asked_for")
        return " ".join(asking[1].split()), ending, asked_for

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        return [{"wording": wording} for wording in (FAMILIES[frame] if frame != "bare" else ["{s}"])]

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        return how["wording"].format(s=fact[1], v=value)
