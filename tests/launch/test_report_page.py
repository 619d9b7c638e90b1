"""The page of `hf-edit report` in a browser: on a laptop and on a phone, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from hf_edit.cli.main import main
from hf_edit.cli.report import PAGE
from tests.unit.cli.fake_journal import FakeRun

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
LAPTOP, PHONE = (1280, 4200), (390, 5600)
DARK = "--blink-settings=preferredColorScheme=0"
MEASURE = """
<script>
const shown = (node) => node.getBoundingClientRect().width > 0;
const figures = [...document.querySelectorAll("figure svg")].filter(shown);
const texts = figures.flatMap((figure) => [...figure.querySelectorAll("text")]);
const wide = [...document.querySelectorAll("body *")].filter((node) => !node.closest(".table") && !node.closest("svg"));
parent.postMessage(JSON.stringify({
  width: window.innerWidth,
  scroll_width: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  page: getComputedStyle(document.body).backgroundColor,
  figures: figures.length,
  text_height: Math.min(...texts.map((text) => text.getBoundingClientRect().height)),
  text_colours: [...new Set(texts.map((text) => getComputedStyle(text).fill))],
  right: Math.max(...wide.map((node) => node.getBoundingClientRect().right)),
  tables: [...document.querySelectorAll(".table")].map((table) => [table.clientWidth, table.scrollWidth]),
}), "*");
</script>
"""
# A window cannot be as narrow as a phone, a frame can.
FRAME = """
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="probe.html" style="border: 0; width: %dpx; height: %dpx"></iframe>
"""


def browse(page: Path, size: tuple[int, int], *more: str) -> str:
    assert BROWSER is not None
    words = [BROWSER, *OPTIONS, f"--user-data-dir={page.parent / 'profile'}", "--window-size={},{}".format(*size)]
    done = subprocess.run([*words, *more, page.as_uri()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of runs on it."""
    folder = tmp_path_factory.mktemp("page")
    one = FakeRun().write(folder / "edit-forward").parent
    two = FakeRun(resume_at=None, trouble=False, by_time=True, settings={"weighting": "uniform"}, seed=1)
    other = two.write(folder / "a-edit").parent
    assert main(["report", str(one)]) == 0
    assert main(["report", str(one), str(other), "--output", str(folder / "both")]) == 0
    return {1: one / "report" / PAGE, 2: folder / "both" / PAGE}


def measured(page: Path, size: tuple[int, int], *more: str) -> dict[str, Any]:
    """What a script in the page finds; the page itself forbids scripts."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    page.with_name("probe.html").write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME % size, encoding="utf-8")
    content = browse(frame, LAPTOP, "--dump-dom", "--virtual-time-budget=5000", *more)
    title = re.search(r"<title>(.*?)</title>", content, re.DOTALL)
    assert title
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.mark.parametrize("num_runs", [1, 2])
@pytest.mark.parametrize("size", [LAPTOP, PHONE])
def test_the_page_fits(pages: dict[int, Path], num_runs: int, size: tuple[int, int]) -> None:
    found = measured(pages[num_runs], size)
    assert found["width"] == size[0]
    assert found["scroll_width"] <= size[0], "the page scrolls sideways"
    assert found["right"] <= size[0]
    assert found["figures"] == (5 if num_runs == 1 else 9), "one variant of each"
    assert found["text_height"] >= 7.5, "in pixels"
    if size == PHONE:
        assert any(content > width for width, content in found["tables"]), "nothing had to scroll: no test of tables"


def test_the_page_is_dark_where_that_is_preferred(pages: dict[int, Path]) -> None:
    light, dark = measured(pages[1], LAPTOP), measured(pages[1], LAPTOP, DARK)
    assert (light["dark"], dark["dark"]) == (False, True)
    assert (light["page"], dark["page"]) == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")
    assert light["text_colours"] == ["rgb(31, 35, 40)"]
    assert dark["text_colours"] == ["rgb(230, 237, 243)"]


@pytest.mark.parametrize("size", [LAPTOP, PHONE])
def test_what_is_seen(pages: dict[int, Path], size: tuple[int, int], tmp_path: Path) -> None:
    pictures = {}
    for name, options in (("light", []), ("dark", [DARK])):
        path = tmp_path / f"{name}.png"
        browse(pages[1], size, f"--screenshot={path}", *options)
        pictures[name] = np.round(255 * imread(path)[:, :, :3]).astype(int)
        assert pictures[name].shape[:2] == size[::-1]
    assert np.median(pictures["light"]) == 255
    assert np.median(pictures["dark"]) < 30
    for picture in pictures.values():
        for colour in ((255, 59, 48), (42, 161, 152)):  # left out; computing
            near = (abs(picture - colour).max(axis=-1) <= 12).sum()
            assert near > 200, f"no figure shows {colour}"
