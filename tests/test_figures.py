"""Every page that gives figures names a command that gives them; printed pages hold what was published."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from pages import PAGES as PRINTED

from mnemoscope.cli import app

ROOT = Path(__file__).parents[1]
WITHOUT = {"LOG.md", "SEEDS.md"}  # the log names commits, the other page says what was run when
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in WITHOUT)]
FIGURE = re.compile(
    r"(?<![\w./-])\d+\.\d+(?![\w.])"  # 0.93
    r"|(?<![\w./-])\d[\d,]*\xa0?\s?%"  # 93 %
    r"|(?<![\w./-])\d[\d,]*\xa0?\s(?:s|ms|min|h|seconds|minutes|hours|GiB|GB|MB|times)\b"
)
COMMAND = re.compile(
    r"(?:`|^)((?:mnemoscope|python|make) [^`\n]+|(?:docs|benchmarks|examples|tests|scripts)/[^`\s]+)(?:`|$)",
    flags=re.MULTILINE,
)
ON_PAPER = "Computed on paper"
# Numbers that are no measurements: versions, papers, the level of intervals.
NO_FIGURES = re.compile(r"arXiv\S* \d+\.\d+|(?:Python|vLLM) \d+\.\d+|version \d+\.\d+|95 % interval")


def figures(text: str) -> list[str]:
    """The figures of a text, outside of code and links."""
    prose = re.sub(r"^```.*?^```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    return FIGURE.findall(NO_FIGURES.sub("", prose))


def source(text: str) -> bool:
    """Whether a text names a command, or says that no machine was asked."""
    return bool(COMMAND.search(text)) or ON_PAPER in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_are_given_by_a_command_that_is_named(page: Path) -> None:
    """In the section of the figures, or in the first one of the page, which is about all of them."""
    first, *others = re.split(r"^(?=##+ )", page.read_text(), flags=re.MULTILINE)
    nameless = {part.splitlines()[0]: figures(part) for part in (first, *others) if not (source(first) or source(part))}
    assert not {heading: found for heading, found in nameless.items() if found}


def test_the_commands_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for line in COMMAND.findall(page.read_text()):
            first, *rest = shlex.split(line)
            if first == "mnemoscope":
                assert rest[0] in commands, f"{page.name}: {line}"
            elif first == "make":
                assert rest[0] in targets, f"{page.name}: {line}"
            elif first != "python" or rest[0] != "-m":
                assert (ROOT / (rest[0] if first == "python" else first)).exists(), f"{page.name}: {line}"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("STUDY", ["| `learned_steps` | `20` |", "| `stored` | `480` |"]),
        ("RECORDS", ["| `minus_control` | {str:", "## records/pairs.parquet: "]),
        ("ARENA", ["| smollm2, facts | generalized | low-rank "]),
        ("AUDIT", ["| called recited | 0.00 | 0.07 | 0.07 | 0.07 | 0.53 | 1.00 |", "| +0.028 (-0.005 to +0.066) |"]),
        (
            "READING",
            ["| a probe as AttriWiki's | 0.940 (0.917) | +0.038 (+0.023 to +0.055) |", "| 0.75 of 16 | 1.00 of 17 |"],
        ),
        ("GALLERY", ["| Moscow | Khartoum |", "## Of other kinds"]),
        ("REVIEW", ["| addition | 0.874 (0.85 to 0.89) | 0.599 | 0.602 |", "## 11: pretrained models, `gemma`"]),
        ("CLAIMS", ["| addition (paper) | 5 | 0.96 (0.93 to 1.00) (logistic, learned, nmd) | holds |"]),
        ("BENCHMARKS", ["| 1,000,000 | 930.2 | 1.109 | 1768.4 |"]),
    ],
)
def test_a_page_is_printed_with_its_figures(name: str, lines: list[str]) -> None:
    printed = PRINTED[name]()
    assert printed.startswith("# ")
    assert [line for line in lines if line not in printed] == []
    widths = [line.replace("\\|", "").count("|") for line in printed.splitlines() if line.startswith("|")]
    assert min(widths, default=3) >= 3


def test_the_table_of_the_readme_is_that_of_the_review() -> None:
    part = (ROOT / "README.md").read_text().split("## Does it work?")[1].split("## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    assert len(rows) >= 8
    assert [row for row in rows[2:] if row not in PRINTED["REVIEW"]().splitlines()] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It turns 0.93 of them.", ["0.93"]),
        ("It takes 12 min, 4 % more.", ["12 min", "4 %"]),
        ("`alpha` 0.5 of `--gate 0.4`", ["0.5"]),
        ("arXiv 2412.18497, Python 3.11, version 0.1, layer 12 of 30", []),
    ],
)
def test_what_a_figure_is(text: str, found: list[str]) -> None:
    assert figures(text) == found
