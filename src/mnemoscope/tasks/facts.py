"""Facts about countries: what a pretrained model knows by heart, and a context that says otherwise.

*"Context: The capital of France is Oslo. Question: What is the capital of France? Answer: The capital of France is"*:
"Paris" was remembered, "Oslo" was read. Facts come from the package ``countryinfo`` or from a table of the user's own.
"""

from __future__ import annotations

import copy
import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import INSTRUCTIONS, Example, Kind, Task, assign_splits

Fact = tuple[str, str]  # a relation and its subject
How = tuple[str, tuple[str, str]]  # the label before the statement; the labels of question and answer

# Templates of prompts. The two prompts of a pair share a frame and differ in labels.
FRAMES = {
    "context-first": "{label}{statement}\n{ask} {question}\n{reply} {stem}",
    "context-last": "{ask} {question}\n{label}{statement}\n{reply} {stem}",
    "unlabelled": "{statement} {ask} {question}\n{reply} {stem}",
    "inverted": "{label}{inverted}\n{ask} {question}\n{reply} {stem}",
    "reported": "{label}{reported}\n{ask} {question}\n{reply} {stem}",
}
# These flip three times as many answers as six neutral labels (docs/LOG.md).
LABELS = ("Context: ", "Paragraph: ", "Story: ", "Note: ", "Hint: ", "Rumour: ", "Memo: ", "Wikipedia: ")
ASKS = (("Question:", "Answer:"), ("Q:", "A:"), ("Task:", "Result:"), ("Quiz:", "Reply:"))
PLAIN: How = (LABELS[0], ASKS[0])
TEMPLATES = {**FRAMES, "bare": "{ask} {question}\n{reply} {stem}"}
# Countries that no model can know.
INVENTED = (
    "Velmora", "Tarquenia", "Ostravia", "Belcandia", "Morvania", "Lusandra", "Quoristan", "Peltoria", "Zembria",
    "Calduria", "Norvessa", "Trisolia", "Hespania", "Umbravia", "Kelduria", "Farandole", "Wistovia", "Galdoria",
    "Serantia", "Ilmoria", "Dravenia", "Ostermark", "Pirandia", "Yurelia", "Bantavia", "Corvalia", "Elduria",
    "Fenmark", "Grelovia", "Jastoria", "Lomavia", "Ruvania",
)  # fmt: skip


