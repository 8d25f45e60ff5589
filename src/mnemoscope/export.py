"""Steering vectors for other programs: baked into a checkpoint, as a control vector for llama.cpp, on a model hub.

What is exported acts on every token, so only vectors with positions ``all`` can be. What would act otherwise than
``SteeringVector.apply`` does is refused, and nothing is written.

Shapes: N rows, T tokens of a left-padded batch, M of them real, V vocabulary, D neurons.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.errors import InputError
from mnemoscope.files import new_folder, write_atomically
from mnemoscope.models import Site, core_of, layout_of, load_model, pass_inputs
from mnemoscope.steering import Card, SteeringVector, readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Sites whose shift another program can make, by what is written.
SITES_FOR: dict[str, tuple[Site, ...]] = {"checkpoint": ("block", "mlp"), "gguf": ("block",)}
BAKED = "mnemoscope.json"  # in a baked folder: which vector is in its weights
# Fields of configurations that give a down projection its bias (Llama, Granite, SmolLM 3; Falcon; StarCoder 2; OPT).
_BIAS_SWITCHES = ("mlp_bias", "bias", "use_bias", "enable_bias")
# The largest difference of logits that is rounding, in units of the largest logit: the shift is added to another sum.
# SmolLM2-135M has 1.2e-6 in float32 and 0.03 in bfloat16.
_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}
_HALF = (torch.bfloat16, torch.float16)
_CONTROL = "controlvector"


def check_portable(vector: SteeringVector, to: str) -> None:
    """Whether a vector can be exported at all, as far as that can be told without its model.

    Args:
        to: ``checkpoint`` or ``gguf``.

    Raises:
        InputError: it cannot; the message names the field, its value and what is allowed.
    """
    if to not in SITES_FOR:
        raise InputError(f"to: {to!r} is not one of {', '.join(SITES_FOR)}")
    if vector.positions != "all":
        raise InputError(
            f"positions: {vector.positions!r} cannot be exported, only 'all': a {to} acts on every token, so the "
            "vector must be one that was judged so"
        )
    if vector.site not in SITES_FOR[to]:
        raise InputError(f"site: {vector.site!r} cannot be exported as a {to}, only {' or '.join(SITES_FOR[to])}")
    if not vector.shifts:
        raise InputError("shifts: the vector shifts nothing")
    if to == "gguf" and 0 in vector.shifts:
        raise InputError("layers: 0 cannot be exported as a gguf, which has shifts of the layers 1 and up only")


def bake(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, vector: SteeringVector, folder: Path | str
) -> Path:
    """Write a plain Hugging Face folder whose model answers as this one does under ``vector.apply``.

    The shift goes into the bias of the down projection of each layer's MLP, which is exact where the block adds what
    the MLP returns straight to the residual stream. Where an architecture has that bias only by an option of its
    configuration (``mlp_bias`` of Llama), the option is set, and the other biases that come with it are zero. The
    folder is opened again and must give the steered logits, rounding apart, before it gets its name; in half precision
    so must a float32 copy of the model.

    Args:
        model: stays as it is. Multiply the vector for another strength: ``2 * vector``.
        folder: must not exist, or be empty. Has the model's dtype, its generation config and the tokenizer as well,
            and says in ``mnemoscope.json`` which vector is in it.

    Raises:
        InputError: vector or model cannot be baked exactly; the message says why.
    """
    check_portable(vector, "checkpoint")
    core, folder = core_of(model), Path(folder).absolute()
    _check_bakeable(core)
    probe = _Probe(core)
    plain_MV = probe.read(core)
    with vector.apply(core):
        steered_MV = probe.read(core)
    with new_folder(folder) as temporary:
        _with_biases(core, vector).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / BAKED).write_text(json.dumps(_facts(vector), indent=1, sort_keys=True) + "\n")
        again, _ = load_model(temporary, dtype="auto")
        _check_same(probe.read(again.to(core.device)), steered_MV, plain_MV, core)
        if core.dtype in _HALF:
            _check_exact(temporary, core, vector, probe)
    return folder


def _check_bakeable(core: Any) -> None:
    """Refuse what is known beforehand not to work; the rest is measured."""
    name, layout = type(core).__name__, layout_of(core)
    if any(hasattr(module, "base_layer") for module in core.modules()):
        raise InputError("model: it has an adapter beside its weights; merge it first (merge_and_unload)")
    if getattr(core, "hf_quantizer", None) is not None:
        raise InputError("model: its weights are quantized; only plain ones can be baked")
    if any(weight.is_meta for weight in core.state_dict().values()):
        raise InputError("model: some of its weights are not in memory (offloaded)")
    if core.training:
        raise InputError("model: it is in training mode, where nothing can be compared; call eval() first")
    if not layout.down:
        raise InputError(f"model: an MLP of {name} has no single down projection whose bias could hold a shift")
    if not f"{layout.down}.".startswith(f"{layout.mlp}."):
        raise InputError(
            f"model: {name} has a norm ({layout.mlp}) between the MLP and the residual stream; a bias before it is "
            "not the shift behind it"
        )


def _with_biases(core: Any, vector: SteeringVector) -> Any:
    """The same model with the shift in its biases; it shares all other weights with ``core``."""
    layout = layout_of(core)
    keys = {layer: f"{layout.blocks}.{layer}.{layout.down}.bias" for layer in vector.shifts}
    state = dict(core.state_dict())
    baked = _empty_with(core, set(keys.values()), set(state))
    for name, empty in baked.state_dict().items():
        if name not in state:
            beside = state[name.removesuffix("bias") + "weight"]
            state[name] = torch.zeros(empty.shape, dtype=beside.dtype, device=beside.device)
    for layer, shift_D in vector.shifts.items():
        state[keys[layer]] = _shifted_bias(state[keys[layer]], shift_D, layer)
    baked.load_state_dict(state, assign=True)
    baked.generation_config = copy.deepcopy(getattr(core, "generation_config", None))
    return baked


def _shifted_bias(bias_D: Tensor, shift_D: Tensor, layer: int) -> Tensor:
    """Bias and shift in the bias's dtype, rounded once; refused where rounding leaves little of the shift."""
    wide = torch.promote_types(bias_D.dtype, torch.float32)
    wanted_D = shift_D.to(bias_D.device, wide)
    summed_D = (bias_D.to(wide) + wanted_D).to(bias_D.dtype)
    lost = float((summed_D.to(wide) - bias_D.to(wide) - wanted_D).norm() / wanted_D.norm())
    if lost > 0.1:
        raise InputError(
            f"shifts: {lost:.0%} of the one of layer {layer} is lost in rounding of its bias to {bias_D.dtype}; a "
            "stronger vector or float32 is wanted"
        )
    return summed_D


