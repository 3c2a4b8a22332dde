"""`mpidl copy`: the files for users that travel inside the wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

import mpidl
from mpidl.errors import InvalidArgument

FOLDERS = ("examples", "launch")


def root() -> Path:
    """Return the folder that holds `examples` and `launch`: in a wheel, or in a checkout."""
    package = Path(mpidl.__file__).parent
    return package / "share" if (package / "share").is_dir() else package.parent


def available() -> list[str]:
    """Return the files there are, such as "examples/digits_mlp.py"."""
    files = (p for folder in FOLDERS for p in (root() / folder).rglob("*") if p.is_file())
    return sorted(str(p.relative_to(root())) for p in files if "__pycache__" not in p.parts)


def copy(name: str, to: Path) -> list[Path]:
    """Copy one file, or a folder, to the same place below `to`. Returns what was written.

    A file brings the examples' common `options.py` along. Raises InvalidArgument for an unknown
    name, or rather than write over a file.
    """
    chosen = [f for f in available() if f == name or f.startswith(name.rstrip("/") + "/")]
    if not chosen:
        raise InvalidArgument(f"no {name!r} to copy; there are: {', '.join(available())}")
    if name.startswith("examples/") and not (to / "examples/options.py").exists():
        chosen = sorted({*chosen, "examples/options.py"})
    existing = [str(to / f) for f in chosen if (to / f).exists()]
    if existing:
        raise InvalidArgument(f"already there, not written over: {', '.join(existing)}")
    for file in chosen:
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root() / file, to / file)
    return [to / file for file in chosen]