# By relation, how it is asked and stated: ``{n}`` is the subject and ``{v}`` its value.
WORDS = ("question", "stem", "statement", "inverted", "reported")
RELATIONS = {
    name: dict(zip(WORDS, words, strict=True))
    for name, *words in (
        ("capital", "What is the capital of {n}?", "The capital of {n} is", "The capital of {n} is {v}.",
         "{v} is the capital of {n}.", "In {n}, the capital city is {v}."),
        ("language", "What is the official language of {n}?", "The official language of {n} is",
         "The official language of {n} is {v}.", "{v} is the official language of {n}.",
         "In {n}, the official language is {v}."),
        ("continent", "On which continent is {n}?", "{n} is a country in", "{n} is a country in {v}.",
         "{v} is where the country {n} is.", "On the map, the country {n} is in {v}."),
    )
}  # fmt: skip
# The most spoken of the official languages, by ISO 639-1.
LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian",
    "mk": "Macedonian", "mn": "Mongolian", "ms": "Malay", "my": "Burmese", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovene", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "th": "Thai", "tk": "Turkmen", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class FactsTask(Task):
    """Facts about countries that a pretrained model knows, contradicted by what the prompt says.

    Args:
        relations: names of ``RELATIONS``, or of the table's own, whose conflicts are fitted on and judged; default:
            capital, of a table all that it has and that are not held out.
        held_out_relations: others, whose conflicts are judged only.
        frames: names of ``FRAMES`` that are fitted on and judged.
        held_out_frames: others, judged only.
        wrong_values: other values that each fact is contradicted with.
        table: a CSV file with the columns relation, subject and value, instead of ``countryinfo``; a relation of a
            name that is not built in needs the columns question, stem, statement, inverted and reported too. Of
            several values of one subject the first is asked for, and none of them is a contradiction.
        seed: deals subjects to the splits and draws the wrong values.

    Raises InputError where a name is unknown, the table lacks a column or a fact, or ``countryinfo`` is not installed.
    """

    name = "facts"
    # What commonly ends a short answer; "" is the end-of-text token.
    boundary = ("", "\n", ".", ",")
    begins_reply = True
    instructions = INSTRUCTIONS

    relations: Sequence[str] | None = None
    held_out_relations: Sequence[str] = ()
    frames: Sequence[str] = ("context-first", "unlabelled", "reported")
    held_out_frames: Sequence[str] = ("context-last", "inverted")
    wrong_values: int = 6
    table: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # All values that do not contradict a fact are known, such as a country's other languages.
        self.words, self.true = _read_table(Path(self.table)) if self.table else (RELATIONS, _countries())
        self.facts = {fact: values[0] for fact, values in self.true.items()}
        stated = [name for name in self.words if any(name == relation for relation, _ in self.facts)]
        others = [name for name in stated if name not in self.held_out_relations]
        self.asked = tuple((others if self.table else ["capital"]) if self.relations is None else self.relations)
        for option, allowed in zip(("relations", "frames"), (stated, FRAMES), strict=True):
            fitted, held_out = getattr(self, option) or (), getattr(self, f"held_out_{option}")
            for field, names in ((option, fitted), (f"held_out_{option}", held_out)):
                for name in names:
                    if name not in allowed:
                        raise InputError(f"{field}: {name!r} is not one of {', '.join(allowed)}")
        if set(self.asked) & set(self.held_out_relations) or set(self.frames) & set(self.held_out_frames):
            raise InputError("held_out_relations, held_out_frames: what is held out cannot be fitted on as well")
        if not self.asked or not self.frames or self.wrong_values < 1:
            raise InputError("relations, frames, wrong_values: at least one of each is needed")
        all_asked = (*self.asked, *self.held_out_relations)
        subjects = sorted({subject for relation, subject in self.facts if relation in all_asked})
        self.split_of = assign_splits([*subjects, *INVENTED], np.random.default_rng([self.seed, 5]))
        # Unknown facts count too, so that contradictions do not depend on the model.
        self.values = {name: sorted({v for (r, _), v in self.facts.items() if r == name}) for name in self.words}

    def held_out(self) -> dict[str, Task]:
        """This task with the held-out ``frame`` or ``relation`` and the same splits."""
        parts = {"frame": {"frames": self.held_out_frames}, "relation": {"asked": self.held_out_relations}}
        return {name: self._with(**changes) for name, changes in parts.items() if all(changes.values())}

    def facts_to_know(self) -> list[Example]:
        """Every fact as a bare question."""
        return [
            self._example("memory", fact, value, "bare", how=("", ASKS[0]))
            for fact, value in self.facts.items()
            if fact[0] in (*self.asked, *self.held_out_relations)
        ]

    def knowing(self, items: set[str]) -> FactsTask:
        """The same task restricted to known facts; raises InputError where none is known."""
        kept = {fact: value for fact, value in self.facts.items() if "|".join(fact) in items}
        if not kept:
            raise InputError("model: it knows none of the task's facts by heart, so nothing can be contradicted")
        return self._with(facts=kept)

    def _with(self, **changes: Any) -> FactsTask:
        other = copy.copy(self)
        other.__dict__ |= changes
        other.__dict__.pop("_everything", None)
        return other

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """At most ``n``, as evenly by country as possible.

        ``memory``: bare questions, and contexts that agree; ``novel``: invented countries.
        """
        of_kind = self._everything[kind]
        rounds: dict[str, Iterator[int]] = defaultdict(count)
        shuffled = (of_kind[i] for i in rng.permutation(len(of_kind)))
        return sorted(shuffled, key=lambda example: next(rounds[example.group]))[:n]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Other labels of statement and question, in the same frame."""
        relation, subject, wrong, frame = example.item.split("|")
        others = [e for e in self._conflicts((relation, subject), wrong, frame) if e.prompt != example.prompt]
        return others[rng.integers(len(others))]

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """All but the last line is the user's message; the reply begins with the stem of that line."""
        message, _, last = prompt.rpartition("\n")
        return message, last.partition(" ")[2]

    def without_context(self, example: Example) -> Example:
        """The same question without the context."""
        relation, subject, *_ = example.item.split("|")
        how = next(how for how in ASKS if f"{how[0]} " in example.prompt)
        return replace(example, prompt=self._prompt((relation, subject), "", "bare", ("", how)))

    @cached_property
    def _everything(self) -> Mapping[Kind, list[Example]]:
        """Every example of the task, by kind."""
        found: dict[Kind, list[Example]] = {"conflict": [], "memory": [], "novel": []}
        for fact, value in self.facts.items():
            if fact[0] in self.asked:
                contradicted = product(self._wrong(fact, value), self.frames)
                found["conflict"] += [e for wrong, frame in contradicted for e in self._conflicts(fact, wrong, frame)]
                found["memory"] += [self._example("memory", fact, value, "bare", how=("", ask)) for ask in ASKS]
                found["memory"] += [self._example("memory", fact, value, "agreeing", frame) for frame in self.frames]
        for fact in product(self.asked, INVENTED):
            stated = product(self._wrong(fact, ""), self.frames)
            found["novel"] += [self._example("novel", fact, value, frame) for value, frame in stated]
        return found

    def _wrong(self, fact: Fact, value: str) -> list[str]:
        """Values of other subjects, drawn with a seed of the fact's own."""
        true = {one for one in (value, *self.true.get(fact, ())) if one}
        others = [v for v in self.values[fact[0]] if not any(v.startswith(one) or one.startswith(v) for one in true)]
        rng = np.random.default_rng([self.seed, *"|".join(fact).encode()])
        return [others[i] for i in rng.permutation(len(others))[: self.wrong_values]]

    def _conflicts(self, fact: Fact, wrong: str, frame: str) -> list[Example]:
        """All phrasings of a conflict in a frame."""
        labels = LABELS if "{label}" in FRAMES[frame] else ("",)
        return [self._example("conflict", fact, wrong, frame, how=how) for how in product(labels, ASKS)]

    def _example(
        self, kind: Kind, fact: Fact, value: str, family: str, frame: str | None = None, how: How = PLAIN
    ) -> Example:
        """An example whose prompt states ``value`` in a frame, by default that of its family."""
        item = "|".join(fact if family == "bare" else (*fact, value, family))
        prompt, subject = self._prompt(fact, value, frame or family, how), fact[1]
        answers = {"answer": f" {value}"}
        if kind == "conflict":
            answers = {"memorized": f" {self.facts[fact]}", "generalized": f" {value}"}
        return Example(item, prompt, kind, subject, family, self.split_of[subject], **answers)

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        label, (ask, reply) = how
        words = {name: text.format(n=fact[1], v=value) for name, text in self.words[fact[0]].items()}
        return TEMPLATES[frame].format(label=label, ask=ask, reply=reply, **words)


