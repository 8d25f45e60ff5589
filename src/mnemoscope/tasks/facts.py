"""Facts about countries: what a pretrained model knows by heart, and a context that says otherwise.

*"Context: The capital of France is Oslo. Question: What is the capital of France? Answer: The capital of France is"*:
"Paris" was remembered, "Oslo" was read. Facts come from the package ``countryinfo`` or from a table of the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.known import ASKS, LABELS, WORDINGS, Fact, How, KnownTask, check_fitted_and_held_out
from mnemoscope.tasks.tables import Row, names_of, read_rows

FRAMES: dict[str, str] = WORDINGS["facts"]["frames"]
BARE: str = WORDINGS["facts"]["bare"]
INVENTED: list[str] = WORDINGS["facts"]["invented"]  # countries that no model can know
LANGUAGES: dict[str, str] = WORDINGS["facts"]["languages"]  # by ISO 639-1
# By relation, how it is asked and stated: ``{n}`` is the subject and ``{v}`` its value.
RELATIONS: dict[str, dict[str, str]] = WORDINGS["facts"]["relations"]
UNLABELLED, LABELLED = (
    [{"label": label, "ask": ask, "reply": reply} for label, (ask, reply) in product(labels, ASKS)]
    for labels in ([""], LABELS)
)


@dataclass(kw_only=True, eq=False)
class FactsTask(KnownTask):
    """Facts about countries that a pretrained model knows, contradicted by what the prompt says.

    Args:
        relations: names of relations (capital, language, continent), or of the table's own, whose conflicts are fitted
            on and judged; default: capital, of a table all that it has and that are not held out.
        held_out_relations: others, whose conflicts are judged only.
        frames: kinds of phrasing that are fitted on and judged.
        wrong_values: other values that each fact is contradicted with; many make rare ones more common than they are.
        table: a CSV, JSONL or Parquet file with the columns relation, subject and value, instead of ``countryinfo``; a
            relation of a name that is not built in needs the columns question, stem, statement, inverted and reported
            too. Of several values of one subject the first is asked for, and none of them is a contradiction.

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
        self.words, true = _read_table(self.table) if self.table else (RELATIONS, _countries())
        stated = [name for name in self.words if any(name == relation for relation, _ in true)]
        others = [name for name in stated if name not in self.held_out_relations]
        asked = (others if self.table else ["capital"]) if self.relations is None else self.relations
        check_fitted_and_held_out(
            relations=(asked, self.held_out_relations, stated), frames=(self.frames, self.held_out_frames, FRAMES)
        )
        if self.wrong_values < 1:
            raise InputError(f"wrong_values: {self.wrong_values}; at least one is needed")
        of_all = (*asked, *self.held_out_relations)
        self._deal(true, asked, stream=5, novel=[*product(of_all, INVENTED)])
        asked_for = {fact: values for fact, values in true.items() if fact[0] in of_all}
        stated_of_novel = {fact: self._stated(fact) for fact in self.novel}
        self.wrong = self._dealt(asked_for, self.wrong_values) | stated_of_novel

    def split_reply(self, prompt: str) -> tuple[str, str]:
        """All but the last line is the user's message; the reply begins with the stem of that line."""
        message, _, last = prompt.rpartition("\n")
        return message, last.partition(" ")[2]

    def _stated(self, fact: Fact) -> list[str]:
        """What texts say of an invented country: values of others."""
        values = sorted(value for (relation, _), value in self.facts.items() if relation == fact[0])
        shuffled = (values[i] for i in self._drawn(*fact).permutation(len(values)))
        return list(dict.fromkeys(shuffled))[: self.wrong_values]

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        return LABELLED if "{label}" in FRAMES.get(frame, BARE) else UNLABELLED

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        words = {name: text.format(n=fact[1], v=value) for name, text in self.words[fact[0]].items()}
        return FRAMES.get(frame, BARE).format(**how, **words)


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


def _read_table(table: str) -> tuple[dict[str, dict[str, str]], dict[Fact, list[str]]]:
    """Relations and facts of a table; InputError names the row at fault."""
    relations, facts = dict(RELATIONS), dict[Fact, list[str]]()
    fields = ("relation", "subject", "value")

    def read(where: str, row: Row) -> None:
        name, subject, value = names_of(where, row, *fields)
        if name not in relations:
            relations[name] = {field: str(row.get(field) or "") for field in RELATIONS["capital"]}
            for field, text in relations[name].items():
                if not text:
                    raise InputError(f"{where}: relation {name!r} is new and needs {field}")
                try:
                    text.format(n="", v="")
                except (KeyError, IndexError, ValueError, AttributeError) as error:
                    raise InputError(f"{where}: {field} is {text!r}; only {{n}} and {{v}} may be in braces") from error
        facts.setdefault((name, subject), []).append(value)

    read_rows(table, fields, read, option="table")
    return relations, facts
