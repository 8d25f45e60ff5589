"""Open trained models: a folder, a hub id, or a packaged one; safetensors only, no remote code."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mnemoscope.models.caches import arguments_of
from mnemoscope.models.layout import Layout, core_of, use_layout
from mnemoscope.models.packaged import check_named, unpacked
from mnemoscope.models.room import free_bytes
from mnemoscope.models.trainable import check_peft
from mnemoscope.runs.errors import InputError, refusing
from mnemoscope.runs.processes import beside
from mnemoscope.runs.schemas import GenerationFacts
from mnemoscope.runs.strict import checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mnemoscope.config import LayoutConfig

SHOWN = 3  # names of weights in an error
UNOPENED = "cannot be opened as a causal language model"
LARGER = 2  # times as many weights as are saved; head and embedding may be one tensor
ADAPTED = "adapter_model.safetensors"  # of an adapter's folder
WEIGHTS = ("model.safetensors", ADAPTED)
INDEX = "model.safetensors.index.json"  # of weights in several files
_REPORTED = {  # what the library says of the weights of a folder, in words
    "missing_keys": "lacks",
    "mismatched_keys": "has in another shape",
    "unexpected_keys": "has more weights than its configuration asks for:",
}
DType = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    source: str | Path,
    *,
    dtype: DType = "float32",
    device_map: Any = None,
    layout: Layout | LayoutConfig | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Open a causal language model and its tokenizer.

    Args:
        source: a folder, a hub id, or the name of a packaged model (``PACKAGED``). The folder of an adapter (peft)
            opens as the adapted model, with the adapter in it.
        dtype: of the weights; ``auto``: as they were saved.
        device_map: as the library takes it; needs ``accelerate``.
        layout: for a model of no known family.
        tokenizer: a folder or a hub id that has the tokenizer, where the source has none, as many checkpoints.

    Raises:
        InputError: it is missing or corrupted, its weights are not those that its configuration asks for, it needs
            remote code, it has no tokenizer, or it is no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_named(source)
    folder = unpacked(source)
    _check_own(Path(folder))
    with refusing(f"model: {source} {UNOPENED}"):
        adapted = _adapted(folder, source)
        check_named(adapted)
        _check_causal(adapted, source)
        has_none = adapted != folder and file_of(folder, "tokenizer_config.json") is None
        words = unpacked(tokenizer) if tokenizer is not None else adapted if has_none else folder
        opened = AutoTokenizer.from_pretrained(words, padding_side="left", trust_remote_code=False)
        # The model itself first, as the library keeps one report only.
        model, report = AutoModelForCausalLM.from_pretrained(
            adapted,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype,
            device_map=device_map,
            ignore_mismatched_sizes=True,  # they are in the report too, by name
            output_loading_info=True,
        )
        _check_loaded(model, report, adapted)
        if adapted != folder:
            _check_loaded(model, model.load_adapter(str(folder)).to_dict(), source)
    if not opened.is_fast:
        raise InputError(f"model: {source} has a slow tokenizer only; one of the library tokenizers is needed")
    if len(opened) <= len(set(opened.all_special_ids)):  # what the library makes of a folder without one
        raise InputError(f"model: {source} has no tokenizer; give the one that it was trained with")
    if opened.pad_token_id is None:  # masked wherever it stands, so any token will do
        opened.pad_token = opened.eos_token or opened.convert_ids_to_tokens(0)
    if not {"cache", "past_key_values"} & arguments_of(model):
        kind = core_of(model).config.model_type
        raise InputError(f"model: {source} ({kind}) keeps no key-value cache; one is needed")
    _keep_settings(model, opened, source)
    if layout is not None:
        use_layout(model, layout)
    return model.eval(), opened


def _keep_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, source: str | Path) -> None:
    """Leave out what changes the answers of ``generate`` unseen (``suppress_tokens``); InputError for a wrong value."""
    from transformers import GenerationConfig

    checked(tokenizer.model_max_length, int, f"model: {source}: model_max_length")  # compared without a look
    given = model.generation_config.to_diff_dict() if model.generation_config else {}
    kept = {name: value for name, value in given.items() if name in GenerationFacts.__annotations__}
    model.generation_config = GenerationConfig(**checked(kept, GenerationFacts, f"model: {source}: generation"))
    left = set(given) - set(kept) - {"transformers_version", "_from_model_config", "use_cache"}
    if others := sorted(name for name in left if given[name]):
        logging.getLogger("mnemoscope").warning("model: %s asks for %s; left out", source, ", ".join(others))


def context_length(model: PreTrainedModel) -> int:
    """Maximum number of tokens that a model can read."""
    return int(getattr(core_of(model).config.get_text_config(), "max_position_embeddings", 2**31))


def layers_of(source: str | Path) -> int:
    """Number of layers of a model, from its configuration alone; InputError where that cannot be read."""
    from transformers import AutoConfig

    check_named(source)
    with refusing(f"model: {source} {UNOPENED}"):
        config = AutoConfig.from_pretrained(_adapted(unpacked(source), source), trust_remote_code=False)
        return int(config.get_text_config().num_hidden_layers)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that end a text: the tokenizer's, and those at which generation stops (end of a chat turn)."""
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({end for end in (tokenizer.eos_token_id, *stops) if end is not None})


