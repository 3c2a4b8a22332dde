"""What users see; that all of it has docstrings is ruff's to check."""

from __future__ import annotations

import importlib
import pickle
from importlib.metadata import version

import pytest

import mpidl
from mpidl import errors

PACKAGES = ["mpidl", *(f"mpidl.{name}" for name in ("autograd", "data", "nn", "optim"))]
PACKAGES += ["mpidl.strategies"]
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_exist_once_and_in_order(package: str) -> None:
    module = importlib.import_module(package)
    names = module.__all__
    assert [n for n in names if not hasattr(module, n)] == []
    assert len(set(names)) == len(names)


def test_star_import_gives_what_is_listed() -> None:
    names: dict[str, object] = {}
    exec("from mpidl import *", names)
    assert set(mpidl.__all__) == set(names) - {"__builtins__"}


def test_the_version_is_that_of_the_installed_package() -> None:
    assert mpidl.__version__ == version("mpidl")


def test_errors_have_one_base() -> None:
    assert len(ERRORS) > 5
    assert [kind for kind in ERRORS if not issubclass(kind, errors.MpidlError)] == []


@pytest.mark.parametrize("kind", ERRORS, ids=lambda k: k.__name__)
def test_errors_survive_pickling(kind: type[errors.MpidlError]) -> None:
    """Ranks send each other their errors."""
    error = kind("rank 1: 3 [of 4] \N{SNOWMAN}")
    error.collective = True
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "rank 1: 3 [of 4] \N{SNOWMAN}"
    assert copy.collective
    assert not kind("another").collective
