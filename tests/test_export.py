"""Vectors in other programs and on a model hub act as they do in ours; what would not is refused and leaves nothing."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from families import FAMILIES, complete, prompts, tiny, tokenizer
from mnemoscope.interventions import Card, SteeringVector
from mnemoscope.models import Site, layout_of, load_model, pass_inputs, use_layout
from mnemoscope.runs.errors import InputError
from mnemoscope.serving import export
from mnemoscope.serving.export import bake, fetch, push
from mnemoscope.serving.llama_cpp import to_gguf
from test_cli import call as run

NO_BIAS, NORM = "no option of its configuration gives it one", "has a norm"
REFUSED = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "phi3", "stablelm", "cohere", "nanochat"), NO_BIAS),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), NORM),
}
BAKED = [family for family in FAMILIES if family not in REFUSED]


def some_vector(site: Site = "block", layers: tuple[int, ...] = (0, 2), **facts: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    shifts = {layer: 0.5 * torch.randn(32, generator=generator) for layer in layers}
    return replace(SteeringVector("generalized", shifts, site=site, positions="all"), **facts)


def padded(words: PreTrainedTokenizerFast) -> Any:
    return words(prompts(), return_tensors="pt", padding=True)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """At every real token of a padded batch, (M, V)."""
    batch = tokenizer()(prompts(), return_tensors="pt", padding=True)
    found = model(**pass_inputs(model, batch.input_ids, batch.attention_mask)).logits
    return found[batch.attention_mask.bool()]


@pytest.mark.parametrize(
    ("family", "site"), [*((family, "block") for family in BAKED), ("gpt2", "mlp"), ("llama", "mlp")]
)
def test_a_baked_folder_opened_by_the_library_alone_answers_as_the_steered_model(
    family: str, site: Site, tmp_path: Path
) -> None:
    model, vector = tiny(family), 4 * some_vector(site)
    plain = logits(model)
    with vector.apply(model):
        steered, said = logits(model), complete(model, tokenizer(), padded(tokenizer()), 8)
    assert said != complete(model, tokenizer(), padded(tokenizer()), 8)
    bake(model, tokenizer(), vector, tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    torch.testing.assert_close(logits(baked), steered, rtol=0, atol=1e-5)
    assert float((steered - plain).abs().max()) > 0.1
    again = AutoTokenizer.from_pretrained(tmp_path / "baked", padding_side="left")
    assert complete(baked, again, padded(again), 8) == said
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]


@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_dtype_tied_weights_and_the_model_of_the_user_are_kept(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=tied).to(dtype)
    model.generation_config.max_new_tokens = 7
    vector = some_vector(method="nmd", task="addition")
    before, config = {name: (w.data_ptr(), w.clone()) for name, w in model.state_dict().items()}, model.config.to_dict()
    with vector.apply(model):
        steered = logits(model)
    bake(model, tokenizer(), vector, tmp_path)  # an empty folder is taken
    after = model.state_dict()
    assert (model.config.to_dict(), list(after)) == (config, list(before))
    assert all(after[n].data_ptr() == at and torch.equal(after[n], weight) for n, (at, weight) in before.items())
    baked = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {weight.dtype for weight in baked.parameters()} == {dtype}
    assert (baked.lm_head.weight.data_ptr() == baked.model.embed_tokens.weight.data_ptr()) is tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (it is no mapping)
    assert baked.generation_config.max_new_tokens == 7
    torch.testing.assert_close(logits(baked), steered, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.01)
    said = json.loads((tmp_path / "mnemoscope.json").read_text())
    assert (said["layers"], said["method"], said["task"], said["positions"]) == ([0, 2], "nmd", "addition", "all")


def refused(model: PreTrainedModel, vector: SteeringVector, folder: Path, message: str) -> None:
    """One clear line, and nothing in the folder above."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        bake(model, tokenizer(), vector, folder)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_checkpoints_cannot_hold_a_shift_are_refused(family: str, tmp_path: Path) -> None:
    refused(tiny(family), some_vector(), tmp_path / "baked", f"^model: .*{REFUSED[family]}")


