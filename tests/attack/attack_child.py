"""Runs many commands one after the other in this process, each in its folder; reads and writes JSON, a line each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback


def run_one(folder: str, arguments: list[str]) -> dict[str, object]:
    """Exit code, output and processor seconds of one command."""
    from mnemoscope.cli import main

    os.chdir(folder)
    sys.argv = ["mnemoscope", *(os.fsdecode(bytes.fromhex(argument)) for argument in arguments)]
    stdout, stderr, began, code = io.StringIO(), io.StringIO(), time.process_time(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
            code = 70
    return {"code": code, "stderr": stderr.getvalue(), "seconds": time.process_time() - began}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run_one(*json.loads(line))), file=answers, flush=True)
