"""What the tests of the playground share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mnemoscope.auditing.origins import Reader
from mnemoscope.behaviour import Asking
from mnemoscope.interventions import Binding
from mnemoscope.study.stages import cell_model
from mnemoscope.web.app import build_app, server_of
from mnemoscope.web.cell import OpenedCell
from mnemoscope.web.runs import Runs

TOKEN = "token-of-the-tests"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}
CELL = "/api/runs/first/cells/addition-0"


def client_of(root: Path, host: str = "localhost") -> TestClient:
    """A program that knows the token; as a context it has one event loop for all requests, as a server has."""
    return TestClient(build_app(Runs(root), TOKEN), f"http://{host}", headers=KNOWN, raise_server_exceptions=False)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application that is served as the command serves it."""
    server = server_of(app)
    server.config.port = 0
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def error_of(response: Any, status: int = 422) -> tuple[str, str]:
    """Field and message of a request that is refused."""
    assert response.status_code == status, response.text
    return response.json()["error"]["field"], response.json()["error"]["message"]


def random_reader(run: Path) -> tuple[Reader, Asking]:
    """A reader of chance in the folder of a run, and the model that it reads."""
    asking, rng = cell_model(OpenedCell(run, "addition-0").cell), np.random.default_rng(0)
    width = asking.model.config.n_embd
    made = {"prompting": asking.prompting, "binding": Binding.of(asking.model, asking.tokenizer)}
    weights = rng.normal(size=(3, 2 * width + 2)), np.zeros(3), np.zeros(width), np.eye(width) * 1e-6
    reader = Reader([1], *weights, "{document} {question}", "{question}", **made)
    reader.save(run / "reader.safetensors")
    return reader, asking
