"""The base of tasks on what a pretrained model knows by heart, and prompts that say otherwise.

Every such task is known facts x frames x wordings. What the model knows is asked first (``facts_to_know``), so that the
memorized answer of a conflict is in its memory.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import count, product
from typing import Any, Self

import numpy as np

from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.base import INSTRUCTIONS, KINDS, Example, Kind, Split, Task, assign_splits, checked_boundary

Fact = tuple[str, str]  # a relation and its subject
How = Mapping[str, str]  # one wording: what a frame is filled with besides the fact
Spec = tuple[Fact, str, str, str, How]  # an example before it is written: fact, value, family, frame, wording

# Labels of a statement that flip three times as many answers as six neutral ones (docs/LOG.md).
LABELS = ("Context: ", "Paragraph: ", "Story: ", "Note: ", "Hint: ", "Rumour: ", "Memo: ", "Wikipedia: ")
# Labels of question and answer.
ASKS = (("Question:", "Answer:"), ("Q:", "A:"), ("Task:", "Result:"), ("Quiz:", "Reply:"))
WORDS = re.compile(r"\w+")
ALIKE = 0.7  # share of the words of the shorter of two subjects that the other has as well, to be one item
ROUNDS, TRIES = 10, 20  # of a value that does not fit: how often it is exchanged, with how many others at a time


@dataclass(kw_only=True, eq=False)
class KnownTask(Task):
    """Facts that a model knows, contradicted by what the prompt says, in several wordings of each frame.

    A subclass sets ``true`` and ``asked`` before it calls ``_deal``, and writes prompts.

    Args:
        frames: kinds of phrasing that are fitted on and judged.
        held_out_frames: others, judged only.
        boundary: texts of which one closes every answer, each a token; by default an answer ends with its last word.
        shares: how much of the groups fit, tune and test get.
        seed: deals groups to the splits and draws the contradictions.

    Attributes:
        true: every fact's values, of which the first is asked for and none is a contradiction.
        facts: the value that is asked for; only known facts after ``knowing``.
        asked, held_out_relations: relations whose conflicts are made, and others, judged only.
        split_of: the split of each group.
        group_of: the group of each subject: that of the subjects that say the same (``grouped``).
        wrong: the contradictions of each fact, where a subclass sets them (``dealt``).
    """

    begins_reply = True
    instructions = INSTRUCTIONS

    held_out_relations: Sequence[str] = field(default=(), init=False)
    frames: Sequence[str] = ()
    held_out_frames: Sequence[str] = ()
    boundary: tuple[str, ...] | None = None
    shares: Sequence[float] = (0.5, 0.25, 0.25)
    seed: int = 0
    wrong: Mapping[Fact, Sequence[str]] = field(default_factory=dict, init=False, repr=False)

    def _deal(
        self,
        true: Mapping[Fact, Sequence[str]],
        asked: Sequence[str],
        stream: int,
        more: Collection[str] = (),
        same: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Set what every such task has.

        ``stream`` seeds the splits; ``more`` are subjects without facts, ``same`` pairs of them that are one group.
        """
        self.boundary = checked_boundary(self.boundary)
        if len(self.shares) != 3 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise InputError(f"shares: {self.shares!r}; allowed are three numbers above 0 that add up to 1")
        self.true, self.asked = true, tuple(asked)
        self.facts = {fact: values[0] for fact, values in true.items()}
        self.group_of = grouped(true, more, same)
        of_all = (*self.asked, *self.held_out_relations)
        groups = sorted({self._group(fact) for fact in self.facts if fact[0] in of_all})
        rng = np.random.default_rng([self.seed, stream])
        groups += [group for group in dict.fromkeys(self.group_of[one] for one in more) if group not in groups]
        self.split_of: dict[str, Split] = assign_splits(groups, rng, self.shares)

    def _split(self, fact: Fact) -> Split:
        return self.split_of[self._group(fact)]

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        """The wordings of a fact in a frame, or of the ``bare`` question; the plainest first."""
        raise NotImplementedError

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        """The prompt that states ``value``, or the ``bare`` question, which does not."""
        raise NotImplementedError

    def _bare(self, fact: Fact, value: str, prompt: str) -> str:
        """The bare question of the same wording as a prompt that states ``value``."""
        raise NotImplementedError

    def _wrong(self, fact: Fact) -> Sequence[str]:
        """Values that contradict a fact; by default those dealt to it."""
        return self.wrong[fact]

    def _agreeing(self, fact: Fact) -> bool:
        """Whether a frame can state the true value of a fact."""
        return True

    def _novel(self) -> Iterable[Spec]:
        """What no model can know; nothing by default."""
        return ()

    def _group(self, fact: Fact) -> str:
        return self.group_of.get(fact[1], fact[1])

    def _agreeing_how(self, fact: Fact, frame: str) -> How:
        """One of the wordings of conflicts, drawn for each fact, so that no wording is a sign that a text agrees."""
        hows = self._hows(fact, frame)
        rng = np.random.default_rng([self.seed, *f"agreeing|{frame}|{'|'.join(fact)}".encode()])
        return hows[int(rng.integers(len(hows)))]

    def held_out(self) -> dict[str, Task]:
        """This task with the held-out ``frame`` or ``relation`` and the same splits."""
        parts = {"frame": {"frames": self.held_out_frames}, "relation": {"asked": self.held_out_relations}}
        return {name: self._with(**changes) for name, changes in parts.items() if all(changes.values())}

    def facts_to_know(self) -> list[Example]:
        """Every fact as a bare question."""
        return [
            self._example("memory", fact, value, "bare", "bare", self._hows(fact, "bare")[0])
            for fact, value in self.facts.items()
            if fact[0] in (*self.asked, *self.held_out_relations)
        ]

    def knowing(self, items: set[str]) -> Self:
        """The same task restricted to known facts; raises InputError where none is known."""
        kept = {fact: value for fact, value in self.facts.items() if "|".join(fact) in items}
        if not kept:
            raise InputError("model: it knows none of the task's facts by heart, so nothing can be contradicted")
        return self._with(facts=kept)

    def _with(self, **changes: Any) -> Self:
        other = copy.copy(self)
        other.__dict__ |= changes
        other.__dict__.pop("_everything", None)
        return other

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """At most ``n``, as evenly by group as possible.

        ``memory``: bare questions, and contexts that agree; ``novel``: what no model can know. The order is that of
        hashes, so that one fact more or less that the model knows leaves the order of all others as it was.
        """
        salt, rounds = rng.bytes(16), defaultdict[str, Iterator[int]](count)
        shuffled = sorted(self._everything[kind], key=lambda spec: _hashed(spec, salt))
        chosen = sorted(shuffled, key=lambda spec: next(rounds[self._group(spec[0])]))[:n]
        return [self._example(kind, *spec) for spec in chosen]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another wording of the same fact and contradiction, in the same frame."""
        relation, subject, wrong, frame = example.item.split("|")
        fact = relation, subject
        phrased = [self._example("conflict", fact, wrong, frame, frame, how) for how in self._hows(fact, frame)]
        others = [other for other in phrased if other.prompt != example.prompt]
        return others[rng.integers(len(others))]

    def without_context(self, example: Example) -> Example:
        """The same question without the context."""
        relation, subject, *stated = example.item.split("|")
        return replace(example, prompt=self._bare((relation, subject), "".join(stated[:1]), example.prompt))

    @cached_property
    def _everything(self) -> Mapping[Kind, list[Spec]]:
        """Every example of the task, by kind."""
        found: dict[Kind, list[Spec]] = {kind: [] for kind in KINDS}
        for fact, value in self.facts.items():
            if fact[0] not in self.asked:
                continue
            for wrong, frame in product(self._wrong(fact), self.frames):
                found["conflict"] += [(fact, wrong, frame, frame, how) for how in self._hows(fact, frame)]
            found["memory"] += [(fact, value, "bare", "bare", how) for how in self._hows(fact, "bare")]
            if self._agreeing(fact):
                found["memory"] += [
                    (fact, value, "agreeing", frame, self._agreeing_how(fact, frame)) for frame in self.frames
                ]
        found["novel"] += self._novel()
        return found

    def _example(self, kind: Kind, fact: Fact, value: str, family: str, frame: str, how: How) -> Example:
        """An example whose prompt states ``value`` in a frame."""
        item = "|".join(fact if family == "bare" else (*fact, value, family))
        prompt, group = self._prompt(fact, value, frame, how), self._group(fact)
        answers = {"answer": f" {value}"}
        if kind == "conflict":
            answers = {"memorized": f" {self.facts[fact]}", "generalized": f" {value}"}
        return Example(item, prompt, kind, group, family, self._split(fact), **answers)


def _hashed(spec: Spec, salt: bytes) -> bytes:
    fact, value, family, frame, how = spec
    return blake2b("|".join((*fact, value, family, frame, *how.values())).encode(), key=salt).digest()


def dealt(
    true: Mapping[Fact, Sequence[str]], most: int, seed: int, split_of: Callable[[Fact], Split]
) -> dict[Fact, list[str]]:
    """At most ``most`` contradictions of each fact: the values of a relation in a split, dealt anew among its subjects.

    So a value contradicts as often as it is true, which a draw among different values would not give: there a common
    value would be the sign of memory, whatever the model does. What more than half of the subjects have cannot be dealt
    to all others, and those that get nothing have no contradiction. Facts that the model does not know count too, so
    that contradictions do not depend on it.
    """
    found: dict[Fact, list[str]] = {fact: [] for fact in true}
    parts = defaultdict[tuple[str, Split], list[Fact]](list)
    for fact in sorted(true):
        parts[fact[0], split_of(fact)].append(fact)
    for (relation, split), facts in parts.items():
        rng = np.random.default_rng([seed, *f"{relation}|{split}".encode()])
        for _ in range(most):
            _deal_once(found, facts, true, rng)
    return found


def _deal_once(
    found: dict[Fact, list[str]], facts: Sequence[Fact], true: Mapping[Fact, Sequence[str]], rng: np.random.Generator
) -> None:
    """Add one value to each fact where that is possible: a random order, in which what does not fit is exchanged."""

    def fits(place: int, value: str) -> bool:
        fact = facts[place]
        return value not in found[fact] and contradicts(value, true[fact])

    given = [true[facts[i]][0] for i in rng.permutation(len(facts))]
    for place in [i for i, value in enumerate(given) if not fits(i, value)] * ROUNDS:
        mine = given[place]
        if fits(place, mine):  # by an exchange since
            continue
        for other in rng.integers(len(facts), size=TRIES).tolist():
            theirs = given[other]
            if fits(place, theirs) and (fits(other, mine) or not fits(other, theirs)):
                given[place], given[other] = theirs, mine
                break
    kept = [(fact, value) for place, (fact, value) in enumerate(zip(facts, given, strict=True)) if fits(place, value)]
    for fact, value in kept:
        found[fact].append(value)


def contradicts(value: str, true: Sequence[str]) -> bool:
    """Whether a value is none of the true ones, and neither begins the other, in whatever case."""
    mine = value.casefold()
    return not any(mine.startswith(one) or one.startswith(mine) for one in map(str.casefold, true) if one)


def stands_in(value: str, text: str) -> bool:
    """Whether a value is said in a text as whole words, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, flags=re.IGNORECASE) is not None


