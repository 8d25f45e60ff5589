"""Pages of what readers and audits find: ``python docs/judged.py reading OUT... [--keep docs/results/reading.json]``.

Each OUT is a folder of ``benchmarks/origins.py``, after ``fit`` and ``carry``, or of ``benchmarks/planted.py``.
What is kept are their JSON files, by the names of the folders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import printing

Found = Mapping[str, Any]
READERS = {
    "ours": "the reader, in the pass that writes",
    "two passes": "two passes, with the document and without",
    "copied": "the name stands in the document",
    "attriwiki": "a probe as AttriWiki's",
    "attention": "attention to the document",
    "entropy": "entropy of the token",
    "logp": "log probability of the token",
    "the input": "embeddings of the input alone",
}
MEASURES = {"score": "ours", "sooner": "ours, costs alone", "min-k": "Min-K%", "min-k++": "Min-K%++"}
TIMES = ("1", "2", "4", "8", "16")
FILES = {"reading": ("fit", "carry"), "audit": ("planted",)}


def reading(runs: Mapping[str, Mapping[str, Found]]) -> printing.Sections:
    """Of each run what tells the document from memory, then classes, then the same readers elsewhere."""
    sections: dict[str, list[str | printing.Table]] = {}
    for name, run in runs.items():
        rows = [
            [said, area(run["fit"][key]), "" if key == "ours" else ahead(run["fit"][key])]
            for key, said in READERS.items()
        ]
        columns = ["what tells the document from memory", "AUROC (from)", "the reader is ahead by"]
        sections[f"{name}, relations that were not fitted on"] = [printing.table(columns, rows)]
    columns = ["model", "document, memory, neither", "macro-F1", "calibration error", "swaps agree", "AUROC of tokens"]
    rows = [[name, *classes(run["fit"])] for name, run in runs.items()]
    sections["Three classes"] = ["Names of the question apart, which come from neither.", printing.table(columns, rows)]
    rows = [
        [name, where, *classes(run["carry"][where])[:3], area(run["carry"][where]["ours"])]
        for name, run in runs.items()
        for where in ("passages", "long")
    ]
    columns = ["model", "texts", *columns[1:4], "AUROC (from)"]
    sections["Elsewhere"] = [
        "The same readers on passages of a search engine's questions, and on documents of two thousand tokens.",
        printing.table(columns, rows),
    ]
    rows = [[name, *written(run["carry"]["written again"])] for name, run in runs.items()]
    columns = ["model", "flagged names that follow the document then", "the document's that stay", "nats a token more"]
    sections["Written again"] = [
        "Conflicts, where P(memory) of a name is at least 0.5; nats are of what is no name.",
        printing.table(columns, rows),
    ]
    return sections


def area(of: Found) -> str:
    """An area and the lower end of its 95 % interval."""
    return f"{of['auroc']:.3f} ({of['low']:.3f})"


def ahead(of: Found) -> str:
    """A lead with its interval."""
    return f"{of['ours ahead']:+.3f} ({of['from']:+.3f} to {of['to']:+.3f})"


def classes(of: Found) -> list[str]:
    """Of a set of texts: names of each origin, figures without those of the question, how swaps agree, tokens."""
    rest = of["without those of the question"]
    names = ", ".join(str(rest["spans"].get(origin, 0)) for origin in ("document", "memory", "neither"))
    figures = [f"{rest[one]:.2f}" for one in ("macro F1", "calibration error")]
    return [names, *figures, f"{of['swaps agree']:.2f} of {of['of']}", f"{of['by token']['auroc']:.3f}"]


def written(of: Found) -> list[str]:
    """What was written again."""
    shares = [
        f"{of[share]:.2f} of {of[n]}" for share, n in (("flagged follow", "flagged"), ("document's kept", "document's"))
    ]
    return [*shares, f"{of['nats a token more']:+.3f}"]


def audit(runs: Mapping[str, Mapping[str, Found]]) -> printing.Sections:
    """Of each run AUROC by how often items were taught, and who is accused."""
    sections: dict[str, list[str | printing.Table]] = {}
    for name, run in runs.items():
        compared = run["planted"]["planted, compared"]
        rows = [
            [MEASURES.get(measure, measure), *(f"{of[f'{n} times']:.2f}" for n in TIMES), *told(measure, of)]
            for measure, of in compared.items()
        ]
        columns = ["measure", *(f"{n} times" for n in TIMES), "4 and more", "found at 1 % false", "ours is ahead by"]
        accused = [
            [checkpoint, *(f"{run['planted'][f'{checkpoint} answers']['accused'][n]:.2f}" for n in ("0", *TIMES))]
            for checkpoint in ("planted", "twin")
        ]
        sections[name] = [
            printing.table(columns, rows),
            "Share that is called recited, of the checkpoint and of its twin, by how often an item was taught:",
            printing.table(["checkpoint", "never", *TIMES], accused),
        ]
    return sections


def told(measure: str, of: Found) -> list[str]:
    """Items that were taught often, by a measure, and how much ours is ahead."""
    lead = f"{of['ours ahead by']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f})"
    return [f"{of['often']:.3f}", f"{of['found at 1 % false']:.2f}", "" if measure == "score" else lead]


def published(name: str) -> str:
    """The page of what is published."""
    runs = json.loads((printing.FOLDER / "results" / f"{name}.json").read_text())
    return printing.page(name, {"reading": reading, "audit": audit}[name](runs))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(FILES))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the runs for the site")
    asked = parser.parse_args()
    runs = {
        run.name: {file: json.loads((run / f"{file}.json").read_text()) for file in FILES[asked.name]}
        for run in asked.runs
    }
    print(printing.page(asked.name, {"reading": reading, "audit": audit}[asked.name](runs)))
    if asked.keep is not None:
        lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]
        asked.keep.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
