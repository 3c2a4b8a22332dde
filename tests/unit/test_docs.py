"""The site of docs/ is built without a warning, is whole, and fetches nothing from elsewhere."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

from mpidl.cli.app import app
from tests import job

PACKAGES = ["", "nn", "functional", "autograd", "optim", "data", "strategies", "codecs"]
PACKAGES += ["checkpoint", "errors", "testing", "torch", "jax", "keras", "tensorflow"]
DOCS = job.ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason='pip install ".[docs]"')
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "-f", ".mkdocs.yml", "-d", str(folder)]
    done = subprocess.run(  # strict: what it warns of is an error; but with -q it warns of nothing
        line,
        cwd=job.ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Assets(HTMLParser):
    """What a browser loads to show a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "link" and known.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(known["href"] or "")
        self.found += [str(known[name]) for name in ("src", "srcset", "data") if known.get(name)]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    assets = {asset for page in pages for asset in Assets(page).found}
    assert {asset for asset in assets if asset.endswith((".css", ".js"))}
    assert [asset for asset in assets if re.match(r"(\w+:)?//", asset)] == []
    styles = "".join(style.read_text() for style in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:\w+:)?//[^)\"']+", styles) == []


def public(package: str) -> list[str]:
    """Return what a module exports, without importing a framework."""
    path = job.ROOT / "mpidl" / package
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda name: name or "mpidl")
def test_every_public_name_is_told_of(package: str, site: Path) -> None:
    names = public(package) if package else public(".")
    assert names
    page = (site / "api" / f"{package or 'mpidl'}.html").read_text()
    told = {found.split(".")[-1] for found in re.findall(r'\bid="(mpidl\.[\w.]+)"', page)}
    told |= set(re.findall(r'<h2 id="mpidl\w+">mpidl[\w.]*\.(\w+)<', page))  # modules in a page
    missing = set(names) - told
    assert {name for name in missing if package or name not in PACKAGES} == set()


def test_comments_tell_of_attributes(site: Path) -> None:
    page = (site / "api/mpidl.html").read_text()
    section = page[page.index('id="mpidl.World.rank"') :]
    assert "<p>Number of this rank, from 0 on</p>" in section[:3000]


def test_every_command_and_option_is_told_of(site: Path) -> None:
    page = (site / "commands.html").read_text()

    def walk(command: object, words: str) -> None:
        for name, one in getattr(command, "commands", {}).items():
            walk(one, f"{words} {name}")
        if not hasattr(command, "commands"):
            section = page[page.index(f">{words}<") :]
            section = section[: section.index("</table>")]
            names = [name for one in command.params for name in one.opts if name[0] == "-"]  # type: ignore[attr-defined]
            assert [name for name in names if f"<code>{name}</code>" not in section] == [], words

    walk(typer.main.get_command(app), "mpidl")


def test_pages_lead_to_files_that_exist() -> None:
    """As they stand, where a code host shows them."""
    pages = [*DOCS.rglob("*.md"), *job.ROOT.glob("*.md"), *(job.ROOT / "examples").rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = re.findall(r"\]\((?!\w+:)([^)#\s]+)[)#]|(?:src|srcset)=\"([^\"]+)\"", text)
        found = [link for pair in links for link in pair if link]
        assert [link for link in found if not (page.parent / link).exists()] == [], page


def test_code_says_what_it_is() -> None:
    """Python is whole, and run by a test (tests/jobs/test_pages.py), or is called a fragment."""
    for page in DOCS.glob("*.md"):
        heads = re.findall(r"^```(python.*)$", page.read_text(), re.MULTILINE)
        assert set(heads) <= {"python", 'python title="fragment"'}, page


def test_figures_are_those_that_the_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "img"))
    make = importlib.import_module("make")
    for name in ("flow", "strategies", "memory", "nodes", "protocol"):
        drawn = getattr(make, name)().svg()
        assert (DOCS / f"img/{name}.svg").read_text() == drawn, "python docs/img/make.py"
        assert drawn.count("<text") > 10


def test_numbers_of_the_plots_are_those_told() -> None:
    plots = json.loads((DOCS / "img/figures.json").read_text())
    told = {name: (job.ROOT / name).read_text() for name in ("README.md", "docs/performance.md")}
    for plot in plots.values():
        assert {"command", "date", "machine", "title", "unit", "rows"} == set(plot)
        for _, low, high in plot["rows"]:
            number = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            assert [name for name, text in told.items() if number not in text] == [], number
