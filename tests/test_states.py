"""States: the one path that reads them, against plain transformers; what was kept is not read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import prompts, tiny, tokenizer
from helpers import hook_count, label, mini_examples
from mnemoscope.behaviour import Asking, KeptStates, capturing, encode, prepare, read_states, states_at_the_end
from mnemoscope.models import SITES, Site, blocks_of


def test_states_and_uncertainty_are_those_of_plain_transformers(mini: Callable[[str], Asking]) -> None:
    """One unpadded pass per prompt, by the library's own ``hidden_states``."""
    asking, examples, offsets = replace(mini("addition"), batch_size=7), mini_examples("addition", 30), (0, 1, 3)
    found = read_states(asking, examples, "block", offsets)
    assert found.states_ONLD.shape == (3, 30, len(blocks_of(asking.model)), 64)
    assert found.states_ONLD.dtype == np.float32
    final_norm = asking.model.base_model.ln_f
    for n, encoded in enumerate(encode(asking, examples)):
        with torch.no_grad():
            output = asking.model(torch.tensor([encoded.context]), output_hidden_states=True)
        for place, offset in enumerate(offsets):
            ours = torch.tensor(found.states_ONLD[place, n])
            theirs = torch.stack([h[0, -1 - offset] for h in output.hidden_states[1:]])
            torch.testing.assert_close(ours[:-1], theirs[:-1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(final_norm(ours[-1]), theirs[-1], atol=1e-4, rtol=1e-4)
        p = torch.softmax(output.logits[0, -1].double(), 0)
        gap = float(p.topk(2).values.log().diff().abs())
        assert found.uncertainty_N2[n] == pytest.approx([-float((p * p.log()).sum()), gap], abs=1e-3)


@pytest.mark.parametrize("site", SITES)
def test_what_follows_a_position_does_not_change_its_state(mini: Callable[[str], Asking], site: Site) -> None:
    """An earlier state is the state at the end of the prompt cut short; at offset 0 it is what labelling reads."""
    asking, examples = mini("addition"), mini_examples("addition", 40)
    before = hook_count(asking.model)
    found = read_states(asking, examples, site, [0, 1, 3])
    assert hook_count(asking.model) == before
    np.testing.assert_allclose(found.at_decision_NLD, label(asking, examples, capture=site).states_NLD, atol=1e-4)
    (batch,) = prepare(asking, examples)
    for place, offset in ((1, 1), (2, 3)):
        cut = states_at_the_end(asking.model, batch.ids_NT[:, :-offset], batch.mask_NT[:, :-offset], site)
        np.testing.assert_allclose(found.states_ONLD[place, batch.examples_N], cut, atol=1e-4)
    alone = read_states(asking, examples, site, [3])
    np.testing.assert_allclose(alone.states_ONLD[0], found.states_ONLD[2], atol=1e-4)
    assert np.isnan(alone.uncertainty_N2).all()


def test_a_reading_of_some_layers_does_not_run_the_blocks_above() -> None:
    model, words = tiny("llama"), tokenizer()
    inputs = words(prompts(), return_tensors="pt", padding=True)
    ran: list[int] = []
    for layer, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda module, args, layer=layer: ran.append(layer))
    whole_NLD = states_at_the_end(model, inputs.input_ids, inputs.attention_mask, "block")
    assert ran == [0, 1, 2]
    part_NLD = states_at_the_end(model, inputs.input_ids, inputs.attention_mask, "block", [1])
    assert ran[3:] == [0, 1]
    np.testing.assert_array_equal(part_NLD[:, 0], whole_NLD[:, 1])
    before = hook_count(model)
    with capturing(model, "neuron"):
        assert hook_count(model) > before
    with pytest.raises(RuntimeError, match="on purpose"), capturing(model, "neuron"):
        raise RuntimeError("on purpose")
    assert hook_count(model) == before


def test_what_was_kept_is_not_read_again_and_is_what_a_fresh_reading_gives(
    mini: Callable[[str], Asking], tmp_path: Path
) -> None:
    asking = mini("addition")
    examples = list({e.prompt: e for e in mini_examples("addition", 60)}.values())[:40]
    fresh = read_states(asking, examples, "block")
    lengths = [len(encoded.context) for encoded in encode(asking, examples)]
    order = np.random.default_rng(0).permutation(40)
    some = [examples[n] for n in order[:25]]
    read_states(asking, some, "block", kept=KeptStates(tmp_path))
    counts, kept = list[int](), KeptStates(tmp_path)  # as another process opens it
    count = asking.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    again = read_states(asking, some, "block", kept=kept)
    assert counts == []
    mixed = read_states(asking, examples, "block", kept=kept)
    assert sum(counts) == sum(lengths[n] for n in order[25:])
    read_states(asking, examples, "block", kept=kept)
    assert sum(counts) == sum(lengths[n] for n in order[25:])
    read_states(asking, some, "mlp", kept=kept)  # another site is another reading
    assert sum(counts) == sum(lengths)
    count.remove()
    for found, rows in ((again, order[:25]), (mixed, np.arange(40))):
        np.testing.assert_allclose(found.at_decision_NLD, fresh.at_decision_NLD[rows], atol=1e-4)
        np.testing.assert_allclose(found.uncertainty_N2, fresh.uncertainty_N2[rows], atol=1e-4)


def test_processes_keep_states_of_one_cell_at_a_time(tmp_path: Path) -> None:
    examples = list({e.prompt: e for e in mini_examples("addition", 12)}.values())[:6]
    states_NLD, uncertainty_N2 = np.random.default_rng(0).normal(size=(6, 2, 4)).astype(np.float32), np.zeros((6, 2))
    (tmp_path / ".block-0.12345.tmp.safetensors").write_bytes(b"half of a file")
    both = [KeptStates(tmp_path), KeptStates(tmp_path)]
    for kept, half in zip(both, (slice(0, 3), slice(3, 6)), strict=True):
        kept.add("block", examples[half], states_NLD[half], uncertainty_N2[half])
    for kept, known in ((both[0], range(3)), (both[1], range(3, 6)), (KeptStates(tmp_path), range(6))):
        found = kept.get("block", examples)
        assert list(found) == [*known]
        assert all(np.array_equal(state_LD, states_NLD[n]) for n, (state_LD, _) in found.items())


def test_answers_that_begin_alike_have_a_decision_position_of_their_own(
    mini: Callable[[str], Asking], tmp_path: Path
) -> None:
    asking, kept = mini("addition"), KeptStates(tmp_path)
    example = next(e for e in mini_examples("addition", 20) if e.kind == "conflict")
    alike = replace(example, memorized="12", generalized="13")
    both = [example, alike]
    first = read_states(asking, [example], "block", kept=kept).at_decision_NLD
    assert list(kept.get("block", both)) == [0]
    found = read_states(asking, both, "block", kept=kept).at_decision_NLD
    assert np.array_equal(found[0], first[0])
    np.testing.assert_allclose(found, read_states(asking, both, "block").at_decision_NLD, atol=1e-4)


def test_what_is_kept_is_bounded_and_the_rest_is_read_again(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    asking, examples = mini("addition"), list({e.prompt: e for e in mini_examples("addition", 60)}.values())
    fresh = read_states(asking, examples, "block").at_decision_NLD
    kept = KeptStates(tmp_path, most_bytes=8 * fresh[0].nbytes)
    for start in range(0, len(examples), 3):
        found = read_states(asking, examples[start : start + 3], "block", kept=kept).at_decision_NLD
        np.testing.assert_allclose(found, fresh[start : start + 3], atol=1e-4)
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= kept.most_bytes
    assert 0 < len(kept.get("block", examples)) < len(examples)
    np.testing.assert_allclose(read_states(asking, examples, "block", kept=kept).at_decision_NLD, fresh, atol=1e-4)
