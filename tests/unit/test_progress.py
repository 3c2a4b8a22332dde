"""Progress on standard error: lines, a bar, or nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mpidl import meter, progress
from mpidl.clock import WAIT
from mpidl.loss_sum import LossSum
from mpidl.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands at 100 s until a test sets `now`; a quarter of it is waiting."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: made.now))
    phases = [0.75, 0.0, 0.25, 0.0, 0.0, 0.0]
    assert phases[WAIT] == 0.25
    monkeypatch.setattr(meter.clock, "read", lambda: [made.now * share for share in phases])
    return made


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIDL_TERMINAL", raising=False)


def test_a_log_file_gets_a_line_every_few_seconds(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = LossSum()
    meter = Meter(10, lambda: losses)
    with progress.make(meter, shown=True) as shown:
        for clock.now in (102.0, 104.0, 106.0, 108.0):  # of these, 106 is the first past 5 s
            losses.add(np.array(clock.now - 100), 300, 0)
            shown.step(600)
        shown.line("epoch 1 of 1: loss 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    first = "step 3 of 10, loss 4.0000, 300 samples/s, 25% waiting, 0:14 left"
    assert err == f"{first}\nepoch 1 of 1: loss 0.5\n"


def test_lines_of_large_rates_have_separators(
    clock: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    meter = Meter(2)
    with progress.make(meter, shown=True) as shown:
        for clock.now in (101.0, 102.0):
            shown.step(1_234_567)
    rate = "1,234,567 samples/s, 25% waiting, "
    lines = f"step 1 of 2, {rate}0:01 left", f"step 2 of 2, {rate}0:00 left"
    assert capsys.readouterr().err.splitlines() == [*lines]


def test_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_TERMINAL", "80")
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    meter = Meter(2)
    with progress.make(meter, shown=False) as shown:
        shown.step(8)
        shown.line("epoch 1")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return a function that fits with a bar, and returns what it wrote to standard error."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPIDL_TERMINAL", "100")
    monkeypatch.setenv("TERM", "xterm")

    def run(text: str, steps: int = 3) -> str:
        meter = Meter(steps)
        with progress.make(meter, shown=True) as shown:
            for _ in range(steps):
                shown.step(8)
            shown.line(text)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


def test_a_terminal_behind_the_launcher_gets_a_bar(bar) -> None:
    shown = bar("epoch 1 of 1: loss 0.5")
    assert "\x1b[" in shown
    assert "3/3" in shown
    assert "samples/s" in shown
    assert "epoch 1 of 1: loss 0.5" in shown


@pytest.mark.parametrize("text", ["top[5] 0.9", "loss [/] 0.5", "loss [bold]0.5", "ratio a:x:b"])
def test_a_bar_shows_text_as_it_is(bar, text: str) -> None:
    """Names of metrics are the user's."""
    assert text in bar(text)


def test_a_bar_goes_away_after_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIDL_TERMINAL", "100")
    with pytest.raises(ValueError, match="inside"), progress.make(Meter(3), shown=True):
        raise ValueError("inside")
    assert capsys.readouterr().err.endswith("\x1b[?25h")  # the cursor is shown again
