"""What docstrings show is what happens."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tests import job

PACKAGE = job.ROOT / "mpidl"
SHOWING = [file for file in sorted(PACKAGE.rglob("*.py")) if ">>> " in file.read_text()]


@pytest.mark.parametrize("file", SHOWING, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_examples_in_docstrings_are_true(file: Path) -> None:
    name = ".".join(file.relative_to(job.ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


def test_there_are_some() -> None:
    assert len(SHOWING) >= 4