@pytest.mark.parametrize(
    ("to", "vector", "message"),
    [
        ("checkpoint", some_vector(positions="decision"), "^positions: 'decision' cannot be exported, only 'all'"),
        ("checkpoint", some_vector("attention"), "^site: 'attention' cannot be exported as a checkpoint, only"),
        ("checkpoint", some_vector(layers=()), "^shifts: the vector shifts nothing"),
        ("checkpoint", some_vector(layers=(3,)), r"^layers: 3 is not in 0 \.\. 2"),
        ("checkpoint", some_vector(edits={0: torch.ones(31)}), "^shifts: 31 neurons in layer 0; this model has 32"),
        ("gguf", some_vector(layers=(0, 1)), "^layers: 0 cannot be exported as a gguf"),
        ("gguf", some_vector("mlp", layers=(1,)), "^site: 'mlp' cannot be exported as a gguf, only block"),
        ("gguf", some_vector(layers=(1,), positions="decision"), "^positions: 'decision'"),
    ],
)
def test_vectors_that_cannot_be_exported_are_refused(
    to: str, vector: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to == "checkpoint":
        return refused(tiny("gpt2"), vector, tmp_path / "baked", message)
    with pytest.raises(InputError, match=message):
        to_gguf(vector, tmp_path / "vector.gguf", "llama")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"^gguf: .*pip install 'mnemoscope\[pretrained\]'$"):
        to_gguf(some_vector(layers=(1,)), tmp_path / "v", "gpt2")


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-4), (torch.bfloat16, 1.0)])
def test_scaled_and_post_norm_blocks_are_found_by_measuring(dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    """A shift of their block is not what its MLP adds (Granite scales it); a shift of the MLP's own output is."""
    scaled = tiny("granite", residual_multiplier=0.5)
    for model in (scaled.to(dtype), tiny("opt", do_layer_norm_before=False).to(dtype)):
        refused(model, scale * some_vector("block"), tmp_path / "block", "straight to the residual stream")
        bake(model, tokenizer(), scale * some_vector("mlp"), tmp_path / type(model).__name__)


def test_a_checkpoint_that_would_not_answer_as_the_steered_model_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", mlp_bias=True).to(torch.bfloat16)
    torch.nn.init.constant_(model.model.layers[2].mlp.down_proj.bias, 100.0)
    refused(model, 0.1 * some_vector(), tmp_path / "baked", "^shifts: 100% of the one of layer 2 is lost in rounding")
    monkeypatch.setattr(export, "_shifted_bias", lambda bias_D, shift_D, layer: bias_D + 1.001 * shift_D)
    refused(tiny("gpt2"), some_vector(), tmp_path / "baked", "logits .* away from the steered ones")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks the library by an old name
def test_models_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "baked"
    refused(tiny("gpt2").train(), some_vector(), folder, "^model: it is in training mode")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    refused(get_peft_model(tiny("llama"), lora).eval(), some_vector(), folder, "^model: it has an adapter")
    several = tiny("gpt2")
    use_layout(several, replace(layout_of(several), down=""))
    refused(several, some_vector(), folder, "no single down projection")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    refused(tiny("gpt2"), some_vector(), tmp_path / "full", "^folder: .* is not empty; nothing is overwritten")


def call(*arguments: object) -> tuple[int, str, str]:
    return run("export", *map(str, arguments))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a model, and vectors that were made on it."""
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    vector = some_vector(layers=(1, 2)).bound_to(*load_model(tmp_path / "model"))
    vector.save(tmp_path / "v.safetensors")
    replace(vector, binding=None).save(tmp_path / "unbound.safetensors")
    return tmp_path


def test_the_command_line_writes_control_vectors_of_llama_cpp(made: Path) -> None:
    """One float32 direction.k for every shifted 0-based block k, and the names of the fields."""
    vector = SteeringVector.load(made / "v.safetensors")
    code, out, _ = call(made / "v.safetensors", "--to", "gguf", "-o", made / "v.gguf", "--json")
    assert (code, json.loads(out)["layers"], json.loads(out)["out"]) == (0, [1, 2], str(made / "v.gguf"))
    reader = gguf.GGUFReader(made / "v.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "controlvector"
    assert (found["controlvector.model_hint"], found["controlvector.layer_count"]) == ("gpt2", 2)
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor, shift in zip(reader.tensors, vector.shifts.values(), strict=True):
        np.testing.assert_array_equal(tensor.data, shift.numpy(), strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v.safetensors", "--to", "onnx"), "'onnx' is not one of 'gguf', 'checkpoint'"),
        (("v.safetensors", "--to", "checkpoint"), "model: a checkpoint is made of a model"),
        (("v.safetensors", "--to", "gguf", "--toward", "memory"), "toward: 'memory'; the vector in v.safetensors"),
        (("absent.safetensors", "--to", "gguf"), "absent.safetensors does not exist"),
        (("unbound.safetensors", "--to", "gguf"), "model: the vector does not say which model it was made on"),
        (("unbound.safetensors", "--to", "gguf", "--model", "model"), "binding: the vector does not say which model"),
        (
            ("v.safetensors", "--to", "checkpoint", "--model", "not/at/all"),
            "model: the folder not/at/all does not exist",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_exit_code_2(
    made: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(made)
    before = sorted(made.rglob("*"))
    code, stdout, stderr = call(*arguments, "-o", "out")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr
    assert sorted(made.rglob("*")) == before


def test_the_command_line_bakes_overwrites_nothing_and_is_forced_onto_another_model(made: Path) -> None:
    (made / "there.gguf").write_text("mine")
    bound = ("--to", "checkpoint", "--model", made / "model", "--alpha", "2", "-o")
    for arguments in (("--to", "gguf", "-o", made / "there.gguf", "--force"), (*bound, made / "model")):
        code, _, stderr = call(made / "v.safetensors", *arguments)
        assert (code, stderr.count("\n"), "nothing is overwritten" in stderr) == (2, 1, True)
    assert (made / "there.gguf").read_text() == "mine"
    assert not (made / "model" / "mnemoscope.json").exists()
    assert call(made / "unbound.safetensors", *bound, made / "new" / "baked")[0] == 2
    assert not (made / "new").exists()
    code, out, _ = call(made / "unbound.safetensors", *bound, made / "new" / "baked", "--force")
    assert (code, out) == (0, f"{made / 'new' / 'baked'}\n")
    model, _ = load_model(made / "model")
    with SteeringVector.load(made / "v.safetensors").apply(model, alpha=2.0):
        steered = logits(model)
    baked = AutoModelForCausalLM.from_pretrained(made / "new" / "baked").eval()
    torch.testing.assert_close(logits(baked), steered, rtol=0, atol=1e-5)


VECTOR = SteeringVector("generalized", {1: torch.ones(32)})


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("no/such/form", "'no/such/form' is not of the form owner/name"),
        ("owner/name", "owner/name cannot be reached on the hub"),
    ],
)
def test_what_a_hub_refuses_is_one_line(
    tmp_path: Path, repo_id: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    VECTOR.save(tmp_path / "v.safetensors")
    for call in (lambda: fetch(repo_id, "v.safetensors"), lambda: push(tmp_path / "v.safetensors", repo_id)):
        with pytest.raises(InputError, match=f"^repo_id: {message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_what_is_pushed_comes_back_and_its_page_shows_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here; what is put there is what the patterns let through."""
    store, mine = tmp_path / "store", tmp_path / "mine"
    for folder in (store, mine):
        folder.mkdir()

    class Api:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("owner/name", True, True)

        def upload_file(self, repo_id: str, path_in_repo: str, path_or_fileobj: bytes) -> None:
            (store / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str] | None) -> str:
            for path in folder_path.iterdir():
                if allow_patterns is None or path.name in allow_patterns:
                    shutil.copy(path, store)
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(store))
    (mine / "private.txt").touch()
    with pytest.raises(InputError, match=r"^path: .* does not exist"):
        push(tmp_path / "absent", "owner/name")
    card = Card("sums, seed 0, smollm2", {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 20}, pairs=30, groups=10)
    file, described = replace(VECTOR, card=card).save(mine / "v.safetensors")
    assert push(str(file), "owner/name") == "hub/owner/name"
    assert sorted(path.name for path in store.iterdir()) == ["README.md", "v.json", "v.safetensors"]
    assert (store / "README.md").read_text() == f"# v\n\n```text\n{card}\n```\n"
    again = SteeringVector.load(fetch("owner/name", "v.safetensors"))
    assert torch.equal(again.shifts[1], VECTOR.shifts[1])
    with pytest.raises(InputError, match=r"^name: owner/name has no file w\.safetensors"):
        fetch("owner/name", "w.safetensors")
    push(mine, "owner/name")
    assert (store / "private.txt").exists()
    described.write_text("{")
    with pytest.raises(InputError, match=r"v\.json: not JSON"):
        push(file, "owner/name")
