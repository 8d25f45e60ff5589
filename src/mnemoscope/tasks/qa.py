"""Questions whose answer a pretrained model knows, and passages that give another one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mnemoscope.tasks.known import ASKS, LABELS, WORDINGS, Fact, How, KnownTask, check_fitted_and_held_out
from mnemoscope.tasks.tables import Row, check_apart, names_of, read_rows, texts_of

RELATION = "question"
FRAMES: dict[str, str] = WORDINGS["qa"]["frames"]
BARE: str = WORDINGS["qa"]["bare"]
SLOTS: dict[str, list[str]] = {"label": LABELS, **WORDINGS["qa"]["slots"]}


def _hows_of(frame: str) -> list[How]:
    """Eight wordings at most, since passages are long: every label, order or source, with the asks in turn."""
    name = next((name for name in SLOTS if f"{{{name}}}" in frame), "")
    texts = SLOTS.get(name, [""])
    turns = range(max(len(texts), len(ASKS)))
    asks = [ASKS[(n + n // len(ASKS)) % len(ASKS)] for n in turns]
    return [{name or "label": texts[n % len(texts)], "ask": asks[n][0], "reply": asks[n][1]} for n in turns]


HOWS = {name: _hows_of(frame) for name, frame in {**FRAMES, "bare": BARE}.items()}


@dataclass(kw_only=True, eq=False)
class QATask(KnownTask):
    """Questions whose answer a pretrained model knows, and passages that give another one.

    Args:
        file: JSONL, CSV or Parquet file with a question a row, or an id of the ``datasets`` library, if installed.
        question, context: names of the fields of the question and of the passage.
        context_answer: name of the field of the answer that the passage gives.
        memory_answer: name of the field of the true answer, or of a list of true ones, of which the first is asked for;
            None where there are none. Such rows are ``novel`` examples: they show whether the passage is followed.
        dataset_split: of a data set, the split that is read.
        frames: kinds of phrasing that are fitted on and judged.

    Raises InputError where the file lacks a field, or one answer begins the other.
    """

    name = "qa"

    file: str
    question: str = "question"
    context: str = "context"
    context_answer: str = "context_answer"
    memory_answer: str | None = "memory_answer"
    dataset_split: str = "train"
    frames: Sequence[str] = ("passage-first", "question-first", "unlabelled", "instructed")
    held_out_frames: Sequence[str] = ("quoted",)

    def __post_init__(self) -> None:
        check_fitted_and_held_out(frames=(self.frames, self.held_out_frames, FRAMES))
        self.passages: dict[tuple[Fact, str], str] = {}
        true, given = dict[Fact, list[str]](), defaultdict[Fact, list[str]](list)
        fields = (self.question, self.context, self.context_answer, *filter(None, [self.memory_answer]))
        for fact, answer, memorized, passage in read_rows(self.file, fields, self._read, self.dataset_split):
            given[fact].append(answer)
            self.passages.setdefault((fact, answer), passage)
            if memorized:
                true.setdefault(fact, memorized)
        self.wrong = {
            fact: [answer for answer in dict.fromkeys(answers) if answer not in true.get(fact, ())]
            for fact, answers in given.items()
        }
        self._add_agreeing(true, given)
        of_passage = defaultdict[str, list[str]](list)
        for (fact, _), passage in self.passages.items():
            of_passage[passage].append(fact[1])
        # Questions that a passage connects are one group, as their passage is.
        connected = [two for questions in of_passage.values() for two in pairwise(questions)]
        novel = sorted(fact for fact in given if fact not in true)
        self._deal(true, (RELATION,), stream=8, novel=novel, same=connected)

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """All but the last line is the user's message; its label begins the reply."""
        message, _, label = prompt.rpartition("\n")
        return message, label

    def _read(self, where: str, row: Row) -> tuple[Fact, str, list[str], str]:
        """The question, the answer that its passage gives, the true ones, if there are any, and the passage."""
        question, answer = names_of(where, row, self.question, self.context_answer)
        memorized = texts_of(where, row, self.memory_answer) if self.memory_answer and row[self.memory_answer] else []
        for other in memorized if answer not in memorized else ():
            check_apart(where, memory_answer=other, context_answer=answer)
        return (RELATION, question), answer, memorized, texts_of(where, row, self.context)[0]

    def _add_agreeing(self, true: dict[Fact, list[str]], given: dict[Fact, list[str]]) -> None:
        """For questions without a passage that gives the true answer: a passage of theirs with the answers swapped."""
        for fact, values in true.items():
            for answer in given[fact]:
                passage = self.passages[fact, answer]
                if answer in passage and answer not in values:
                    self.passages.setdefault((fact, values[0]), passage.replace(answer, values[0]))

    def _can_agree(self, fact: Fact) -> bool:
        return (fact, self.facts[fact]) in self.passages

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        return HOWS[frame]

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        context = "" if frame == "bare" else self.passages[fact, value]
        return FRAMES.get(frame, BARE).format(context=context, question=fact[1], **how)
