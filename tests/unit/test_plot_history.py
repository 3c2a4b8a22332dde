"""`mpidl.plot_history`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mpidl
from mpidl.errors import InvalidArgument, MpidlError


def history(rng: np.random.Generator, n: int) -> list[mpidl.Epoch]:
    return [
        mpidl.Epoch(i + 1, 10 * (i + 1), float(rng.uniform(0.5, 1)),
                    {"loss": float(rng.uniform()), "$x_": float(rng.uniform())}, 1.0,
                    float(rng.uniform(1e3, 1e4)))
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 7])
def test_it_draws_what_fit_returned(epochs: int, rng: np.random.Generator, tmp_path: Path) -> None:
    given = history(rng, epochs)
    figure = mpidl.plot_history(given, tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    loss, metric, rate = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in loss.get_lines()}
    np.testing.assert_allclose(lines["training"], [(e.epoch, e.loss) for e in given])
    np.testing.assert_allclose(lines["test"], [(e.epoch, e.metrics["loss"]) for e in given])
    np.testing.assert_allclose(metric.get_lines()[0].get_ydata(), [e.metrics["$x_"] for e in given])
    np.testing.assert_allclose(
        rate.get_lines()[0].get_ydata(), [e.samples_per_second for e in given]
    )
    labels = [panel.get_ylabel() for panel in figure.axes]
    assert labels == ["loss", "test $x_", "samples / s"]
    assert {panel.get_xlabel() for panel in figure.axes} == {"epoch"}


def test_wrong_arguments(rng: np.random.Generator, tmp_path: Path) -> None:
    given = history(rng, 2)
    for wrong in ([], None, "x", [1], given[0]):
        with pytest.raises(InvalidArgument, match=r"what Trainer\.fit returns"):
            mpidl.plot_history(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="mp3"):
        mpidl.plot_history(given, tmp_path / "x.mp3")
    with pytest.raises(MpidlError, match="cannot write"):
        mpidl.plot_history(given, tmp_path / "none" / "x.png")


def test_without_matplotlib(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MpidlError, match=r"pip install 'mpidl\[report\]'"):
        mpidl.plot_history(history(rng, 1))


def test_to_import_it_imports_no_matplotlib() -> None:
    code = "import sys, mpidl; mpidl.plot_history; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