def _adapted(folder: str | Path, source: str | Path) -> str | Path:
    """The model that the adapter in a folder or under a hub id adapts; the folder or id itself without an adapter."""
    described = file_of(folder, "adapter_config.json")
    if described is None:
        return folder
    check_peft(f"model: {source} is an adapter, which")
    if file_of(folder, ADAPTED) is None:
        raise InputError(f"model: {source} has no {ADAPTED}; other formats are not opened")
    return str(json.loads(Path(described).read_text())["base_model_name_or_path"])


def file_of(folder: str | Path, name: str) -> str | None:
    """Path of a file in a folder or under a hub id, fetched if needed; None where there is none."""
    from transformers.utils import cached_file

    try:
        return cached_file(folder, name)
    except Exception:  # opening the configuration reports a model that is missing or may not be read
        return None


def _check_own(folder: Path) -> None:
    """Refuse a model of a run that is not as its study wrote it, or that needs another one outside the run."""
    from mnemoscope.runs.digests import STAGES, check_closed, check_stage, intact

    if folder.name not in ("model", "adapter") or not (folder.parent / STAGES).is_dir():
        return
    check_closed(folder.parent)
    check_stage(folder.parent, "train")
    for path in sorted(folder.glob("*")):
        intact(path)
    if (folder / "adapter_config.json").exists() and folder.name == "model":
        raise InputError(f"model: {folder} holds an adapter, where a study writes a whole model")


def _check_causal(folder: str | Path, source: str | Path) -> None:
    """Refuse masked and encoder-decoder models, which would open with a warning only, and files outside the folder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if "/" in str(getattr(config, "_attn_implementation", None)):  # the library would fetch its code and run it
        raise InputError(f"model: {source} asks for an attention kernel from the hub; none is run")
    known = {name for names in CAUSAL.values() for name in ([names] if isinstance(names, str) else names)}
    made_as = config.architectures or []
    if getattr(config, "is_encoder_decoder", False) or (made_as and not known & set(made_as)):
        kind = ", ".join(made_as) or config.model_type
        raise InputError(f"model: {source} is {kind}; a causal language model (decoder only) is wanted")
    _check_size(folder, config)


def _files_of_weights(folder: str | Path) -> list[str]:
    """Paths of the weights of a model or an adapter, fetched if needed; InputError where some are outside of it."""
    listed = file_of(folder, INDEX)
    named = json.loads(Path(listed).read_text())["weight_map"].values() if listed else WEIGHTS
    for name in sorted(set(named)):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"model: {folder} has weights in {name}, which is outside of it")
    return [path for name in sorted(set(named)) if (path := file_of(folder, name)) is not None]


def shapes_of(folder: str | Path) -> dict[str, list[int]]:
    """Shapes of all tensors of a model or an adapter, by name, as its files say."""
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for path in _files_of_weights(folder):
        with refusing(f"model: {folder} {UNOPENED}"), safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def _check_size(folder: str | Path, config: Any) -> None:
    """Refuse a configuration of many more layers or weights than are saved, before a model is built by it."""
    from transformers import AutoModelForCausalLM

    shapes = shapes_of(folder).values()
    saved, fits = sum(map(math.prod, shapes)), config.get_text_config().num_hidden_layers <= len(shapes)
    if not shapes or getattr(config, "quantization_config", None):
        return
    if fits:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        fits = sum(weight.numel() for weight in built.parameters()) <= LARGER * saved
    if not fits:
        what = f"{saved} weights in {len(shapes)} tensors are saved"
        raise InputError(f"model: the configuration of {folder} asks for many more layers or weights; {what}")


def _check_loaded(model: PreTrainedModel, report: Mapping[str, Any], source: str | Path) -> None:
    """Refuse weights that were drawn at random or left out, by name.

    Of tied weights the library asks for one. What was saved of buffers that a model computes itself is not needed.
    """
    computed = {name for name, _ in model.named_buffers()}
    for field, what in _REPORTED.items():
        keys = (key if isinstance(key, str) else key[0] for key in report.get(field) or ())
        if names := sorted(key for key in keys if field != "unexpected_keys" or key not in computed):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            found = f"{what} {', '.join(names[:SHOWN])}{more}"
            raise InputError(f"model: {source} {found}; weights and configuration do not belong together")


def models_that_fit(source: str | Path, wanted: int) -> int:
    """Number of processes, at least one and at most ``wanted``, with a model (folder or hub id) each that fit."""
    saved = sum(Path(path).stat().st_size for path in _files_of_weights(unpacked(source)))
    free = free_bytes(torch.device("cpu"))
    # Weights of two bytes become four, and as much again passes through; the libraries themselves take half a GiB.
    return wanted if free is None else max(1, min(wanted, int(free // beside() // (2**29 + 3 * saved))))
