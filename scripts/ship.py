"""Fit the edits that ship for SmolLM2, as `mnemoscope.ready` opens them: capitals and everyday facts, low-rank edits.

python scripts/ship.py OUT    minutes; OUT holds the whole run, src/mnemoscope/face/shipped/smollm2 what of it ships
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import mnemoscope as ms
from mnemoscope.face.ready import SHIPPED
from mnemoscope.runs.digests import write_marker

EXAMPLES = Path(__file__).parents[1] / "examples"


def main(out: Path) -> None:
    """Fit, then copy what is needed to steer."""
    out.mkdir(parents=True, exist_ok=True)
    written = [line for name in ("capitals", "everyday") for line in runpy.run_path(f"{EXAMPLES / name}.py")["lines"]()]
    (out / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    fitted = ms.fit(
        "smollm2", None, out / "known.jsonl", out=out / "run", levers=("low-rank",), threads=1, progress=True
    )
    print(fitted.summary())
    ship(out / "run" / "cells" / "known-0", SHIPPED / "smollm2")


def ship(cell: Path, folder: Path) -> None:
    """Copy the vectors of a cell and what says how they are used, without names of folders of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    facts = json.loads((cell / "cell.json").read_text())
    facts["options"]["file"] = Path(facts["options"]["file"]).name
    kept = folder / "cells" / cell.name
    shutil.copytree(cell / "vectors", kept / "vectors")
    (kept / "records").mkdir()
    shutil.copy(cell / "records" / "chosen.json", kept / "records")
    (kept / "cell.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_marker(kept, "steering", sorted(path for path in kept.rglob("*") if path.is_file()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
