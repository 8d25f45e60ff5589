"""In-context inference: statements tie names to colours, the question asks one name's colour.

A *memorized* name has one colour in all of training (with two hops, wherever it is asked), so context and memory agree
there. In a conflict the context states another colour: the trained colour reveals memory, the stated one reveals
reading. The colour of a *free* name is drawn for every instance, so it follows from the context alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mnemoscope.paper.stored import CHUNK
from mnemoscope.tasks.base import Example, Instance, Kind, Task, assign_splits, check_range, is_held_out

# fmt: off
COLOURS = [
    "red", "blue", "green", "yellow", "black", "white", "brown", "orange", "purple", "pink",
    "gray", "gold", "silver", "beige", "teal", "navy", "olive", "coral", "ivory", "maroon",
]
SPECIES = [
    "swan", "lion", "frog", "rhino", "wolf", "otter", "heron", "lynx", "mole", "crow", "seal", "hare", "toad", "bear",
    "moth", "newt",
]
# fmt: on
QUESTION = "what color is {} ?"


def invented_names(n: int) -> list[str]:
    """``n`` different two-syllable names (at most 4,900), the same ones at every call."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    # 1,009 is prime to 4,900: consecutive names differ in both syllables.
    indices = [(i * 1009 + 71) % 4900 for i in range(n)]
    return [(syllables[i // 70] + syllables[i % 70]).capitalize() for i in indices]


@dataclass(kw_only=True, eq=False)
class InferenceTask(Task):
    """The paper's in-context inference with one hop ("Bako is red .") or two ("Bako is a swan . Timu is a swan . ...").

    Args:
        memorized_names: names with one colour in all of training; they are the groups of conflicts.
        free_names: names whose colour is drawn anew each time.
        statements: one hop: statements in a context; two hops: chains of three statements.
        hops: 1 or 2.
        absent_share: share of training instances with one question more, about a memorized name that is not stated.
        memorized_share: share of memorized names among the stated and among the asked. It sets the balance: every
            statement about a memorized name teaches memory, whether or not it is asked about.
        questions: questions in a training instance, each about another name of its context. Examples ask one.
        seed: decides names, colours and splits; not the order of training.
    """

    name = "inference"
    dials = MappingProxyType({"memorized_share": 1})
    boundary = (".", " .")  # a tokenizer that keeps spaces has a token of its own for the second

    memorized_names: int = 200
    free_names: int = 100
    statements: int = 4
    hops: int = 1
    questions: int = 4
    absent_share: float = 0.0
    memorized_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(1, 2, hops=self.hops)
        check_range(8, 4892, memorized_names=self.memorized_names)
        check_range(8, 4900 - self.memorized_names, free_names=self.free_names)
        check_range(2, 8, statements=self.statements)
        check_range(1, self.statements, questions=self.questions)
        check_range(0, 1, memorized_share=self.memorized_share, absent_share=self.absent_share)
        rng = np.random.default_rng([self.seed, 1])
        names = np.array(invented_names(self.memorized_names + self.free_names))
        self.names = names[rng.permutation(len(names))]
        self.colour_of = rng.integers(len(COLOURS), size=self.memorized_names)
        # Each split has its share of memorized and of free names.
        self.split_of = assign_splits(self.names[: self.memorized_names].tolist(), rng)
        self.split_of |= assign_splits(self.names[self.memorized_names :].tolist(), rng)
        self.vocabulary = ["what", "color", "is", "a", "?", ".", *COLOURS, *SPECIES, *sorted(self.names.tolist())]

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Instances in which the context agrees with every memorized colour; held-out items never appear."""
        while True:
            asked = rng.random(CHUNK) < self.memorized_share
            for names, colours, state in self._contexts(rng, asked):
                if any(is_held_out(self._key(name, state), self.seed) for name in names[: self.questions]):
                    continue
                order = rng.permutation(len(state))
                questions = [self._answered(names[i], colours[i]) for i in rng.permutation(self.questions)]
                absent = int(rng.integers(self.memorized_names))
                if rng.random() < self.absent_share and absent not in names:
                    place = int(rng.integers(len(questions) + 1))
                    questions.insert(place, self._answered(absent, self.colour_of[absent]))
                yield " . ".join([*(state[i] for i in order), *questions]) + " ."

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """``conflict``: the context states another colour. ``memory``: none of the name. ``novel``: a free name.

        No conflict or memory example can be in training; novel ones are held out by item.
        """
        found: list[Example] = []
        while len(found) < n:
            for names, colours, state in self._contexts(rng, np.full(CHUNK, kind != "novel"), kind):
                if kind != "novel" or is_held_out(self._key(names[0], state), self.seed):
                    found.append(self._example(kind, names[0], colours[0], state, rng))
        return found[:n]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """The same statements in another order, drawn uniformly from all the others."""
        *statements, question = example.prompt.split(" . ")
        shuffled = order = np.arange(len(statements))
        while (shuffled == order).all():
            shuffled = rng.permutation(len(statements))
        return example.phrased(" . ".join([*(statements[i] for i in shuffled), question]), "reordered")

    def prompted(self, example: Example, toward: str) -> Example | None:
        """For the context: the statement about the asked name repeated last. For memory: no such prompt."""
        if toward != "generalized":
            return None
        *statements, question = example.prompt.split(" . ")
        stated = [statement for statement in statements if statement.split()[0] == question.split()[-2]]
        return example.phrased(" . ".join([*statements, *stated, question]), "repeated")

    def _example(self, kind: Kind, name: int, colour: int, state: list[str], rng: np.random.Generator) -> Example:
        word = str(self.names[name])
        prompt = " . ".join([*(state[i] for i in rng.permutation(len(state))), QUESTION.format(word)])
        family, answers = "absent" if kind == "memory" else "stated", {"answer": f" {COLOURS[colour]}"}
        if kind == "conflict":
            answers = {"memorized": f" {COLOURS[self.colour_of[name]]}", "generalized": f" {COLOURS[colour]}"}
        return Example(self._key(name, state), prompt, kind, word, family, self.split_of[word], **answers)

    def _contexts(
        self, rng: np.random.Generator, ask_memorized: np.ndarray, kind: Kind | None = None
    ) -> Iterator[tuple[list[int], list[int], list[str]]]:
        """Names (the asked one first), their colours, and the statements, for a chunk of instances.

        A ``conflict`` states another colour for the asked name, ``memory`` leaves its statement out.
        """
        n, total = len(ask_memorized), len(self.names)
        people = self.statements if self.hops == 1 else 2 * self.statements
        is_memorized = rng.random((n, people + 1)) < self.memorized_share
        is_memorized[:, 0] = ask_memorized  # the first of a training context is as any other
        names = np.where(
            is_memorized,
            rng.integers(self.memorized_names, size=is_memorized.shape),
            rng.integers(self.memorized_names, total, size=is_memorized.shape),
        )
        colours = rng.integers(len(COLOURS), size=names.shape)
        fixed = names < self.memorized_names
        colours[fixed] = self.colour_of[names[fixed]]
        if kind == "conflict":
            colours[:, 0] = (colours[:, 0] + rng.integers(1, len(COLOURS), size=n)) % len(COLOURS)
        species = np.argsort(rng.random((n, len(SPECIES))), axis=1)
        for row in range(n):
            who, what = names[row].tolist(), colours[row].tolist()
            if len(set(who)) < len(who):
                continue
            if kind == "conflict" and self.colour_of[who[0]] in what[1:]:
                continue  # the memorized colour must come from memory, not from a neighbour in the context
            stated = slice(1, people + 1) if kind == "memory" else slice(0, people)
            if self.hops == 1:
                state = [f"{self.names[w]} is {COLOURS[c]}" for w, c in zip(who[stated], what[stated], strict=True)]
            else:
                state = self._chains(who[stated], what[stated], species[row])
            yield who, what, state

    def _chains(self, who: list[int], what: list[int], species: np.ndarray) -> list[str]:
        """Two hops: ``who[i]`` shares a species with a neighbour whose colour is stated; it is ``what[i]``."""
        state = []
        for i in range(self.statements):
            name, neighbour, kin = self.names[who[i]], self.names[who[self.statements + i]], SPECIES[species[i]]
            state += [f"{name} is a {kin}", f"{neighbour} is a {kin}", f"{neighbour} is {COLOURS[what[i]]}"]
        return state

    def _answered(self, name: int, colour: int) -> str:
        return f"{QUESTION.format(self.names[name])} {COLOURS[colour]}"

    def _key(self, name: int, state: list[str]) -> str:
        return f"{self.names[name]}: {'; '.join(sorted(state))}"
