"""What is shown of how far a run is."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import pytest
from rich.progress import Progress as Bars

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.telling import shown


def test_off_a_terminal_each_tenth_of_a_stage_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[object, ...]] = []
    for asked in (False, None, lambda *what: seen.append(what), True):
        with shown(asked) as tell:
            for n in range(31):
                tell("mine-0", "steering", n, 30, "trying")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (11 if asked is True else 0)
    assert lines[3] == "mine-0  steering    30 %  trying"
    assert seen == [("mine-0", "steering", n, 30, "trying") for n in range(31)]


@pytest.mark.parametrize("wrong", ["yes", 1, []])
def test_what_cannot_tell_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"progress: .*; give True"), shown(wrong):
        pass


@pytest.mark.parametrize(("slow", "since"), [(1, 0), (5, 20), (4, 60), (0.2, 20)])
def test_what_is_left_follows_the_pace_of_the_present_stage(
    slow: float, since: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 100 minutes by its shares, of which those after ``since`` take ``slow`` times as long."""
    now, passed = [0.0], [60 * (min(n, since) + slow * max(0, n - since)) for n in range(101)]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checked = 0
    with shown(True, {"pairs": 0.2, "steering": 0.8}) as tell:
        for n, now[0] in enumerate(passed):
            tell("mine-0", *(("pairs", n, 20) if n <= 20 else ("steering", n - 20, 80)), "")
            said = re.search(r"about (\d+) (s|min) left", capsys.readouterr().err)
            if said and n >= (since + 100) / 2:
                left = int(said[1]) * (60 if said[2] == "min" else 1)
                assert left == pytest.approx(passed[-1] - now[0], rel=0.2, abs=30), "rounded to minutes"
                checked += 1
    assert checked >= 2


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
