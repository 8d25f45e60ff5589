"""The one type of a behaviour to steer to: it is its name in every file, and takes the words of a user."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.toward import Toward


@pytest.mark.parametrize("toward", list(Toward))
def test_it_is_its_name_in_files_and_tables(toward: Toward) -> None:
    name, other = str(toward), toward.opposite
    assert (toward, hash(toward), repr(toward), json.dumps({toward: toward})) == (
        name, hash(name), repr(name), json.dumps({name: name})
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(toward)) is toward
    assert (other.opposite, other.sign, {toward, other}) == (toward, -toward.sign, {"generalized", "memorized"})
    assert toward.direction == f"to_{name}"


WORDS = {"generalized": Toward.GENERALIZED, "memorized": Toward.MEMORIZED, "context": Toward.GENERALIZED}
WORDS |= {"memory": Toward.MEMORIZED, "to_generalized": Toward.GENERALIZED, "to_memorized": Toward.MEMORIZED}


@pytest.mark.parametrize(("word", "meant"), WORDS.items())
def test_users_may_say_it_in_their_words(word: str, meant: Toward) -> None:
    for said in (word, word.upper(), word.title()):
        assert Toward.of(said) is Toward(said) is TypeAdapter(Toward).validate_json(json.dumps(said)) is meant


@pytest.mark.parametrize(
    ("said", "near"), [("contxt", "context"), ("Memorised", "memorized"), ("both", None), (1, None), (None, None)]
)
def test_another_word_is_refused_with_the_nearest(said: object, near: str | None) -> None:
    with pytest.raises(InputError) as error:
        Toward.of(said)
    line = f"toward: {said!r} is not one of generalized, memorized; of documents: context, memory"
    assert str(error.value) == line + (f"; did you mean {near}?" if near else "")


def test_it_is_known_without_the_large_libraries() -> None:
    code = "import sys, mnemoscope.runs.toward; print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
