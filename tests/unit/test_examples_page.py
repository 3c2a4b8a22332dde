"""examples/README.md tells of every example."""

from __future__ import annotations

import re

import pytest

from tests import examples_page as page

FILES = sorted(
    str(path.relative_to(page.FOLDER))
    for path in page.FOLDER.rglob("*")
    if path.suffix in (".py", ".ipynb") and "__pycache__" not in path.parts
)


@pytest.mark.parametrize("name", FILES)
def test_each_is_told_of(name: str) -> None:
    assert page.PAGE.count(f"[{name}]({name})") == 1
    path = page.FOLDER / name
    told = [c for c in page.commands() if f"examples/{name}" in c.split()]
    if name in (
        "options.py",
        *(f"frameworks/{n}_digits.py" for n in ("chainer", "mxnet", "paddle")),
    ):
        return
    assert len(told) == 1 and page.last_line(name)
    if path.suffix == ".py":  # its own words have such a command too
        assert f"mpidl run -n 2 examples/{name}" in path.read_text()
        assert f"mpidl run -n 2 examples/{name}" in told[0]


def test_nothing_is_told_of_that_is_not_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.PAGE)
    assert [link for link in links if not (page.FOLDER / link).exists()] == []
    found = [word for c in page.commands() for word in c.split() if word.startswith("examples/")]
    assert [f for f in found if not (page.FOLDER.parent / f).exists()] == []
    assert len(found) == len(page.commands()) == page.PAGE.count("\n```\n$ ")


def test_each_time_is_told() -> None:
    timed = re.findall(r"\d+ s\b", page.PAGE)
    assert len(timed) == len(page.commands())


def test_any_number_may_stand_for_another() -> None:
    page.check("digits_mlp.py", "x\ntest accuracy  7.5% on 1,359 digits never trained on\n")
    page.check("pytorch/synthetic.py", "total          1,234.5 +- 0.0 img/s")
    for other in (
        "",
        "test accuracy  7.5%",
        "strategy       ring\n",
        "test accuracy  98.05% on 359 D",
    ):
        with pytest.raises(AssertionError):
            page.check("digits_mlp.py", other)