def _countries() -> dict[Fact, list[str]]:
    """Facts of the package ``countryinfo``, by relation and country; the first value is asked for."""
    try:
        from countryinfo import all_countries
    except ImportError as error:
        raise InputError("task: 'facts' needs countryinfo: pip install 'mnemoscope[pretrained]'") from error
    facts: dict[Fact, list[str]] = {}
    for country in all_countries():
        name, spoken = country.name(), country.languages() or []
        values = {
            "capital": country.capital(),
            "language": LANGUAGES.get(spoken[0]) if spoken else None,
            # The two Americas are one region there, which nobody would answer with.
            "continent": country.region() if country.region() != "Americas" else None,
        }
        for relation, value in values.items():
            # Several capitals come as a list; what the question itself says (Mexico City) needs no memory.
            if isinstance(value, str) and value and value not in name and name not in value:
                facts[relation, name] = [value]
        if ("language", name) in facts:
            facts["language", name] += [LANGUAGES[code] for code in spoken[1:] if code in LANGUAGES]
    return facts


def _read_table(path: Path) -> tuple[dict[str, dict[str, str]], dict[Fact, list[str]]]:
    """Relations and facts of a CSV file; InputError names the line at fault."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"table: {path} cannot be read ({error})") from error
    relations, facts = dict(RELATIONS), dict[Fact, list[str]]()
    for number, row in enumerate(rows, 2):
        where = f"table: {path}, line {number}"
        for column in ("relation", "subject", "value"):
            if not row.get(column):
                raise InputError(f"{where}: {column} is missing")
            if "|" in row[column]:
                raise InputError(f"{where}: {column} is {row[column]!r}; | is not allowed in it")
        name = row["relation"]
        if name not in relations:
            relations[name] = {field: row.get(field) or "" for field in WORDS}
            for field, text in relations[name].items():
                if not text:
                    raise InputError(f"{where}: relation {name!r} is new and needs {field}")
                try:
                    text.format(n="", v="")
                except (KeyError, IndexError, ValueError, AttributeError) as error:
                    raise InputError(f"{where}: {field} is {text!r}; only {{n}} and {{v}} may be in braces") from error
        facts.setdefault((name, row["subject"]), []).append(row["value"])
    if not facts:
        raise InputError(f"table: {path} holds no fact")
    return relations, facts
