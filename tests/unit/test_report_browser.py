"""The page of `mpidl report` in a real browser: wide and narrow, light and dark, on paper.

Chromium without a window; skipped where it is not installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl.report.page import page
from mpidl.report.run import Run
from tests.unit.run_folders import make

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=5000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
PHONE, SCREEN = 360, 1280  # pixels
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

#: Told of a page in a frame: what is wider than it, texts of figures that touch each other or leave
#: their figure, the smallest text, and the colours of texts with that of the page.
MEASURE = """
addEventListener("load", () => {
  const wide = [], touching = [], outside = [], colours = new Set();
  let smallest = 99;
  for (const one of document.body.querySelectorAll("*")) {
    const box = one.getBoundingClientRect();
    if (!one.closest(".wide, svg") && box.right > innerWidth + 0.5)
      wide.push(one.outerHTML.slice(0, 80));
    if (one.closest("svg") || !one.innerText) continue;
    const style = getComputedStyle(one);
    colours.add(style.color);
    if (box.height) smallest = Math.min(smallest, parseFloat(style.fontSize));
  }
  for (const plot of document.querySelectorAll("svg.plot")) {
    const around = plot.getBoundingClientRect();
    const boxes = [...plot.querySelectorAll("text")].map(text => {
      const scale = around.width / plot.viewBox.baseVal.width, style = getComputedStyle(text);
      smallest = Math.min(smallest, scale * parseFloat(style.fontSize));
      colours.add(style.fill);
      return [text.getBoundingClientRect(), text.textContent];
    });
    boxes.forEach(([a, name], i) => {
      if (a.left < around.left - 1 || a.right > around.right + 1 || a.top < around.top - 1 ||
          a.bottom > around.bottom + 1) outside.push(name);
      for (const [b, other] of boxes.slice(0, i))
        if (a.left < b.right - 1 && b.left < a.right - 1 &&
            a.top < b.bottom - 1 && b.top < a.bottom - 1)
          touching.push(name + " and " + other);
    });
  }
  const paper = getComputedStyle(document.body).backgroundColor;
  const width = document.documentElement.scrollWidth;
  const plots = document.querySelectorAll(".plot").length;
  const found = {width, wide, touching, outside, smallest, colours: [...colours], paper, plots};
  parent.postMessage(JSON.stringify(found), "*");
});
"""
FRAMES = """<!doctype html><body>{frames}<pre></pre><script>
const found = [];
addEventListener("message", event => {{
  const frames = [...document.querySelectorAll("iframe")];
  found[frames.findIndex(one => one.contentWindow === event.source)] = JSON.parse(event.data);
  document.querySelector("pre").textContent = JSON.stringify(found);
}});
</script>"""


def chromium(file: Path, folder: Path, *options: str) -> tuple[str, str]:
    """Return what it prints, and what the page's console says."""
    data = folder / f"chromium-{len(list(folder.iterdir()))}"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={data}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(data, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One run, and three side by side, one of them with many ranks and a long name."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng()
    one = Run(make(folder / "digits", rng, epochs=int(rng.integers(1, 12)), slow=2))
    two = Run(make(folder / "digits-2", rng, ranks=2, epochs=5))
    long = "a-run-with-a-very-long-name-of-one-word-" * 4
    many = Run(make(folder / long, rng, ranks=64, epochs=4, batch=16384, slow=17))
    found = []
    for i, runs in enumerate(([one], [many, one, two])):
        found.append(folder / f"{i}.html")
        found[-1].write_text(page(runs), encoding="utf-8")
    return found


def measured(pages: list[Path], width: int, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Return what MEASURE tells of pages, in frames as wide as a window of this width."""
    frames = ""
    for i, path in enumerate(pages):
        text = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
        (folder / f"{i}.html").write_text(
            text.replace("<style>", f"<script>{MEASURE}</script><style>", 1)
        )
        frames += f'<iframe src="{i}.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (folder / "frames.html").write_text(FRAMES.format(frames=frames))
    shown, _ = chromium(folder / "frames.html", folder, "--dump-dom", *options)
    found = re.search(r"<pre>(.*?)</pre>", shown, re.S)
    assert found, shown[-500:]
    told: list[dict[str, Any]] = json.loads(unescape(found[1]))
    assert len(told) == len(pages)
    return told


def light(colour: str) -> float:
    """Return the relative luminance of a computed colour (WCAG 2.2)."""
    part = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_all_of_it_can_be_read(width: int, dark: bool, pages: list[Path], tmp_path: Path) -> None:
    for told in measured(pages, width, tmp_path, *[DARK] * dark):
        assert told["width"] <= width and told["wide"] == []
        assert told["touching"] == [] and told["outside"] == []
        assert told["smallest"] >= 8 and told["plots"] >= 7
        paper = light(told["paper"])
        assert (paper < 0.02) == dark and (paper > 0.9) != dark
        for colour in told["colours"]:
            low, high = sorted((light(colour), paper))
            assert (high + 0.05) / (low + 0.05) > 4.5, colour


def test_it_asks_for_nothing_and_complains_of_nothing(pages: list[Path], tmp_path: Path) -> None:
    """Its own policy forbids to fetch anything: the console would tell of a try."""
    picture = tmp_path / "page.png"
    _, console = chromium(pages[1], tmp_path, f"--screenshot={picture}", "--window-size=1280,2000")
    assert console == ""
    assert picture.read_bytes().startswith(b"\x89PNG")
    bad = tmp_path / "bad.html"
    bad.write_text(pages[0].read_text().replace("<h1>", '<img src="x.png"><h1>'))
    assert "Content Security Policy" in chromium(bad, tmp_path, "--dump-dom")[1]


def test_it_prints(pages: list[Path], tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    chromium(pages[0], tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer", DARK)
    data = paper.read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 5
