"""Export steering vectors: baked into a checkpoint, on a model hub. For llama.cpp see ``llama_cpp``.

Exports act on every token, so only vectors with positions ``all`` can be exported. An export that would act otherwise
than ``SteeringVector.apply`` is refused, and nothing is written.

Shapes: N rows, T tokens of a left-padded batch, M of them real, V vocabulary, D neurons.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnemoscope.interventions import Intervention, SteeringVector, read_artefact
from mnemoscope.models import Site, core_of, layout_of, load_model, pass_inputs
from mnemoscope.runs.errors import InputError, check_one_of, first_line
from mnemoscope.runs.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Sites that an export can hold.
SITES_FOR: dict[str, tuple[Site, ...]] = {"checkpoint": ("block", "mlp"), "gguf": ("block",)}
# Fields of configurations that give a down projection its bias (Llama, Granite, SmolLM 3; Falcon; StarCoder 2; OPT).
_BIAS_SWITCHES = ("mlp_bias", "bias", "use_bias", "enable_bias")
# The largest difference of logits that is rounding, in units of the largest logit: the shift is added to another sum.
# SmolLM2-135M has 1.2e-6 in float32 and 0.03 in bfloat16.
_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}
_HALF = (torch.bfloat16, torch.float16)


def check_portable(vector: Intervention, to: str) -> None:
    """Raises InputError where a lever cannot be exported to ``checkpoint`` or ``gguf``, whatever its model."""
    check_one_of("to", to, SITES_FOR)
    if vector.changes_weights and to == "gguf":
        return
    if not isinstance(vector, SteeringVector):
        raise InputError(f"lever: {vector.lever} cannot be exported as a {to}; merge adapters by peft, or make a gguf")
    if vector.positions != "all":
        raise InputError(f"positions: {vector.positions!r} cannot be exported, only 'all': a {to} acts on every token")
    if vector.site not in SITES_FOR[to]:
        raise InputError(f"site: {vector.site!r} cannot be exported as a {to}, only {' or '.join(SITES_FOR[to])}")
    if not vector.is_constant:
        raise InputError(f"method: {vector.method!r} depends on the state; a {to} holds constant shifts only")
    if not vector.shifts:
        raise InputError("shifts: the vector shifts nothing")
    if to == "gguf" and 0 in vector.shifts:
        raise InputError("layers: 0 cannot be exported as a gguf, which has shifts of the layers 1 and up only")


def bake(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, vector: SteeringVector, folder: Path | str
) -> Path:
    """Write a plain Hugging Face folder whose model answers as this one does under ``vector.apply``.

    The shift goes into the bias of the down projection of each layer's MLP, which is exact where the block adds the
    MLP's output straight to the residual stream. Where an architecture has that bias only by an option of its
    configuration (``mlp_bias`` of Llama), the option is set, and the other biases that come with it are zero. The
    folder is opened again and must give the steered logits, rounding apart, before it gets its name; in half precision
    so must a float32 copy of the model.

    Args:
        model: stays unchanged. Multiply the vector for another strength: ``2 * vector``.
        folder: must not exist, or be empty. Gets the model in its dtype, its generation config, the tokenizer, and the
            facts of the vector in ``mnemoscope.json``.

    Raises:
        InputError: vector or model cannot be baked exactly; the message says why.
    """
    check_portable(vector, "checkpoint")
    core, folder = core_of(model), Path(folder).absolute()
    _check_bakeable(core)
    both = _logits(core), _logits(core, vector)
    facts = vector.facts() | {"task": vector.task, "commit": vector.commit, "prompting": vector.prompting.facts}
    with new_folder(folder) as temporary:
        _with_biases(core, vector).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "mnemoscope.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        again, _ = load_model(temporary, dtype="auto")
        _check_same(_logits(again.to(core.device)), *both, core)
        if core.dtype in _HALF:
            _check_exact(temporary, core, vector)
    return folder


def _check_bakeable(core: Any) -> None:
    """Refuse models that are known not to work; the rest is measured."""
    name, layout = type(core).__name__, layout_of(core)
    adapted = any(hasattr(module, "base_layer") for module in core.modules())
    behind_norm = bool(layout.down) and not f"{layout.down}.".startswith(f"{layout.mlp}.")
    for refused, why in (
        (adapted, "it has an adapter beside its weights; merge it first (merge_and_unload)"),
        (getattr(core, "hf_quantizer", None), "its weights are quantized; only plain ones can be baked"),
        (any(w.is_meta for w in core.state_dict().values()), "some of its weights are not in memory (offloaded)"),
        (core.training, "it is in training mode, where nothing can be compared; call eval() first"),
        (not layout.down, f"an MLP of {name} has no single down projection whose bias could hold a shift"),
        (behind_norm, f"{name} has a norm ({layout.mlp}) behind its MLP, where a shift differs from a bias"),
    ):
        if refused:
            raise InputError(f"model: {why}")


def _bias_of(core: Any, layer: int) -> str:
    """The name of the bias that holds the shift of a layer."""
    layout = layout_of(core)
    return f"{layout.blocks}.{layer}.{layout.down}.bias"


def _with_biases(core: Any, vector: SteeringVector) -> Any:
    """The same model with the shift in its biases; it shares all other weights with ``core``."""
    keys = {layer: _bias_of(core, layer) for layer in vector.shifts}
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
    wide_D, wanted_D = bias_D.to(torch.promote_types(bias_D.dtype, torch.float32)), shift_D.to(bias_D.device)
    summed_D = (wide_D + wanted_D).to(bias_D.dtype)
    lost = float((summed_D.to(wide_D.dtype) - wide_D - wanted_D).norm() / wanted_D.norm())
    if lost > 0.1:
        what = f"shifts: {lost:.0%} of the one of layer {layer} is lost in rounding of its bias to {bias_D.dtype}"
        raise InputError(f"{what}; a stronger vector or float32 is wanted")
    return summed_D


def _empty_with(core: Any, biases: set[str], weights: set[str]) -> Any:
    """A model of the same class on the meta device that has the biases and otherwise only ``weights``."""
    known = core.config.get_text_config()
    for switch in (None, *(name for name in _BIAS_SWITCHES if getattr(known, name, None) is False)):
        config = copy.deepcopy(core.config)
        if switch:
            setattr(config.get_text_config(), switch, True)
        with torch.device("meta"):
            empty = type(core)(config)
        names = set(empty.state_dict())
        if biases <= names and all(name.endswith(".bias") for name in names - weights):
            return empty
    what = f"the down projection of {type(core).__name__} has no bias"
    raise InputError(f"model: {what}, and no option of its configuration gives it one that could hold the shift")


@torch.no_grad()
def _logits(core: Any, vector: SteeringVector | None = None) -> Tensor:
    """Logits, steered or not, at the real tokens of two random rows of which one is padded; float64 (M, V)."""
    ids_NT = torch.randint(core.config.get_text_config().vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    mask_NT = torch.ones_like(ids_NT)
    mask_NT[1, :3] = 0
    inputs = pass_inputs(core, ids_NT.to(core.device), mask_NT.to(core.device)) | {"use_cache": False}
    # These rows are no chat, so nothing is asked of how they begin.
    with replace(vector, opening=()).apply(core) if vector else nullcontext():
        logits_NTV = core(**inputs).logits
    return logits_NTV.cpu().double()[mask_NT.bool()]


def _check_same(baked_MV: Tensor, plain_MV: Tensor, steered_MV: Tensor, core: Any) -> None:
    """Refuse a baked model that differs from the steered one, or where rounding hides whether it does."""
    difference, effect = (float((one_MV - steered_MV).abs().max()) for one_MV in (baked_MV, plain_MV))
    allowed = _ROUNDING.get(core.dtype, 1e-4) * max(1.0, float(steered_MV.abs().max()))
    if core.dtype not in _HALF:  # half precision is too coarse for small effects; _check_exact looks closer
        allowed = min(allowed, effect / 100)
    if not difference <= allowed:
        sizes = f"{difference:.2g} away from the steered ones (allowed {allowed:.2g}, the shift's effect {effect:.2g})"
        why = "its blocks do not add the MLP straight to the residual stream, or the shift is too small to tell"
        raise InputError(f"model: with the shift in its biases {type(core).__name__} gives logits {sizes}: {why}")


@torch.no_grad()
def _check_exact(folder: Path, core: Any, vector: SteeringVector) -> None:
    """Compare shift and bias in float32; half precision hides, for example, that a block scales its MLP."""
    exact, _ = load_model(folder, dtype="float32", layout=layout_of(core))
    state, biases = core.state_dict(), {layer: exact.get_parameter(_bias_of(core, layer)) for layer in vector.shifts}
    for layer, bias_D in biases.items():
        bias_D.copy_(state.get(_bias_of(core, layer), torch.zeros(1)))
    both = _logits(exact), _logits(exact, vector)
    for layer, shift_D in vector.shifts.items():
        biases[layer].add_(shift_D)
    _check_same(_logits(exact), *both, exact)


def push(path: Path | str, repo_id: str) -> str:
    """Upload a folder, or the file of a vector or detector with its JSON and its card, to the hub; returns its address.

    The repository ``owner/name`` is made, private, where it does not exist. InputError where the path does not exist,
    one of the two is damaged, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    path = Path(path)
    if not path.exists():
        raise InputError(f"path: {path} does not exist")
    folder, described = path.is_dir(), path.with_suffix(".json")
    card = read_artefact("card", path)[0]["card"] if not folder and described.is_file() else None
    with _hub(repo_id):
        HfApi().create_repo(repo_id, private=True, exist_ok=True)
        if card is not None:  # the page that the hub shows
            page = f"# {path.stem}\n\n```text\n{card}\n```\n".encode()
            HfApi().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=page)
        source, only = (path, None) if folder else (path.parent, [path.name, described.name])
        return str(HfApi().upload_folder(repo_id=repo_id, folder_path=source, allow_patterns=only))


def fetch(repo_id: str, name: str) -> Path:
    """The local path of a vector in a repository of the hub, for ``SteeringVector.load``.

    The JSON beside the file ``name`` (.safetensors) comes with it. InputError where the hub cannot be reached, refuses,
    or has no such file.
    """
    from huggingface_hub import snapshot_download

    wanted = [name, str(Path(name).with_suffix(".json"))]
    with _hub(repo_id):
        path = Path(snapshot_download(repo_id, allow_patterns=wanted)) / name
    if not path.is_file():
        raise InputError(f"name: {repo_id} has no file {name}")
    return path


@contextmanager
def _hub(repo_id: str) -> Iterator[None]:
    """One InputError for the many kinds that the hub's client has, and those of its HTTP library."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"repo_id: {repo_id!r} is not of the form owner/name") from error
    except Exception as error:
        login = "of one that is gated or not public ask for access and log in (hf auth login)"
        raise InputError(f"repo_id: {repo_id} cannot be reached on the hub ({first_line(error)}); {login}") from error
