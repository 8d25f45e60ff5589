"""Facts about countries: what a pretrained model knows by heart, and a context that says otherwise.

*"Context: The capital of France is Oslo. Question: What is the capital of France? Answer: The capital of France is"*:
"Paris" was remembered, "Oslo" was read. Facts come from the package ``countryinfo`` or from a table of the user's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.known import (
    ASKS,
    LABELS,
    Fact,
    How,
    KnownTask,
    Spec,
    check_fitted_and_held_out,
    check_key,
    dealt,
)
from mnemoscope.tasks.tables import csv_rows

# Templates of prompts. The two prompts of a pair share a frame and differ in labels.
FRAMES = {
    "context-first": "{label}{statement}\n{ask} {question}\n{reply} {stem}",
    "context-last": "{ask} {question}\n{label}{statement}\n{reply} {stem}",
    "unlabelled": "{statement} {ask} {question}\n{reply} {stem}",
    "inverted": "{label}{inverted}\n{ask} {question}\n{reply} {stem}",
    "reported": "{label}{reported}\n{ask} {question}\n{reply} {stem}",
}
UNLABELLED, LABELLED = (
    [{"label": label, "ask": ask, "reply": reply} for label, (ask, reply) in product(labels, ASKS)]
    for labels in (("",), LABELS)
)
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
class FactsTask(KnownTask):
    """Facts about countries that a pretrained model knows, contradicted by what the prompt says.

    Args:
        relations: names of ``RELATIONS``, or of the table's own, whose conflicts are fitted on and judged; default:
            capital, of a table all that it has and that are not held out.
        held_out_relations: others, whose conflicts are judged only.
        frames: names of ``FRAMES`` that are fitted on and judged.
        wrong_values: other values that each fact is contradicted with; many make rare ones more common than they are.
        table: a CSV file with the columns relation, subject and value, instead of ``countryinfo``; a relation of a
            name that is not built in needs the columns question, stem, statement, inverted and reported too. Of
            several values of one subject the first is asked for, and none of them is a contradiction.

    Raises InputError where a name is unknown, the table lacks a column or a fact, or ``countryinfo`` is not installed.
    """

    name = "facts"

    relations: Sequence[str] | None = None
    held_out_relations: Sequence[str] = ()
    frames: Sequence[str] = ("context-first", "unlabelled", "reported")
    held_out_frames: Sequence[str] = ("context-last", "inverted")
    wrong_values: int = 2
    table: str | None = None

    def __post_init__(self) -> None:
        # All values that do not contradict a fact are known, such as a country's other languages.
        self.words, true = _read_table(Path(self.table)) if self.table else (RELATIONS, _countries())
        stated = [name for name in self.words if any(name == relation for relation, _ in true)]
        others = [name for name in stated if name not in self.held_out_relations]
        asked = (others if self.table else ["capital"]) if self.relations is None else self.relations
        check_fitted_and_held_out(
            relations=(asked, self.held_out_relations, stated), frames=(self.frames, self.held_out_frames, FRAMES)
        )
        if self.wrong_values < 1:
            raise InputError(f"wrong_values: {self.wrong_values}; at least one is needed")
        self._deal(true, asked, stream=5, more=INVENTED)
        of_all = (*asked, *self.held_out_relations)
        asked_for = {fact: values for fact, values in true.items() if fact[0] in of_all}
        invented = product(of_all, INVENTED)
        self.wrong = dealt(asked_for, self.wrong_values, self.seed, self._split) | {
            fact: self._stated(fact) for fact in invented
        }

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """All but the last line is the user's message; the reply begins with the stem of that line."""
        message, _, last = prompt.rpartition("\n")
        return message, last.partition(" ")[2]

    def _bare(self, fact: Fact, value: str, prompt: str) -> str:
        how = next(how for how in self._hows(fact, "bare") if f"{how['ask']} " in prompt)
        return self._prompt(fact, "", "bare", how)

    def _novel(self) -> Iterator[Spec]:
        """Invented countries."""
        for fact in product(self.asked, INVENTED):
            for value, frame in product(self._wrong(fact), self.frames):
                yield fact, value, frame, frame, self._hows(fact, frame)[0]

    def _stated(self, fact: Fact) -> list[str]:
        """What texts say of an invented country: values of others."""
        values = sorted(value for (relation, _), value in self.facts.items() if relation == fact[0])
        rng = np.random.default_rng([self.seed, *"|".join(fact).encode()])
        return list(dict.fromkeys(values[i] for i in rng.permutation(len(values))))[: self.wrong_values]

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        return LABELLED if "{label}" in TEMPLATES[frame] else UNLABELLED

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        words = {name: text.format(n=fact[1], v=value) for name, text in self.words[fact[0]].items()}
        return TEMPLATES[frame].format(**how, **words)


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
    rows = csv_rows(path, "table")
    relations, facts = dict(RELATIONS), dict[Fact, list[str]]()
    for number, row in enumerate(rows, 2):
        where = f"table: {path}, line {number}"
        check_key(where, **{column: row.get(column) or "" for column in ("relation", "subject", "value")})
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