def grouped(
    true: Mapping[Fact, Sequence[str]], more: Collection[str] = (), same: Iterable[tuple[str, str]] = ()
) -> dict[str, str]:
    """Of subjects that say the same, the first: they share a fact, and nearly all words of the shorter of two.

    So that nothing is fitted on and judged under two names, as "Finland" and "Grand Duchy of Finland" are. ``more`` are
    subjects without facts, ``same`` pairs that are one whatever they share.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    of_value = defaultdict[tuple[str, str], dict[int, None]](dict)
    subjects = sorted({*(subject for _, subject in true), *more})
    number = {subject: n for n, subject in enumerate(subjects)}
    for (relation, subject), values in true.items():
        for value in values:
            of_value[relation, value.casefold()][number[subject]] = None
    words = [set(WORDS.findall(subject.casefold())) for subject in subjects]
    column = {word: n for n, word in enumerate(sorted(set[str]().union(*words)))}
    places = np.array([(n, column[word]) for n, of in enumerate(words) for word in of], int).reshape(-1, 2).T
    has = csr_array((np.ones(places.shape[1]), tuple(places)), shape=(len(subjects), len(column)))
    count_S, links = (
        np.array([len(of) for of in words]),
        [np.array([(number[a], number[b]) for a, b in same], int).reshape(-1, 2).T],
    )
    for chosen in (np.array(list(found)) for found in of_value.values()):
        shared = (has[chosen] @ has[chosen].T).tocoo()
        two = np.stack([chosen[side] for side in shared.coords])
        links.append(two[:, shared.data >= ALIKE * count_S[two].min(0)])
    linked = np.concatenate(links, axis=1)
    graph = csr_array((np.ones(linked.shape[1]), tuple(linked)), shape=(len(subjects), len(subjects)))
    first: dict[int, str] = {}
    parts = connected_components(graph, directed=False)[1]
    return {subject: first.setdefault(int(part), subject) for subject, part in zip(subjects, parts, strict=True)}


def check_fitted_and_held_out(**names: tuple[Sequence[str], Sequence[str], Iterable[str]]) -> None:
    """Raises InputError where a name is unknown, or both fitted and held out.

    Each option has its fitted names, held-out names, and all that are allowed.
    """
    for option, (fitted, held_out, allowed) in names.items():
        for which, given in ((option, fitted), (f"held_out_{option}", held_out)):
            for name in given:
                if name not in allowed:
                    raise InputError(f"{which}: {name!r} is not one of {', '.join(allowed)}")
    options = ", ".join(f"held_out_{option}" for option in names)
    if any(set(fitted) & set(held_out) for fitted, held_out, _ in names.values()):
        raise InputError(f"{options}: what is held out cannot be fitted on as well")
    if not all(fitted for fitted, _, _ in names.values()):
        raise InputError(f"{', '.join(names)}: at least one of each is needed")


def check_key(where: str, **texts: str) -> None:
    """Raises InputError where a text that names an item is empty or has the sign that separates the parts of a name."""
    for name, text in texts.items():
        if not text:
            raise InputError(f"{where}: {name} is missing")
        if "|" in text:
            raise InputError(f"{where}: {name} is {text!r}; | is not allowed in it")