def _empty_with(core: Any, biases: set[str], weights: set[str]) -> Any:
    """A model of the same class, without memory for its weights, that has the biases and beside them only ``weights``.

    Raises:
        InputError: no option of its configuration gives it these biases.
    """
    for switch in ("", *_BIAS_SWITCHES):
        config = copy.deepcopy(core.config)
        if switch:
            if getattr(config.get_text_config(), switch, None) is not False:
                continue
            setattr(config.get_text_config(), switch, True)
        with torch.device("meta"):
            empty = type(core)(config)
        names = set(empty.state_dict())
        if biases <= names and all(name.endswith(".bias") for name in names - weights):
            return empty
    raise InputError(
        f"model: the down projection of {type(core).__name__} has no bias, and no option of its configuration gives it "
        "one, so a plain checkpoint cannot hold the shift"
    )


def _facts(vector: SteeringVector) -> dict[str, Any]:
    """What a baked folder says of its vector."""
    return vector.facts() | {"task": vector.task, "commit": vector.commit, "prompting": vector.prompting.facts}


class _Probe:
    """Token ids drawn from one seed, in two rows of which one is padded."""

    def __init__(self, core: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids_NT = torch.randint(core.config.get_text_config().vocab_size, (2, 8), generator=generator)
        self.mask_NT = torch.ones_like(self.ids_NT)
        self.mask_NT[1, :3] = 0

    @torch.no_grad()
    def read(self, core: Any) -> Tensor:
        """Logits at the real tokens, float64 (M, V)."""
        ids_NT, mask_NT = self.ids_NT.to(core.device), self.mask_NT.to(core.device)
        logits_NTV = core(**pass_inputs(core, ids_NT, mask_NT) | {"use_cache": False}).logits
        return logits_NTV.cpu().double()[self.mask_NT.bool()]


def _check_same(baked_MV: Tensor, steered_MV: Tensor, plain_MV: Tensor, core: Any) -> None:
    """Refuse a baked model that is not the steered one, or where rounding hides whether it is."""
    difference = float((baked_MV - steered_MV).abs().max())
    effect = float((steered_MV - plain_MV).abs().max())
    allowed = _ROUNDING.get(core.dtype, 1e-4) * max(1.0, float(steered_MV.abs().max()))
    if (
        core.dtype not in _HALF
    ):  # whose logits are coarser than what many a useful shift does; _check_exact looks closer
        allowed = min(allowed, effect / 100)
    if not difference <= allowed:
        raise InputError(
            f"model: with the shift in its biases {type(core).__name__} gives logits {difference:.2g} away from the "
            f"steered ones (allowed {allowed:.2g}, as the shift changes them by {effect:.2g}): its blocks do not add "
            "the MLP's output straight to the residual stream, or the shift is too small to tell"
        )


@torch.no_grad()
def _check_exact(folder: Path, core: Any, vector: SteeringVector, probe: _Probe) -> None:
    """Hold shift and bias against each other in float32; half precision hides, say, that a block scales its MLP."""
    exact, _ = load_model(folder, dtype="float32", layout=layout_of(core))
    layout, state = layout_of(core), core.state_dict()
    biases = {}
    for layer in vector.shifts:
        name = f"{layout.blocks}.{layer}.{layout.down}"
        biases[layer] = exact.get_submodule(name).bias
        before_D = state.get(f"{name}.bias")
        biases[layer].zero_() if before_D is None else biases[layer].copy_(before_D)
    plain_MV = probe.read(exact)
    with vector.apply(exact):
        steered_MV = probe.read(exact)
    for layer, shift_D in vector.shifts.items():
        biases[layer].add_(shift_D)
    _check_same(probe.read(exact), steered_MV, plain_MV, exact)


def to_gguf(vector: SteeringVector, path: Path | str, model_type: str) -> Path:
    """Write a control vector for llama.cpp (``--control-vector FILE``).

    The convention is that of llama.cpp: ``common_control_vector_load`` (common/common.cpp) takes every 1-D float32
    tensor ``direction.k``, k = 1 and up, and ``llama_adapter_cvec`` (src/llama-adapter.cpp) adds it to the output of
    the 0-based block k at every token; block 0 never has one. It reads no other field. The number of tensors is written
    as ``controlvector.layer_count``, as its own cvector-generator and repeng do.

    Args:
        path: is replaced if it exists.
        model_type: the configuration's ``model_type``, written as ``controlvector.model_hint``.

    Raises:
        InputError: the vector has another site or other positions, shifts layer 0, or ``gguf`` is not installed.
    """
    check_portable(vector, "gguf")
    gguf = _gguf()

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, _CONTROL)
        writer.add_string(f"{_CONTROL}.model_hint", model_type)
        writer.add_uint32(f"{_CONTROL}.layer_count", len(vector.shifts))
        for layer, shift_D in vector.shifts.items():
            writer.add_tensor(f"direction.{layer}", shift_D.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write_atomically(Path(path), write)


def read_gguf(path: Path | str) -> tuple[dict[int, np.ndarray], str]:
    """The shifts of a control vector, float32 (D,) per 0-based layer, and what it says of its model.

    Raises:
        InputError: the file is missing, no GGUF or no control vector, or ``gguf`` is not installed.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        kind, hint = (_text(reader, key) for key in ("general.architecture", f"{_CONTROL}.model_hint"))
    except Exception as error:  # numpy's and gguf's own kinds, by where a file is broken
        raise InputError(f"gguf: {path} cannot be read as a GGUF file ({_first_line(error)})") from error
    if kind != _CONTROL:
        raise InputError(f"gguf: {path} is no control vector (general.architecture is {kind!r}, not {_CONTROL!r})")
    shifts = {}
    for tensor in reader.tensors:
        layer = re.fullmatch(r"direction\.([1-9]\d*)", tensor.name)
        if layer is None or tensor.data.ndim != 1 or tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise InputError(f"gguf: {path} has {tensor.name!r}, which is no direction.1, direction.2, .. in float32")
        shifts[int(layer[1])] = np.array(tensor.data, np.float32)
    if len({len(shift) for shift in shifts.values()}) != 1:
        raise InputError(f"gguf: {path} is no control vector (it has no directions, or some of different widths)")
    return dict(sorted(shifts.items())), hint


def _text(reader: Any, key: str) -> str:
    """A text field of a GGUF file; "" where it is absent."""
    field = reader.get_field(key)
    return bytes(field.parts[field.data[0]]).decode() if field else ""


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("gguf: the package is not installed: pip install 'mnemoscope[pretrained]'") from error
    return gguf


def push(path: Path | str, repo_id: str) -> str:
    """Put a folder, or the file of a vector or detector with its JSON and its card, into a repository of the hub.

    Args:
        repo_id: ``owner/name``. Where there is none it is made, private.

    Returns:
        The address of what was put there.

    Raises:
        InputError: the path does not exist, the JSON is damaged, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    path = Path(path)
    if not path.exists():
        raise InputError(f"path: {path} does not exist")
    described = path.with_suffix(".json")
    only = None if path.is_dir() else [path.name, described.name]
    card = None
    if only and described.is_file():
        with readable("card", described):
            facts = json.loads(described.read_text()).get("card")
            card = Card(**facts) if facts else None
    try:
        HfApi().create_repo(repo_id, private=True, exist_ok=True)
        source = path if path.is_dir() else path.parent
        if card is not None:  # the page that the hub shows
            HfApi().upload_file(
                repo_id=repo_id,
                path_in_repo="README.md",
                path_or_fileobj=f"# {path.stem}\n\n```text\n{card}\n```\n".encode(),
            )
        return str(HfApi().upload_folder(repo_id=repo_id, folder_path=source, allow_patterns=only))
    except Exception as error:  # the hub's client has many kinds, and those of its HTTP library
        raise _hub_refused(repo_id, error) from error


def fetch(repo_id: str, name: str) -> Path:
    """The local path of a vector in a repository of the hub, for ``SteeringVector.load``.

    Args:
        name: of the vector's file, ``NAME.safetensors``; the JSON beside it comes with it.

    Raises:
        InputError: the hub cannot be reached or refuses, or has no such file.
    """
    from huggingface_hub import snapshot_download

    wanted = [name, str(Path(name).with_suffix(".json"))]
    try:
        path = Path(snapshot_download(repo_id, allow_patterns=wanted)) / name
    except Exception as error:  # as in push
        raise _hub_refused(repo_id, error) from error
    if not path.is_file():
        raise InputError(f"name: {repo_id} has no file {name}")
    return path


def _hub_refused(repo_id: str, error: Exception) -> InputError:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return InputError(f"repo_id: {repo_id} is gated; ask for access on its page and log in (hf auth login)")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"repo_id: {repo_id} does not exist, or is not yours to see; log in (hf auth login)")
    if isinstance(error, HFValidationError):
        return InputError(f"repo_id: {repo_id!r} is not of the form owner/name")
    return InputError(f"repo_id: {repo_id} cannot be reached on the hub ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
