"""What the tests of the playground share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from mnemoscope.web.app import build_app
from mnemoscope.web.cell import OpenedCell

TOKEN = "token-of-the-tests"
CELL = "/api/runs/first/cells/addition-0"


def client_of(root: Path, host: str = "localhost") -> TestClient:
    """A program that knows the token; as a context it has one event loop for all requests, as a server has."""
    known = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(build_app(root, TOKEN), f"http://{host}", headers=known, raise_server_exceptions=False)


def error_of(response: Any, status: int = 422) -> tuple[str, str]:
    """Field and message of a request that is refused."""
    assert response.status_code == status, response.text
    return response.json()["error"]["field"], response.json()["error"]["message"]


def in_thread_of_cell(client: TestClient, work: Callable[[OpenedCell], Any], run: str = "first") -> Any:
    """A future of work that queues among the requests to a cell."""
    opened = client.app.state.opened  # type: ignore[attr-defined]
    assert client.portal is not None
    return client.portal.start_task_soon(opened.ask, run, "addition-0", work)
