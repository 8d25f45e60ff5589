"""The pages of the site that are printed: ``python docs/pages.py ARENA``.

STUDY and RECORDS are printed from the code, ARENA from what ``mnemoscope arena`` wrote, the others from their tables.
"""

from __future__ import annotations

import sys
from functools import partial

import arena
import audit
import printing
import reading
import records
import study

PAGES = {
    "STUDY": study.page,
    "RECORDS": records.page,
    "ARENA": arena.published,
    "AUDIT": audit.published,
    "READING": reading.published,
    "GALLERY": partial(printing.page, "gallery"),
    "REVIEW": partial(printing.page, "review"),
    "CLAIMS": partial(printing.page, "claims"),
    "BENCHMARKS": partial(printing.page, "benchmarks"),
}

if __name__ == "__main__":
    print(PAGES[sys.argv[1]]())
