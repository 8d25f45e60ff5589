"""The table in docs/ARCHITECTURE.md is the law: who may import whom."""

from __future__ import annotations

import ast
import re
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
        if module in ("report", "statistics", "contrast", "probes", "config", "tasks"):
            assert not re.search(r"^\s*(import|from) (torch|transformers)\b", path.read_text(), flags=re.MULTILINE), (
                path
            )


def test_only_two_files_hang_hooks_into_models() -> None:
    hooking = {p.relative_to(PACKAGE).as_posix() for _, p in files_by_module() if "register_forward" in p.read_text()}
    assert hooking == {"behaviour/states.py", "steering/hooks.py"}


def test_the_table_has_no_circle() -> None:
    left = {name: imports - {name} for name, imports in allowed_imports().items() if name not in ("cli", "__main__")}
    while left:
        ground = {name for name, imports in left.items() if not imports & set(left)}
        assert ground, f"these import each other in a circle: {sorted(left)}"
        left = {name: imports for name, imports in left.items() if name not in ground}
