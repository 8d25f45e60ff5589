"""The base of tasks on what a pretrained model knows by heart, and prompts that say otherwise.

Every such task is facts x frames x wordings. What a model knows of the facts is asked first (``facts_to_know``).
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from importlib import resources
from itertools import count, product
from typing import Any, Self

import numpy as np

from mnemoscope.runs.errors import InputError, check_one_of
from mnemoscope.runs.yaml import parse_yaml
from mnemoscope.tasks.base import INSTRUCTIONS, KINDS, Example, Kind, Split, Task, assign_splits

Fact = tuple[str, str]  # a relation and its subject
How = Mapping[str, str]  # one wording: what a frame is filled with besides the fact
Spec = tuple[Fact, str, str, str, How]  # an example before it is written: fact, value, family, frame, wording

WORDINGS: Mapping[str, Any] = parse_yaml((resources.files(__package__) / "wordings.yaml").read_text(), "wordings")
LABELS, ASKS = WORDINGS["labels"], WORDINGS["asks"]
WORDS = re.compile(r"\w+")
ALIKE = 0.7  # share of the words of the shorter of two subjects that the other has as well, to be one item
ROUNDS, TRIES = 10, 20  # of a value that does not fit: how often it is exchanged, with how many others at a time


@dataclass(kw_only=True, eq=False)
class KnownTask(Task):
    """Facts that a model knows, contradicted by what the prompt says, in several wordings of each frame.

    A subclass reads facts, calls ``_deal``, sets ``wrong``, and words prompts (``_hows``, ``_prompt``).

    Args:
        frames: kinds of phrasing that are fitted on and judged.
        held_out_frames: others, judged only.
        boundary: texts of which one closes every answer, each a token; by default an answer ends with its last word.
        shares: how much of the groups fit, tune and test get.
        seed: deals groups to the splits and draws the contradictions.

    Attributes:
        true: every fact's values, of which the first is asked for and none is a contradiction.
        facts: the value that is asked for; only known facts after ``knowing``.
        wrong: what texts say of each fact: its contradictions, and of a novel one anything.
        novel: what no model can know, as facts without a value.
        asked, held_out_relations: relations whose conflicts are made, and others, judged only.
        split_of: the split of each group.
        group_of: the group of each subject: that of the subjects that say the same (``grouped``).
    """

    begins_reply = documents = True
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
        novel: Sequence[Fact] = (),
        same: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Set what every such task has; ``stream`` seeds the splits, ``same`` are pairs of subjects of one group."""
        if len(self.shares) != 3 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise InputError(f"shares: {self.shares!r}; allowed are three numbers above 0 that add up to 1")
        self.boundary = None if self.boundary is None else tuple(self.boundary)
        self.true, self.asked, self.novel = true, tuple(asked), novel
        self.facts = {fact: values[0] for fact, values in true.items()}
        self.group_of = grouped(true, [subject for _, subject in novel], same)
        of_all = (*self.asked, *self.held_out_relations)
        groups = sorted({self._group(fact) for fact in self.facts if fact[0] in of_all})
        groups += [group for group in dict.fromkeys(map(self._group, novel)) if group not in groups]
        self.split_of: dict[str, Split] = assign_splits(groups, np.random.default_rng([self.seed, stream]), self.shares)

    def _hows(self, fact: Fact, frame: str) -> Sequence[How]:
        """The wordings of a fact in a frame, or of the ``bare`` question; the plainest first."""
        raise NotImplementedError

    def _prompt(self, fact: Fact, value: str, frame: str, how: How) -> str:
        """The prompt that states ``value``, or the ``bare`` question, which does not."""
        raise NotImplementedError

    def _bare(self, fact: Fact, prompt: str) -> str:
        """The bare question of the same wording as a prompt: it ends in the same line."""
        bares = [self._prompt(fact, "", "bare", how) for how in self._hows(fact, "bare")]
        return next(bare for bare in bares if prompt.endswith(bare[max(bare.rfind("\n"), 0) :]))

    def _can_agree(self, fact: Fact) -> bool:
        """Whether a frame can state the true value of a fact."""
        return True

    def _group(self, fact: Fact) -> str:
        return self.group_of.get(fact[1], fact[1])

    def _split(self, fact: Fact) -> Split:
        return self.split_of[self._group(fact)]

    def _drawn(self, *name: str) -> np.random.Generator:
        """A generator of its own for what has this name."""
        return np.random.default_rng([self.seed, *"|".join(name).encode()])

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
        """At most ``n``, as evenly by group as possible; ``memory``: bare questions, and contexts that agree.

        The order is that of hashes, so that one fact more that a model knows leaves the order of all others as it was.
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
        relation, subject, *_ = example.item.split("|")
        return replace(example, prompt=self._bare((relation, subject), example.prompt))

    @cached_property
    def _everything(self) -> Mapping[Kind, list[Spec]]:
        """Every example of the task, by kind."""
        found: dict[Kind, list[Spec]] = {kind: [] for kind in KINDS}
        for fact, value in self.facts.items():
            if fact[0] not in self.asked:
                continue
            for wrong, frame in product(self.wrong[fact], self.frames):
                found["conflict"] += [(fact, wrong, frame, frame, how) for how in self._hows(fact, frame)]
            found["memory"] += [(fact, value, "bare", "bare", how) for how in self._hows(fact, "bare")]
            for frame in self.frames if self._can_agree(fact) else ():
                # A wording of conflicts, drawn for each fact, so that none is a sign that a text agrees.
                hows = self._hows(fact, frame)
                drawn = int(self._drawn("agreeing", frame, *fact).integers(len(hows)))
                found["memory"].append((fact, value, "agreeing", frame, hows[drawn]))
        for fact in (fact for fact in self.novel if fact[0] in self.asked):
            for said, frame in product(self.wrong[fact], self.frames):
                found["novel"].append((fact, said, frame, frame, self._hows(fact, frame)[0]))
        return found

    def _example(self, kind: Kind, fact: Fact, value: str, family: str, frame: str, how: How) -> Example:
        """An example whose prompt states ``value`` in a frame."""
        item = "|".join(fact if family == "bare" else (*fact, value, family))
        prompt, group = self._prompt(fact, value, frame, how), self._group(fact)
        answers = {"answer": f" {value}"}
        if kind == "conflict":
            answers = {"memorized": f" {self.facts[fact]}", "generalized": f" {value}"}
        return Example(item, prompt, kind, group, family, self._split(fact), **answers)

    def _dealt(self, true: Mapping[Fact, Sequence[str]], most: int) -> dict[Fact, list[str]]:
        """At most ``most`` contradictions of each fact: values of its relation in its split, known or not."""
        parts = defaultdict[tuple[str, Split], list[Fact]](list)
        for fact in sorted(true):
            parts[fact[0], self._split(fact)].append(fact)
        found: dict[Fact, list[str]] = {fact: [] for fact in true}
        for name, facts in parts.items():
            rng = self._drawn(*name)
            for _ in range(most):
                dealt(found, facts, true, rng)
        return found


def _hashed(spec: Spec, salt: bytes) -> bytes:
    fact, value, family, frame, how = spec
    return blake2b("|".join((*fact, value, family, frame, *how.values())).encode(), key=salt).digest()


def dealt(
    found: dict[Fact, list[str]], facts: Sequence[Fact], true: Mapping[Fact, Sequence[str]], rng: np.random.Generator
) -> None:
    """Add one contradiction to each fact in ``found``: the true values in a random order, exchanged where one is none.

    So a value contradicts as often as it is true; else a common value would be the sign of memory. What more than half
    of the subjects have cannot be dealt to all others, and those that get nothing have no contradiction.
    """

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


def grouped(
    true: Mapping[Fact, Sequence[str]], more: Iterable[str] = (), same: Iterable[tuple[str, str]] = ()
) -> dict[str, str]:
    """Of subjects that say the same ("Finland", "Grand Duchy of Finland"), the first, by subject.

    They share a fact, and nearly all words of the shorter of two. ``more``: subjects without facts; ``same``: pairs
    that are one whatever they share.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    subjects = sorted({*(subject for _, subject in true), *more})
    number = {subject: n for n, subject in enumerate(subjects)}
    words = [set(WORDS.findall(subject.casefold())) for subject in subjects]
    of_value, of_word = defaultdict[Fact, dict[int, None]](dict), defaultdict[str, int](count().__next__)
    for (relation, subject), values in true.items():
        for value in values:
            of_value[relation, value.casefold()][number[subject]] = None

    def matrix(two: np.ndarray, columns: int) -> Any:
        return csr_array((np.ones(two.shape[1]), tuple(two)), shape=(len(subjects), columns))

    places = np.array([(n, of_word[word]) for n, of in enumerate(words) for word in of], int).reshape(-1, 2).T
    has, size_S = matrix(places, len(of_word)), np.array([len(of) for of in words])
    links = [np.array([(number[a], number[b]) for a, b in same], int).reshape(-1, 2).T]
    for chosen in (np.array(list(found)) for found in of_value.values()):
        shared = (has[chosen] @ has[chosen].T).tocoo()
        two = np.stack([chosen[side] for side in shared.coords])
        links.append(two[:, shared.data >= ALIKE * size_S[two].min(0)])
    parts = connected_components(matrix(np.concatenate(links, axis=1), len(subjects)), directed=False)[1]
    first: dict[int, str] = {}
    return {subject: first.setdefault(int(part), subject) for subject, part in zip(subjects, parts, strict=True)}


def check_fitted_and_held_out(**names: tuple[Sequence[str], Sequence[str], Collection[str]]) -> None:
    """Raises InputError where of an option's (fitted, held-out, allowed) names one is not allowed, or is both."""
    for option, (fitted, held_out, allowed) in names.items():
        for which, given in ((option, fitted), (f"held_out_{option}", held_out)):
            for name in given:
                check_one_of(which, name, allowed)
        if set(fitted) & set(held_out):
            raise InputError(f"held_out_{option}: what is held out cannot be fitted on as well")
        if not fitted:
            raise InputError(f"{option}: at least one is needed")
