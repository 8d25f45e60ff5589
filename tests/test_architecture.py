"""The table in docs/ARCHITECTURE.md is the law: who may import whom."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mnemoscope"
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def allowed_imports() -> dict[str, set[str]]:
    table = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("\n\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", table, flags=re.MULTILINE)
    names = {name for name, _ in rows}
    return {name: names if cell == "everything" else set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}


@functools.cache
def tree_of(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def imports_of(path: Path, inside: bool = True) -> set[tuple[str, str]]:
    """What a file imports, as (module, name): at the top, and inside functions. Imports for types alone are free."""
    found: set[tuple[str, str]] = set()
    left = [tree_of(path)]
    while left:
        node = left.pop()
        hidden = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if hidden or (isinstance(node, FUNCTION) and not inside):
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import has no name here"
            found |= {(str(node.module), alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == PACKAGE.name}


def imported_modules(path: Path) -> set[str]:
    """First-level modules of the package that a file imports."""
    return {[*module.split("."), name][1] for module, name in imports_of(path)} - {""}


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


# What there may be at most. Bounds above what is wanted are today's numbers; what is wanted stands beside them.
BOUNDS = {
    "lines of src": 30_412,  # 19_500; 24_740, 700 with the levers, the fair arena, audits, origins, and serving
    "lines of paper": 2_000,
    "lines of rivals": 1_200,
    "lines of tests": 17_590,  # 11_000
    "lines of docs": 2_200,  # by hand
    "lines of a file": 350,
    "lines of a test file": 500,  # 350
    "lines of a function": 60,
    "parameters": 7,  # commands apart
    "names at the top": 18,
    "imports in a chain": 18,
    "modules in circles": 0,  # with imports inside functions
}


def lines_of(folder: Path, names: str = "**/*.py") -> list[int]:
    return [len(path.read_text().splitlines()) for path in folder.glob(names)]


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for path in PACKAGE.rglob("*.py") for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTION)]


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller may give; 0 of a command."""
    if any(ast.unparse(decorator).endswith(".command()") for decorator in function.decorator_list):
        return 0
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def module_graph(inside: bool) -> dict[str, set[str]]:
    """The modules that each one imports; a name that a package hands on lazily is imported from its own module."""
    paths = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    handed = {
        (package, alias.name): str(node.module)
        for package, path in modules.items()
        if "handed_on(" in path.read_text()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def imported(module: str, part: str) -> str:
        return handed.get((module, part)) or (f"{module}.{part}" if f"{module}.{part}" in modules else module)

    return {name: {imported(*one) for one in imports_of(path, inside)} - {name} for name, path in modules.items()}


def longest_chain(graph: dict[str, set[str]]) -> int:
    @functools.cache
    def below(module: str) -> int:
        return 1 + max(map(below, graph[module]), default=0)

    return max(map(below, graph))


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    def reached(module: str) -> set[str]:
        found: set[str] = set()
        left = set(graph[module])
        while left:
            found |= left
            left = {further for one in left for further in graph[one]} - found
        return found

    return {module for module in graph if module in reached(module)}


def test_the_house_stays_small() -> None:
    found = {
        "lines of src": sum(lines_of(PACKAGE)),
        "lines of paper": sum(lines_of(PACKAGE / "paper")),
        "lines of rivals": sum(lines_of(PACKAGE / "rivals")),
        "lines of tests": sum(lines_of(ROOT / "tests")),
        "lines of docs": sum(lines_of(ROOT, "*.md") + lines_of(ROOT / "docs", "*.md")),
        "lines of a file": max(lines_of(PACKAGE)),
        "lines of a test file": max(lines_of(ROOT / "tests")),
        "lines of a function": max(n.end_lineno - n.lineno + 1 for n in functions() if n.end_lineno),
        "parameters": max(map(parameters_of, functions())),
        "names at the top": len({name for name, _ in files_by_module()} - {"__main__"}),
        "imports in a chain": longest_chain(module_graph(inside=False)),
        "modules in circles": len(in_circles(module_graph(inside=True))),
    }
    assert {name: number for name, number in found.items() if number > BOUNDS[name]} == {}, f"of {found}"


def test_chains_and_circles_are_found() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}) == 3
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}


OPENING = """
import json, sys
for name in "pandas pyarrow scipy sklearn matplotlib typer jinja2 threadpoolctl rich".split():
    sys.modules[name] = None  # as if it were not installed: what imports it fails, and transformers leaves it out
import annotated_types, filelock, numpy, pydantic, safetensors.torch, tokenizers, torch, transformers
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


def test_what_uses_saved_artefacts_imports_seven_libraries_and_what_these_import(mini_run: Path) -> None:
    """That part lives inside serving engines."""
    cell = mini_run / "cells" / "addition-0"
    vector = next(iter(sorted((cell / "vectors").glob("to_generalized-*.safetensors"))))
    command = [sys.executable, "-c", OPENING + ALONE + LOADED + WITH_US + LOADED, str(mini_run), str(cell), str(vector)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(loaded) == 2
    assert loaded[1] - loaded[0] == {"mnemoscope"}
