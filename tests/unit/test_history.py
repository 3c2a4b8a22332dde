"""`History`: a list with another look; tables for notebooks."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from dataclasses import asdict
from html import unescape
from typing import TYPE_CHECKING

import pytest

import mpidl
from mpidl import Epoch, History, nn
from mpidl.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def epoch(number: int, **metrics: float) -> Epoch:
    return Epoch(number, 10 * number, 2 / number, metrics, 0.5, 2000.0)


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r)] for r in rows]


def test_it_is_the_list_it_was() -> None:
    epochs = [epoch(1), epoch(2, accuracy=0.75), epoch(3, accuracy=0.875)]
    history = History(epochs)
    assert history == epochs and epochs == history and history[-1] is epochs[-1]
    assert history[-1].metrics == {"accuracy": 0.875}
    assert type(history[1:]) is History and history[1:] == epochs[1:]
    assert type(history[::-1]) is History and list(history) == epochs
    for other in (pickle.loads(pickle.dumps(history)), copy.deepcopy(history)):
        assert type(other) is History and other == epochs


def test_how_it_looks() -> None:
    history = History([epoch(1, loss=2.5), epoch(2, loss=0.5, **{"<b>&": 0.25})])
    assert (
        repr(history)
        == "History(2 epochs: loss 2.0000 to 1.0000, test loss 0.5000, test <b>& 0.2500)"
    )
    assert repr(history[:1]) == "History(1 epoch: loss 2.0000, test loss 2.5000)"
    assert repr(history[:0]) == "History(0 epochs)"
    assert cells(history._repr_html_()) == [
        ["epoch", "steps", "loss", "test loss", "test <b>&", "seconds", "samples/s"],
        ["1", "10", "2.0000", "2.5000", "-", "0.50", "2,000"],
        ["2", "20", "1.0000", "0.5000", "0.2500", "0.50", "2,000"],
    ]
    assert "<b>" not in history._repr_html_()
    assert cells(History()._repr_html_()) == [["epoch", "steps", "loss", "seconds", "samples/s"]]


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    made = [epoch(1, accuracy=0.5), epoch(2, accuracy=0.75)]
    lines = [json.dumps(asdict(e)) for e in made]
    lines[1:1] = ['{"kind": "steps", "step": 12, "loss": 0.5}']
    lines[2] = json.dumps({"kind": "epoch", "phases": {}, **asdict(made[1])})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert History.read(tmp_path) == made and type(History.read(str(tmp_path))) is History

    again = [*made, epoch(2, accuracy=0.5)]  # made again: a rank had died
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(asdict(e)) + "\n" for e in again))
    assert History.read(tmp_path) == [again[0], again[2]]

    lost = {**asdict(made[0]), "loss": "nan", "metrics": {"loss": "inf"}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lost) + '\n{"kind": ')
    (found,) = History.read(tmp_path)
    assert math.isnan(found.loss) and found.metrics == {"loss": math.inf}


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"kind": "epoch", "loss": {}}'])
def test_what_is_no_run_folder(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*metrics"):
        History.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1: expected an epoch"):
        History.read(tmp_path)


class Odd(nn.Module):
    def __init__(self) -> None:
        self.blocks = {"<i>": nn.Linear(3, 2)}
        self.again = self.blocks["<i>"]
        self.scale = nn.Parameter(mpidl.tensor([1.0]).data)

    def arguments(self) -> str:
        return "a<b"


def test_models() -> None:
    assert cells(Odd()._repr_html_()) == [
        ["layer", "kind", "parameters"],
        ["model", "Odd(a<b)", "1"],
        ["blocks.<i>", "Linear(3, 2)", "8"],
        ["total", "", "9"],
    ]


def test_summaries() -> None:
    found = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).summary((1, 3))
    wanted = [
        re.split(r"  +", line.strip()) for line in str(found).splitlines() if "-" * 9 not in line
    ]
    shown = [[c.strip() for c in row if c] for row in cells(found._repr_html_())]
    assert shown == wanted[1:]
    assert "input (1, 3)" in found._repr_html_()
