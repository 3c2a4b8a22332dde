"""What the site has beside the pages of docs/ (.mkdocs.yml names this file).

- Pages link to files of the repository, `../examples/digits_mlp.py`, as a code host shows them.
  Each such file becomes a page of the site, below source/, and the links lead there.
- `<!-- commands -->` in commands.md becomes the reference of the command line.
- A figure `![what it shows](img/name.svg)` is put into the page itself: its lines then have the
  colour of the text, in a light and in a dark page.
"""

from __future__ import annotations

import inspect
import os
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import typer
from mkdocs.structure.files import File

from mpidl.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
FIGURE = re.compile(r"^!\[([^]]*)\]\((img/[\w-]+\.svg)\)$", re.MULTILINE)
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".toml": "toml"}
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")  # in the navigation


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file of the repository that a page links to."""
    root = Path(config.config_file_path).parent
    pages = [Path("docs", file.src_uri) for file in files.documentation_pages()]
    pages += map(Path, ALWAYS)
    seen = set(pages)
    for page in pages:  # grows
        if page.parts[0] != "docs":
            text = (root / page).read_text()
            if page.suffix != ".md":
                language = LANGUAGES.get(page.suffix, "text")
                text = f"# {page}\n\n````{language}\n{text}````\n"
            files.append(File.generated(config, _uri(page), content=text))
        if page.suffix == ".md":
            targets = {target for _, target in _linked(root, page, (root / page).read_text())}
            pages += sorted(targets - seen)
            seen |= targets
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to pages of the site; put in figures, and the commands."""
    root = Path(config.config_file_path).parent
    uri = Path(page.file.src_uri)
    own = uri.relative_to("source") if uri.parts[0] == "source" else "docs" / uri
    if own.suffix == ".md":
        for link, target in dict(_linked(root, own, markdown)).items():
            other = os.path.relpath(_uri(target), uri.parent)
            markdown = markdown.replace(f"]({link}", f"]({other}")
    markdown = FIGURE.sub(lambda found: _figure(root / "docs" / found[2], found[1]), markdown)
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n".join(commands()))
    return markdown


def _linked(root: Path, page: Path, text: str) -> Iterator[tuple[str, Path]]:
    """Yield the links of a page of the repository that need another address, and their files."""
    for link in LINK.findall(text):
        path = Path(os.path.normpath(page.parent / link))
        if (root / path).is_dir():
            path /= "README.md"
        here = path.parts[0] == "docs" and page.parts[0] == "docs"
        if path.parts[0] != ".." and (root / path).is_file() and not here:
            yield link, path


def _uri(path: Path) -> str:
    """Return the place of a file of the repository among the pages of the site."""
    if path.parts[0] == "docs":
        return str(path.relative_to("docs"))
    return f"source/{path}" if path.suffix == ".md" else f"source/{path}.md"


def _figure(path: Path, told: str) -> str:
    """Return the figure as part of a page, whose style sheet gives it its colour."""
    text = re.sub(r"<style.*?</style>\s*", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", "", text)  # one line: Markdown leaves it alone
    return text.replace("<svg ", f'<svg role="img" aria-label="{told}" ', 1)


def commands() -> Iterator[str]:
    """Yield the reference of the command line, lines of Markdown, as typer knows it."""
    yield from _command(typer.main.get_command(app), ("mpidl",))


def _command(command: Any, words: tuple[str, ...]) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is not None:
        for name in sorted(children):
            yield from _command(children[name], (*words, name))
        return
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join([*words, "[OPTIONS]", *(one.metavar or one.name.upper() for one in arguments)])
    yield from (f"## {' '.join(words)}", "", f"```\n{usage}\n```", "", *_help(command), "")
    yield from ("| option | | default |", "|---|---|---|")
    known = get_type_hints(command.callback)
    yield from (_option(option, known.get(option.name)) for option in options)
    yield ""


def _help(command: Any) -> Iterator[str]:
    """Yield the help; the lines of its examples, which begin with the command, as code."""
    for line in inspect.cleandoc(command.help or "").split("\n"):
        found = re.match(r"(.*?)(mpidl [a-z]+ .*)$", line)
        is_example = found and (not found[1] or found[1].endswith(": "))
        yield f"{found[1]}`{found[2]}`" if found and is_example else line


def _option(option: Any, kind: Any) -> str:
    """Return a line of a table: names and value, what it does, the default."""
    bar = r"\|"  # within a cell
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if not option.is_flag:
        kinds = [one for one in (kind, *get_args(kind)) if isinstance(one, type)]
        values = [str(member.value) for one in kinds if issubclass(one, Enum) for member in one]
        names += f" `{option.metavar or '|'.join(values) or option.name.upper()}`"
    known = getattr(option.default, "value", option.default)
    default = "" if known in (None, "", False, ()) or known == [] else f"`{known}`"
    default = "must be given" if option.required else default
    cells = (names, option.help or "", default)
    return "".join(f"| {cell.replace('|', bar)} " for cell in cells) + "|"
