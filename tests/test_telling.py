"""What is shown of how far a run is."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from rich.progress import Progress as Bars

from mnemoscope.errors import InputError
from mnemoscope.telling import shown


def test_off_a_terminal_each_tenth_of_a_stage_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True) as tell:
        for n in range(31):
            tell("mine-0", "steering", n, 30, "trying")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[3] == "mine-0  steering    30 %  trying"


@pytest.mark.parametrize("nothing", [False, None])
def test_nothing_is_shown_where_it_is_not_asked_for(nothing: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(nothing) as tell:
        tell("mine-0", "steering", 1, 2, "trying")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", ["yes", 1, []])
def test_what_cannot_tell_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"progress: .*; give True"), shown(wrong):
        pass


def test_a_callable_is_called_as_it_is() -> None:
    seen: list[tuple[object, ...]] = []
    with shown(lambda *what: seen.append(what)) as tell:
        tell("mine-0", "steering", 1.5, 2, "trying")
    assert seen == [("mine-0", "steering", 1.5, 2, "trying")]


def test_what_is_left_is_told_from_the_shares_of_stages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 50.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with shown(True, {"pairs": 0.5, "steering": 0.5}) as tell:
        tell("mine-0", "pairs", 1, 1, "")  # a half in 50 s
    assert capsys.readouterr().err == "mine-0  pairs      100 %  ; about 50 s left\n"


def test_on_a_terminal_every_cell_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shares: dict[str, float] = {}
    update = Bars.update

    def seen(self: Bars, task: int, **fields: object) -> None:
        update(self, task, **fields)  # type: ignore[arg-type]
        shares[self.tasks[task].description] = self.tasks[task].completed

    monkeypatch.setattr(Bars, "update", seen)
    with shown(True) as tell:
        tell("a-0", "train", 1, 4, "")
        tell("b-0", "pairs", 1, 2, "")
    assert shares == {"a-0 train": 0.25, "b-0 pairs": 0.5}
