"""What a run folder holds, as a page of the site: the columns of its tables and the keys of its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from printing import head, lines_of, table

from mnemoscope.report.page import explained
from mnemoscope.report.records import declared_tables

RESULTS = """## results.json

R is `{estimate, low, high, n, groups}`: a number with its 95 % interval and what it counts. The file has `schema`,
`study`, `failed` (why a cell could not go on), `seeds`, `transfer` and `tasks`. A task has the other keys below; its
`seeds`, `aim` (what its vectors are for), `memory_is_conflict`, `documents` and `weights` (of a packaged model); of a
fit `levers` (by direction the best method), `left_out` (what cannot be had here, and why) and `judged` (splits);
`chosen_by_seed`, the best methods; and `per_seed`, the same keys of each seed. `mnemoscope.report.rows.table` gives
all estimates as one long table.
"""


def page() -> str:
    """The page."""
    return "\n".join(parts())


def parts() -> Iterator[str]:
    """Tables, then the keys of the results."""
    yield head("records")
    for name, declared in declared_tables().items():
        when = f" ({declared['if']})" if "if" in declared else ""
        yield f"## records/{name}.parquet: {declared['about']}{when}\n"
        yield meanings("column", declared["columns"])
        yield f"{declared['note']}\n" if "note" in declared else ""
    yield RESULTS
    stories = explained().values()
    yield meanings("key", {f"`{key}`": of for story in stories for key, of in story["results"].items()})
    for name, part in (part for story in stories for part in story.get("parts", {}).items()):
        yield f"### {name}\n\n{part['about']}\n"
        yield meanings("key", {f"`{key}`": of for key, of in part["keys"].items()})


def meanings(head: str, of: Mapping[str, object]) -> str:
    """A table of names and what they mean."""
    rows = ((name, str(text).replace("\n", " ").strip()) for name, text in of.items())
    return lines_of(table((head, "meaning"), rows)) + "\n"
