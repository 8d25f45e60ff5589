"""The parts of the vLLM plugin that need no vLLM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mnemoscope as ms
from little_facts import VOCABULARY
from mnemoscope.config import ModelConfig
from mnemoscope.errors import InputError
from mnemoscope.models import build_gpt2, word_tokenizer
from mnemoscope.serving.asking import ADMITTED, Admitted, Asked, admit, key_of_block, parse
from mnemoscope.serving.offered import Offered
from mnemoscope.serving.rows import rows_of
from mnemoscope.steering import Binding
from served import random_run

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steer": "sideways"}, "steer: 'sideways' is not one of generalized, memorized"),
    ({"steer": ["generalized"]}, "steer: "),
    ({"steer": True}, "steer: True is not one of"),
    ({"steer": "generalized", "alpha": -1}, "alpha: -1 is not a finite number, 0 or more"),
    ({"steer": "generalized", "alpha": "1"}, "alpha: '1' is not"),
    ({"steer": "generalized", "alpha": math.nan}, "alpha: nan is not"),
    ({"steer": "generalized", "alpha": True}, "alpha: True is not"),
    ({"steer": "generalized", "gate": 1.5}, "gate: 1.5 is not a number in 0 .. 1"),
    ({"alpha": 2.0}, "alpha: 2.0 is given without steer"),
    ({"gate": 0.5, "read": True}, "gate: 0.5 is given without steer"),
    ({"read": "perhaps"}, "read: 'perhaps' is not one of true, false"),
    ({"stear": "generalized"}, "stear: is no setting; did you mean steer?"),
    ({"Steer": "generalized"}, "Steer: is no setting; did you mean steer?"),
    ({ADMITTED: {"key": None}}, f"{ADMITTED}: is set by the server alone"),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=str)
def test_what_is_asked_wrongly_is_refused_in_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(
        InputError, match=r"^" + told.replace("(", r"\(").replace("[", r"\[").replace("?", r"\?")
    ) as error:
        parse(given)
    assert "\n" not in str(error.value)


def test_what_is_asked_rightly_is_read() -> None:
    assert parse(None) is None
    assert parse({"session_id": "a", "kv_transfer_params": {}}) is None
    assert parse({"steer": "context", "alpha": 2, "gate": 0}) == Asked("generalized", 2.0, 0.0)
    assert parse({"steer": "memory", "read": 1}) == Asked("memorized", read=True)


def made(out: Path, positions: str = "decision") -> Offered:
    tokenizer = word_tokenizer(VOCABULARY, 128)
    model = build_gpt2(tokenizer, ModelConfig(layers=4, width=32, heads=2, context=128), 0).eval()
    run = random_run(out, model, tokenizer, 1, positions=positions)
    return Offered.open(run, Binding.of(model, tokenizer))


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Offered:
    return made(tmp_path_factory.mktemp("served"))


def test_another_model_is_refused_at_start(offered: Offered) -> None:
    other = Binding(offered.binding.model_type, "0" * 64, offered.binding.tokenizer, "0" * 64)
    with pytest.raises(InputError, match=r"^weights: the vector was made on"):
        Offered.open(offered.source, other)


def test_a_gate_above_the_shift_is_refused(offered: Offered) -> None:
    without = Offered(offered.source, offered.binding, offered.vectors, {"detector": offered.detectors["detector"]})
    with pytest.raises(InputError, match=r"^gate: the detector reads"):
        admit(Asked("generalized", gate=0.5), without, [1, 2, 3], 3)


def test_cached_blocks_are_kept_apart_from_the_first_shifted_position_on(offered: Offered) -> None:
    def key(asked: Asked, prompt: int, end: int) -> Any:
        return key_of_block({ADMITTED: admit(asked, offered, list(range(prompt)), prompt).facts()}, end)

    steered, other = Asked("generalized"), Asked("generalized", 1.5)
    assert key(steered, 38, 32) is None  # of the prompt before it: shared with everybody
    assert key(steered, 33, 32) is None
    assert key(steered, 32, 32) is not None  # position 31 is its last token
    assert key(steered, 38, 64) == key(steered, 38, 96) == key(steered, 38, 64)
    ways = [steered, other, Asked("memorized"), Asked("generalized", gate=0.5), Asked("generalized", gate=0.6)]
    assert len({key(way, 38, 64) for way in ways}) == len(ways)
    assert key(steered, 38, 64) != key(steered, 40, 64)  # the same tokens may begin to be shifted elsewhere
    assert key(Asked("generalized", 0.0), 38, 64) is None
    assert key(Asked(read=True), 38, 64) is None
    assert key_of_block(None, 64) is None


def test_what_is_admitted_survives_its_way_through_the_engine(offered: Offered) -> None:
    admitted = admit(Asked("memorized", 0.5, 0.3, True), offered, [1, 2, 3], 3)
    assert Admitted.of(admitted.facts()) == admitted
    assert (admitted.start, admitted.decision) == (2, 2)


def test_a_vector_of_all_positions_has_its_key_from_the_first_block_on(tmp_path: Path) -> None:
    offered = made(tmp_path, "all")
    admitted = admit(Asked("generalized"), offered, list(range(40)), 40)
    assert (admitted.start, admitted.decision) == (0, 39)
    assert key_of_block({ADMITTED: admitted.facts()}, 16) is not None
    with pytest.raises(InputError, match=r"^gate: this vector shifts every token"):
        admit(Asked("generalized", gate=0.5), offered, [1], 1)


def test_a_prompt_without_the_chat_template_is_refused(offered: Offered) -> None:
    vector = ms.SteeringVector("generalized", dict(offered.vectors["generalized"].shifts), opening=(7, 8))
    chatting = Offered(offered.source, offered.binding, {"generalized": vector}, {})
    admit(Asked("generalized"), chatting, [7, 8, 9], 3)
    with pytest.raises(InputError, match=r"^steer: the prompt is not formatted by the chat template"):
        admit(Asked("generalized"), chatting, [7, 9, 9], 3)


def test_rows_are_those_of_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 6))
        counts, computed = rng.integers(1, 9, size), rng.integers(0, 20, size)
        begins = np.r_[0, np.cumsum(counts)[:-1]]
        decisions = rng.integers(0, 30, size)
        starts = [None if rng.random() < 0.3 else int(rng.choice([0, end])) for end in decisions]
        found = rows_of(begins.tolist(), counts.tolist(), computed.tolist(), starts, decisions.tolist())
        wanted, decided = [], np.full(size, -1)
        for n in range(size):
            for token in range(counts[n]):
                position, start = computed[n] + token, starts[n]
                if start is not None and position >= start:
                    wanted.append((begins[n] + token, n))
                if position == decisions[n]:
                    decided[n] = begins[n] + token
        assert list(zip(found.shifted_R.tolist(), found.owner_R.tolist(), strict=True)) == wanted
        assert found.decision_N.tolist() == decided.tolist()
