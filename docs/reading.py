"""What readers find, as a page: ``python docs/reading.py OUT... [--keep docs/results/reading.json]``.

Each OUT is a folder of ``benchmarks/origins.py``, after ``fit`` and ``carry``, whose name is that of the model. What is
kept are the JSON files of both.
"""

from __future__ import annotations

from collections.abc import Mapping

import printing
from printing import Found

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


def sections_of(runs: Mapping[str, Mapping[str, Found]]) -> printing.Sections:
    """Of each run what tells the document from memory, then classes, then the same readers elsewhere."""
    sections: dict[str, list[str | printing.Table]] = {}
    for name, run in runs.items():
        rows = [
            [said, area(run["fit"][key]), "" if key == "ours" else ahead(run["fit"][key])]
            for key, said in READERS.items()
        ]
        columns = [
            "what tells the document from memory",
            "AUROC (lower end of its 95 % interval)",
            "the reader is ahead by",
        ]
        sections[f"{name}, relations that were not fitted on"] = [printing.table(columns, rows)]
    columns = ["model", "document, memory, neither", "macro-F1", "calibration error", "swaps agree", "AUROC of tokens"]
    rows = [[name, *classes(run["fit"])] for name, run in runs.items()]
    sections["Three classes"] = ["Names of the question apart, which come from neither.", printing.table(columns, rows)]
    rows = [
        [name, where, *classes(run["carry"][where])[:3], area(run["carry"][where]["ours"])]
        for name, run in runs.items()
        for where in ("passages", "long")
    ]
    columns = ["model", "texts", *columns[1:4], "AUROC (lower end of its 95 % interval)"]
    sections["Elsewhere"] = [
        "The same readers on passages of nq_synth, and on long documents, of two thousand tokens.",
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


def published() -> str:
    """The page of what is published."""
    return printing.of_runs("reading", sections_of)


if __name__ == "__main__":
    printing.print_runs("reading", sections_of, ("fit", "carry"))
