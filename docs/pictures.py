"""Take screenshots of every page of the playground: wide and light, narrow and dark. ``docs/pictures`` has two of them.

    python docs/pictures.py RUN CELL FOLDER

Needs Debian's Chromium, or the one that Playwright installs.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from mnemoscope.web.app import build_app
from mnemoscope.web.runs import Runs

SIZES = {"wide": (1280, 860, "light"), "phone": (400, 780, "dark")}
TOKEN = "shown-in-no-picture"


def main() -> None:
    """Take all of them, and those of the report and of the page that asks for the token."""
    run, cell, folder = Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3]).resolve()
    folder.mkdir(exist_ok=True)
    with sync_playwright() as play, tempfile.TemporaryDirectory() as nothing:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        os.chdir(nothing)
        address, empty = _served(run.parent, run.name), _served(Path("runs"), None)
        pages: dict[str, tuple[str, Callable[[Any], None]]] = {
            "playground": (f"{address}/?run={run.name}&cell={cell}", _steered),
            "neurons": (f"{address}/neurons?run={run.name}&cell={cell}", _shown),
            "runs": (f"{address}/runs", lambda tab: None),
            "report": (f"{address}/runs/{run.name}/report", lambda tab: None),
            "nothing": (f"{empty}/?token={TOKEN}", lambda tab: None),
            "error": (f"{address}/?run=missing", lambda tab: None),
        }
        for size, (width, height, scheme) in SIZES.items():
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(address)
            _photograph(tab, folder / f"token-{size}.png")
            tab.goto(f"{address}/?token={TOKEN}")
            for name, (place, act) in pages.items():
                tab.goto(place)
                act(tab)
                # A report is long; of the other pages all is shown.
                _photograph(tab, folder / f"{name}-{size}.png", full_page=name != "report")
            tab.close()
        browser.close()


def _photograph(tab: Any, path: Path, full_page: bool = True) -> None:
    """A picture of 64 colours, which these pages do with: a third of the bytes."""
    picture = Image.open(BytesIO(tab.screenshot(full_page=full_page))).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _served(root: Path, first: str | None) -> str:
    server = uvicorn.Server(uvicorn.Config(build_app(Runs(root), TOKEN, first), port=0, log_level="error"))
    Thread(target=server.run, daemon=True).start()
    while not server.started:
        pass
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def _steered(tab: Any) -> None:
    """Of the run's questions the first that is remembered unsteered, and worked out when it is steered."""
    expect(tab.locator("#plain:not(.waiting) .said")).not_to_be_empty(timeout=60_000)
    for question in range(tab.locator("#example option").count()):
        tab.locator("#example").select_option(index=question)
        expect(tab.locator(".waiting")).to_have_count(0)
        tab.locator("#slider").fill("1")
        expect(tab.locator(".waiting")).to_have_count(0)
        if tab.locator("#plain.is-memorized").count() and tab.locator("#steered.is-generalized").count():
            break
    else:
        raise SystemExit("RUN: none of its questions is remembered, and worked out when it is steered")
    tab.locator("#finer summary").click()


def _shown(tab: Any) -> None:
    expect(tab.locator("#pointed")).to_contain_text("Layer", timeout=60_000)
    tab.locator("#canvas").focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("#found svg")).to_be_visible(timeout=60_000)


if __name__ == "__main__":
    main()
