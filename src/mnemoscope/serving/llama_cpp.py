"""Files of llama.cpp: vectors as its control vectors, adapters as its adapters, and control vectors of others.

Shapes: D neurons, K rank, I inputs and O outputs of a module, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.interventions import Binding, Card, Intervention, SteeringVector, Toward
from mnemoscope.interventions.adapter import Adapter
from mnemoscope.models import core_of
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.files import write_atomically
from mnemoscope.runs.strict import validated
from mnemoscope.serving.export import check_portable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# By ``model_type``, names in ``gguf.MODEL_ARCH``; queries and keys of the first are turned otherwise there than here.
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma2": "GEMMA2"}
ARCHITECTURES |= {"gemma3_text": "GEMMA3"}
OURS = "mnemoscope"  # fields of our own, which llama.cpp does not read


def to_gguf(lever: Intervention, path: Path | str, model_type: str, config: Any = None) -> Path:
    """Write a vector as a control vector for llama.cpp (``--control-vector FILE``), an adapter for ``--lora FILE``.

    Its ``common_control_vector_load`` takes every 1-D float32 tensor ``direction.k``, k = 1 and up, and
    ``llama_adapter_cvec`` adds it to the output of the 0-based block k at every token; block 0 never has one. It reads
    no other field; ``controlvector.layer_count`` is the number of tensors, as in its own cvector-generator. An adapter
    has two tensors a module, ``NAME.lora_a`` (K, I) and ``NAME.lora_b`` (O, K), as ``convert_lora_to_gguf`` writes.

    Args:
        path: is replaced if it exists.
        model_type: the configuration's ``model_type``, written as ``controlvector.model_hint``.
        config: the model's configuration; an adapter needs it.

    Raises:
        InputError: the vector has another site or other positions, or shifts layer 0; the adapter's model is of a kind
            that was not tried; or ``gguf`` is not installed.
    """
    check_portable(lever, "gguf")
    gguf = _gguf()

    def write(temporary: Path) -> None:
        if isinstance(lever, Adapter):
            kind = getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type])
            writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[kind])
            writer.add_string("general.type", "adapter")
            writer.add_string("adapter.type", "lora")
            tensors = dict(_adapter_tensors(lever, model_type, config, gguf))
            rank = max((len(down_KI) for down_KI, _ in lever.parts.values()), default=1)
            writer.add_float32("adapter.lora.alpha", float(rank))
        else:
            writer = gguf.GGUFWriter(temporary, "controlvector")
            writer.add_string("controlvector.model_hint", model_type)
            shifts = lever.shifts if isinstance(lever, SteeringVector) else {}
            tensors = {f"direction.{layer}": shift_D for layer, shift_D in shifts.items()}
            writer.add_uint32("controlvector.layer_count", len(tensors))
        writer.add_string(f"{OURS}.facts", json.dumps({"toward": lever.toward, **_known(lever)}))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    if isinstance(lever, Adapter) and model_type not in ARCHITECTURES:
        raise InputError(f"model: {model_type!r}; adapters of {', '.join(ARCHITECTURES)} can be written")
    if isinstance(lever, Adapter) and config is None:
        raise InputError("model: an adapter is written by the sizes of its model; name it")
    return write_atomically(Path(path), write)


def _known(lever: Intervention) -> dict[str, Any]:
    """What is known of a lever besides its tensors."""
    return {name: asdict(value) for name in ("binding", "card") if (value := getattr(lever, name)) is not None}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("gguf: the package is not installed: pip install 'mnemoscope[pretrained]'") from error
    return gguf


def _adapter_tensors(adapter: Adapter, model_type: str, config: Any, gguf: Any) -> Iterator[tuple[str, Tensor]]:
    kind = getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type])
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for module, (down_KI, up_OK) in adapter.parts.items():
        name = names.get_name(f"{module}.weight", (".weight",))
        if name is None:
            raise InputError(f"adapter: llama.cpp has no name for {module}")
        if kind is gguf.MODEL_ARCH.LLAMA and name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp turns neighbouring numbers of a head together, transformers those of its two halves.
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            up_OK = up_OK.reshape(heads, 2, len(up_OK) // heads // 2, -1).swapaxes(1, 2).reshape(up_OK.shape)
        yield f"{name}.lora_a", down_KI
        yield f"{name}.lora_b", up_OK


def from_gguf(
    path: Path | str, toward: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> SteeringVector:
    """A control vector, of ours or of others, as a vector that acts on every token of this model.

    One that we wrote brings its card and must be of this model and direction. Of another one nobody has judged here
    what it does, and its card says so.

    Raises:
        InputError: it is no control vector, has a tensor that is no shift of a block of this model, or is one of ours
            for another model or direction.
    """
    gguf, path, toward = _gguf(), Path(path), Toward.of(toward)
    with refusing(f"FILE: {path} is no control vector of llama.cpp"):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields.get("general.architecture") != "controlvector":
            raise ValueError(f"its architecture is {fields.get('general.architecture')!r}")
        if whole := [one.name for one in reader.tensors if one.data.dtype.kind != "f"]:
            raise ValueError(f"{whole[0]} is quantized or of whole numbers")
        shifts = {one.name.removeprefix("direction."): one.data.astype("float32") for one in reader.tensors}
        edits = {int(layer): torch.from_numpy(shift_D) for layer, shift_D in shifts.items()}
        told = dict(json.loads(fields.get(f"{OURS}.facts", "{}")))
    found = Binding.of(model, tokenizer)
    if told.get("binding"):
        validated(told["binding"], Binding, f"{path}: binding").check(found, "control vector")
    if told.get("toward", toward) != toward:
        raise InputError(f"toward: {toward!r}; the control vector in {path} steers to {told['toward']}")
    card = validated(told["card"], Card, f"{path}: card") if told.get("card") else Card(f"{path.name}: not judged")
    vector = SteeringVector(toward, edits, positions="all", method="imported", binding=found, card=card)
    vector.check_shape(core_of(model))
    return vector
