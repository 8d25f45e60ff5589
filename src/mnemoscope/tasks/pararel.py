"""Facts of several relations, each said in several ways, from a folder as ParaRel has it (Elazar et al. 2021)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.base import check_range
from mnemoscope.tasks.known import LABELS, WORDINGS, Fact, How, KnownTask, check_fitted_and_held_out
from mnemoscope.tasks.tables import Row, names_of, read_rows, texts_of

FRAMES: dict[str, str] = WORDINGS["pararel"]["frames"]
SLOTS: dict[str, list[str]] = {"label": LABELS, **WORDINGS["pararel"]["slots"]}


@dataclass(kw_only=True, eq=False)
class PararelTask(KnownTask):
    """Facts that a pretrained model knows, contradicted by a statement that says them in another way.

    Args:
        folder: has ``facts/RELATION.jsonl`` (fields ``subject``, ``value``) and ``patterns/RELATION.jsonl`` (field
            ``pattern``: text with [X] for the subject and [Y] for the value). All patterns state; those without a comma
            that end in [Y] also ask.
        subject, value, pattern: names of these fields.
        relations: names of files whose conflicts are fitted on and judged; default: all but the held-out ones.
        held_out_relations: others, judged only; default: the last of the folder, where it has several.
        frames: kinds of phrasing that are fitted on and judged.
        facts_each: most facts of each relation, drawn from the file; each is asked bare.
        wrong_values: values of other subjects that each fact is contradicted with.
        phrasings: wordings of each fact in a frame, drawn from all that the patterns give.
        shots: other facts with other values, said before a bare question as it is asked: they show that a place is
            wanted, not a year. They are no facts of the task.

    Facts whose value stands in the subject are left out. Raises InputError where a file, field or name is missing, or a
    relation has no pattern that asks.
    """

    name = "pararel"

    folder: str
    subject: str = "sub_label"
    value: str = "obj_label"
    pattern: str = "pattern"
    relations: Sequence[str] | None = None
    held_out_relations: Sequence[str] | None = None  # type: ignore[assignment]
    frames: Sequence[str] = ("context-first", "unlabelled", "reported", "doubted")
    held_out_frames: Sequence[str] = ("context-last", "quoted")
    facts_each: int = 400
    wrong_values: int = 2
    phrasings: int = 8
    shots: int = 2

    def __post_init__(self) -> None:
        check_range(1, 10**6, facts_each=self.facts_each, wrong_values=self.wrong_values)
        check_range(2, 1000, phrasings=self.phrasings)
        check_range(0, 8, shots=self.shots)
        there = sorted(path.stem for path in Path(self.folder).glob("facts/*.jsonl"))
        if not there:
            raise InputError(f"folder: {self.folder} has no facts/RELATION.jsonl")
        if self.held_out_relations is None:
            last = there[-1:] if len(there) > 1 else []
            self.held_out_relations = [name for name in last if name not in (self.relations or ())]
        given = [name for name in there if name not in self.held_out_relations]
        asked = given if self.relations is None else self.relations
        check_fitted_and_held_out(
            relations=(asked, self.held_out_relations, there), frames=(self.frames, self.held_out_frames, FRAMES)
        )
        self.patterns: dict[str, dict[str, list[str]]] = {}
        self.shown: dict[str, dict[Fact, list[str]]] = {}
        true: dict[Fact, list[str]] = {}
        for relation in (*asked, *self.held_out_relations):
            self.patterns[relation] = self._read_patterns(relation)
            read = self._read_facts(relation)
            self.shown[relation] = self._draw_shots(relation, read)
            left = [fact for fact in read if fact not in self.shown[relation]]
            drawn = self._drawn("facts", relation).permutation(len(left))[: self.facts_each]
            true |= {left[n]: read[left[n]] for n in sorted(drawn)}
        self._deal(true, asked, stream=7)
        self.wrong = self._dealt(true, self.wrong_values)
        self._wordings: dict[tuple[Fact, str], list[How]] = {}

    def _read_patterns(self, relation: str) -> dict[str, list[str]]:
        """The patterns of a relation as statements, with a full stop, and as stems, which a value completes."""
        path, found = f"{self.folder}/patterns/{relation}.jsonl", []

        def read(where: str, row: Row) -> None:
            text = texts_of(where, row, self.pattern)[0].removesuffix(".").rstrip()
            if text.count("[X]") != 1 or text.count("[Y]") != 1:
                raise InputError(f"{where}: {self.pattern} is {text!r}; wanted is a text with one [X] and one [Y]")
            if " a [Y]" not in text and " an [Y]" not in text:  # no article fits both answers
                found.append(text)

        read_rows(path, (self.pattern,), read)
        stems = [text.removesuffix("[Y]").rstrip() for text in found if text.endswith("[Y]") and "," not in text]
        if not stems:
            raise InputError(f"file: {path} has no pattern without a comma that ends in [Y], so none can ask")
        return {"statement": [f"{text}." for text in found], "stem": stems}

    def _read_facts(self, relation: str) -> dict[Fact, list[str]]:
        found = defaultdict[Fact, list[str]](list)
        path, fields = f"{self.folder}/facts/{relation}.jsonl", (self.subject, self.value)
        for subject, value in read_rows(path, fields, lambda where, row: names_of(where, row, *fields)):
            found[relation, subject].append(value)
        return {
            fact: list(dict.fromkeys(values))
            for fact, values in found.items()
            if not any(value.lower() in fact[1].lower() for value in values)
        }

    def _draw_shots(self, relation: str, facts: dict[Fact, list[str]]) -> dict[Fact, list[str]]:
        """Of different values: those to show, and as many more as a fact has answers, so that none sees its own."""
        of_value = {values[0]: fact for fact, values in sorted(facts.items()) if len(values) == 1}
        drawn = self._drawn(relation).permutation(sorted(of_value)).tolist()[: self.shots + 1 + self.wrong_values]
        return {of_value[value]: [value] for value in drawn}

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """All but the last line is the user's message, and the reply begins with that; a bare stem is both."""
        message, _, last = prompt.rpartition("\n")
        label = next((label for label in SLOTS["reply"] + SLOTS["truth"] if last.startswith(f"{label} ")), "")
        return message or prompt, last.removeprefix(label).lstrip()

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        patterns = self.patterns[fact[0]]
        if frame == "bare":
            return [{"stem": stem} for stem in patterns["stem"]]
        if (fact, frame) not in self._wordings:
            choices = {name: texts for name, texts in (SLOTS | patterns).items() if f"{{{name}}}" in FRAMES[frame]}
            every = list(product(*choices.values()))
            drawn = self._drawn(frame, *fact).permutation(len(every))[: self.phrasings]
            self._wordings[fact, frame] = [dict(zip(choices, every[n], strict=True)) for n in drawn]
        return self._wordings[fact, frame]

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        said = FRAMES.get(frame, "{stem}").format(**how).replace("[X]", fact[1]).replace("[Y]", value)
        if frame != "bare":
            return said
        answers = (value, *self.true[fact], *self.wrong[fact])  # the same are shown whatever a text says
        others = (other for other in self.shown[fact[0]].items() if other[1][0] not in answers)
        shown = ((how["stem"].replace("[X]", other[1]), values[0]) for other, values in islice(others, self.shots))
        return "".join(f"{stem} {value}. " for stem, value in shown) + said

    def _bare(self, fact: Fact, prompt: str) -> str:
        stem = max((s for s in self.patterns[fact[0]]["stem"] if prompt.endswith(s.replace("[X]", fact[1]))), key=len)
        return self._prompt(fact, "", "bare", {"stem": stem})
