"""Questions whose answer a pretrained model knows, and passages that give another one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mnemoscope.tasks.known import ASKS, LABELS, Fact, How, KnownTask, Spec, check_fitted_and_held_out, check_key
from mnemoscope.tasks.tables import Row, check_apart, read_rows, texts_of

RELATION = "question"
FRAMES = {
    "passage-first": "{label}{context}\n{ask} {question}\n{reply}",
    "question-first": "{ask} {question}\n{label}{context}\n{reply}",
    "unlabelled": "{context}\n\n{question}\n{reply}",
    "instructed": "{order}\n\n{context}\n\n{ask} {question}\n{reply}",
    "quoted": '{source} "{context}"\n{ask} {question}\n{reply}',
    "bare": "{ask} {question}\n{reply}",
}
SOURCES = ("From a book:", "From the web:", "Somebody wrote:", "The text says:")
ORDERS = (
    "Answer the question by the text.",
    "Read the text, then answer.",
    "The text may be wrong. Answer the question.",
    "Answer the question in a few words.",
)


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
        frames: names of ``FRAMES`` that are fitted on and judged.

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
        frames = [name for name in FRAMES if name != "bare"]
        check_fitted_and_held_out(frames=(self.frames, self.held_out_frames, frames))
        self.passages: dict[tuple[Fact, str], str] = {}
        true, self.given = dict[Fact, list[str]](), defaultdict[Fact, list[str]](list)
        fields = (self.question, self.context, self.context_answer, *filter(None, [self.memory_answer]))
        for where, row in read_rows(self.file, fields, self.dataset_split):
            fact, answer, memorized = self._read(where, row)
            self.given[fact].append(answer)
            self.passages.setdefault((fact, answer), texts_of(where, row, self.context)[0])
            if memorized:
                true.setdefault(fact, memorized)
        self._add_agreeing(true)
        novel = sorted({fact[1] for fact in self.given if fact not in true})
        self._deal(true, (RELATION,), stream=8, more=novel, same=self._about_one_passage())

    def _about_one_passage(self) -> list[tuple[str, str]]:
        """Questions that a passage connects with the one before it; they are one group, as their passage is."""
        of_passage = defaultdict[str, list[str]](list)
        for (fact, _), passage in self.passages.items():
            of_passage[passage].append(fact[1])
        return [two for questions in of_passage.values() for two in pairwise(questions)]

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """All but the last line is the user's message; its label begins the reply."""
        message, _, label = prompt.rpartition("\n")
        return message, label

    def _read(self, where: str, row: Row) -> tuple[Fact, str, list[str]]:
        """The question, the answer that its passage gives, and the true ones, if there are any."""
        question, answer = (texts_of(where, row, field)[0] for field in (self.question, self.context_answer))
        check_key(where, **{self.question: question, self.context_answer: answer})
        memorized = texts_of(where, row, self.memory_answer) if self.memory_answer and row[self.memory_answer] else []
        for other in memorized if answer not in memorized else ():
            check_apart(where, memory_answer=other, context_answer=answer)
        return (RELATION, question), answer, memorized

    def _add_agreeing(self, true: dict[Fact, list[str]]) -> None:
        """For questions without a passage that gives the true answer: a passage of theirs with the answers swapped."""
        for fact, values in true.items():
            for answer in self.given[fact]:
                passage = self.passages[fact, answer]
                if answer in passage and answer not in values:
                    self.passages.setdefault((fact, values[0]), passage.replace(answer, values[0]))

    def _wrong(self, fact: Fact) -> list[str]:
        return [answer for answer in dict.fromkeys(self.given[fact]) if answer not in self.true[fact]]

    def _agreeing(self, fact: Fact) -> bool:
        return (fact, self.facts[fact]) in self.passages

    def _novel(self) -> Iterator[Spec]:
        """Questions without a true answer."""
        for fact in (fact for fact in self.given if fact not in self.true):
            for answer in dict.fromkeys(self.given[fact]):
                for frame in self.frames:
                    yield fact, answer, frame, frame, self._hows(fact, frame)[0]

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        return HOWS[frame]

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        context = "" if frame == "bare" else self.passages[fact, value]
        return FRAMES[frame].format(context=context, question=fact[1], **how)

    def _bare(self, fact: Fact, value: str, prompt: str) -> str:
        how = next(how for how in HOWS["bare"] if prompt.endswith(f"\n{how['reply']}"))
        return self._prompt(fact, "", "bare", how)


def _hows_of(frame: str) -> list[How]:
    """Eight wordings at most, since passages are long: every label, order or source, with the asks in turn."""
    slots = {"label": LABELS, "order": ORDERS, "source": SOURCES}
    name = next((name for name in slots if f"{{{name}}}" in FRAMES[frame]), None)
    texts = slots[name] if name else ("",)
    turns = range(max(len(texts), len(ASKS)))
    asks = [ASKS[(n + n // len(ASKS)) % len(ASKS)] for n in turns]
    return [{name or "label": texts[n % len(texts)], "ask": asks[n][0], "reply": asks[n][1]} for n in turns]


HOWS = {frame: _hows_of(frame) for frame in FRAMES}
