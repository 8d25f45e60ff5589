"""The table in docs/ARCHITECTURE.md is the law: who may import whom."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mnemoscope"


def allowed_imports() -> dict[str, set[str]]:
    table = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("\n\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", table, flags=re.MULTILINE)
    names = {name for name, _ in rows}
    return {name: names if cell == "everything" else set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}


def imported_modules(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, at the top or inside functions."""
    tree = ast.parse(path.read_text())
    hidden = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.dump(guard.test)
        for node in ast.walk(guard)
    }
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: a relative import has no name here"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mnemoscope"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mnemoscope.")}
    return found


def files_by_module() -> list[tuple[str, Path]]:
    files = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


def test_the_table_names_every_module() -> None:
    assert {name for name, _ in files_by_module()} == set(allowed_imports())


@pytest.mark.parametrize(("module", "path"), files_by_module(), ids=lambda v: v if isinstance(v, str) else v.name)
def test_imports_follow_the_table(module: str, path: Path) -> None:
    assert imported_modules(path) - {module} <= allowed_imports()[module]


def test_the_report_and_the_statistics_never_import_torch() -> None:
    for module, path in files_by_module():
        if module in ("report", "statistics", "config", "tasks"):
            assert not re.search(r"^\s*(import|from) (torch|transformers)\b", path.read_text(), flags=re.MULTILINE), (
                path
            )


def test_only_three_files_hang_hooks_into_models() -> None:
    hooking = {p.relative_to(PACKAGE).as_posix() for _, p in files_by_module() if "register_forward" in p.read_text()}
    assert hooking == {"behaviour/states.py", "interventions/hooks.py", "serving/worker.py"}


def test_the_table_has_no_circle() -> None:
    left = {name: imports - {name} for name, imports in allowed_imports().items() if name not in ("cli", "__main__")}
    while left:
        ground = {name for name, imports in left.items() if not imports & set(left)}
        assert ground, f"these import each other in a circle: {sorted(left)}"
        left = {name: imports for name, imports in left.items() if name not in ground}


OPENING = """
import json, sys
for name in "pandas pyarrow scipy sklearn matplotlib pydantic typer jinja2 threadpoolctl rich".split():
    sys.modules[name] = None  # as if it were not installed: what imports it fails, and transformers leaves it out
import numpy, safetensors.torch, tokenizers, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
run, cell, vector = sys.argv[1:]
inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
"""
ALONE = """
model = AutoModelForCausalLM.from_pretrained(cell + "/model")
AutoTokenizer.from_pretrained(cell + "/model")
safetensors.torch.load_file(vector)
model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
"""
WITH_US = """
import mnemoscope as ms
model, tokenizer = ms.load_model(cell + "/model")
with ms.SteeringVector.load(vector, model, tokenizer).apply(model):
    model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
ms.Detector.load(cell + "/detector.safetensors", model, tokenizer)
fitted = ms.Fitted.open(run, model, tokenizer)
assert 0 <= fitted.detect(["12+34="]).p_memorized[0] <= 1
fitted.gate(fitted.inputs(["12+34="]))
fitted.answers(["12+34="], "generalized", gate=0.5, max_new_tokens=2)
"""
LOADED = "\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))))\n"


def test_what_uses_saved_artefacts_imports_five_libraries_and_what_these_import(mini_run: Path) -> None:
    """That part lives inside serving engines."""
    cell = mini_run / "cells" / "addition-0"
    vector = next(iter(sorted((cell / "vectors").glob("to_generalized-*.safetensors"))))
    command = [sys.executable, "-c", OPENING + ALONE + LOADED + WITH_US + LOADED, str(mini_run), str(cell), str(vector)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(loaded) == 2
    assert loaded[1] - loaded[0] == {"mnemoscope"}
