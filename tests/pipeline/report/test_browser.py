"""The report in a real browser: load, search, filter, sort, open, enlarge, at two widths, light and dark.

These tests need Chromium with its driver and the package selenium, and are skipped where one of them is not there.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from pipeline.config_file import load_config
from pipeline.report.comparison import Comparison, Side
from pipeline.report.page import RunFigures, build_report
from pipeline.store.storage import RunStore
from tests.pipeline.report.test_page import STRIP, fail, finish, put_pictures, put_strip
from textual_inversion.grids import grid

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DRIVER and shutil.which("chromium")), reason="no chromium and chromedriver on the path"),
]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
NASTY = "</script><img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the report of nine concepts, four of them inside the page, and of one that failed."""
    folder = tmp_path_factory.mktemp("run")
    store = RunStore(str(folder))
    config = load_config(overrides=["report.embedded=4"], output=str(folder), manifest=NASTY)
    sample = Image.new("RGB", (64, 64), "red")
    for number in range(9):
        name = f"c{number}"
        gate = {} if number else {"gate": "below"}
        carried = {"shelf": f"shelf {number % 3}", "price": 10 - number}
        record = finish(store, name, number, clip_i=0.9 - number / 20, carried=carried, previews=STRIP, **gate)
        put_strip(store, record)
        labels = [prompt.replace("{}", f"<{name}>") for prompt in config.grid.prompts]
        buffer = io.BytesIO()
        grid([sample], [(label, [sample] * 2) for label in labels]).save(buffer, "PNG")
        store.put(record.folder.grid, buffer.getvalue())
        store.put(record.folder.embedding, save({"<x>": np.eye(9, dtype=np.float32)[number : number + 1]}))
        rows = [
            {
                "concept_id": name,
                "fingerprint": record.fingerprint,
                "prompt": f"{text} <{name}>",
                "path": f"images/{name}/{text}.png",
            }
            for text in ("beach", "snow")
        ]
        put_pictures(store, rows, number)
    fail(store, "broken", 99, NASTY, "bad_input")
    build_report(store, config, RunFigures(learned=9))
    return folder


def wait_for(chrome: Chrome, script: str, wanted: Callable[[Any], object] = bool) -> Any:
    """Return what a script returns as soon as it is as wanted; fail with its last value if it never is."""
    found = None
    for _ in range(600):
        found = chrome.execute_script(f"return {script}")
        if wanted(found):
            return found
        time.sleep(0.1)
    pytest.fail(f"{script} is {found!r}; the console says {chrome.get_log('browser')}")


def open_page(chrome: Chrome, path: Path, width: int = 1400, *, dark: bool = False, state: str = "") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    chrome.get("about:blank")  # an address that differs in its fragment alone would not be loaded anew
    chrome.get(f"{path.as_uri()}{state}")
    wait_for(chrome, "document.getElementById('count').textContent.includes('shown')")


TITLES = "[...document.querySelectorAll('.card h3')].map(each => each.textContent)"


def shows(chrome: Chrome, expected: list[str]) -> bool:
    """Wait until the cards have these titles; the page draws them some time after a control has changed."""
    return bool(wait_for(chrome, TITLES, lambda names: names == expected))


def choose(chrome: Chrome, name: str, value: str) -> None:
    """Set a control as a person does."""
    chrome.execute_script(
        "const control = document.getElementById('controls').elements[arguments[0]]; control.value = arguments[1];"
        "control.dispatchEvent(new Event('input', { bubbles: true }));", name, value,
    )  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_the_page_fits_and_shows_its_pictures(chrome: Chrome, run: Path, width: int, dark: bool) -> None:
    open_page(chrome, run / "report.html", width, dark=dark)
    assert shows(chrome, ["c0", "c8", "c7", "c6", "c5", "c4", "c3", "c2", "c1", "broken"])
    for view in ("cards", "table", "pictures", "map"):
        chrome.execute_script(f"document.querySelector('[data-view={view}]').click()")
        wait_for(chrome, f"document.querySelector('#view > {'#map' if view == 'map' else '*'}')")
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    background = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(17, 19, 22)" if dark else "rgb(245, 246, 248)")
    assert [line for line in chrome.get_log("browser") if line["level"] == "SEVERE"] == []
    assert "9 learned, 1 failed" in chrome.title, "no text of the manifest has run"


def test_searching_filtering_and_sorting(chrome: Chrome, run: Path) -> None:
    open_page(chrome, run / "report.html")
    choose(chrome, "q", "c3")
    assert shows(chrome, ["c3"]), "it is in a part, which is loaded now"
    choose(chrome, "q", "")
    choose(chrome, "gate", "below")
    assert shows(chrome, ["c0"])
    choose(chrome, "gate", "")
    choose(chrome, "column", "carried:shelf")
    choose(chrome, "value", "shelf 1")
    assert shows(chrome, ["c7", "c4", "c1"])
    choose(chrome, "sort", "clip_i")
    chrome.execute_script("document.getElementById('direction').click()")
    wait_for(chrome, "document.querySelector('.card h3').textContent === 'c1'")
    assert shows(chrome, ["c1", "c4", "c7"])
    state = chrome.execute_script("return location.hash")
    open_page(chrome, run / "report.html", state=state)
    assert shows(chrome, ["c1", "c4", "c7"]), "the address holds the view"
    chrome.execute_script("document.getElementById('clear').click()")
    choose(chrome, "column", "carried:price")
    choose(chrome, "value", "9")
    choose(chrome, "operator", "least")
    assert shows(chrome, ["c0", "c1"])


def test_a_concept_of_a_part_is_opened_and_its_pictures_enlarged(chrome: Chrome, run: Path) -> None:
    open_page(chrome, run / "report.html", state="#concept=c2")
    wait_for(chrome, "document.querySelectorAll('#concept .gallery .picture img').length === 2")
    assert chrome.execute_script("return document.querySelector('#concept h2').textContent") == "c2"
    loaded = "[...document.querySelectorAll('#concept .picture img')].every(each => each.complete && each.naturalWidth)"
    chrome.execute_script("document.querySelectorAll('#concept img').forEach(each => each.loading = 'eager')")
    wait_for(chrome, loaded)
    assert chrome.execute_script("return document.querySelectorAll('#concept .cell').length") == 1 + 8 + 3
    chrome.execute_script("document.querySelector('#concept .samples .picture').click()")
    wait_for(chrome, "document.querySelector('#viewer .stage img')?.naturalWidth")
    width = "document.querySelector('#viewer .stage > *').getBoundingClientRect().width"
    before = wait_for(chrome, width)
    chrome.execute_script("document.querySelector(\"[data-zoom='2']\").click()")
    assert chrome.execute_script(f"return {width}") == pytest.approx(2 * before, rel=0.02)
    assert "a photo of a <c2>, sample 1" in chrome.execute_script(
        "return document.querySelector('#viewer footer').textContent"
    )


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", ["c8", "c3"])
def test_the_previews_of_a_concept_are_a_row_of_pictures(chrome: Chrome, run: Path, width: int, name: str) -> None:
    """`c8` is inside the page, `c3` in a part beside it."""
    open_page(chrome, run / "report.html", width, state=f"#concept={name}")
    steps = "[...document.querySelectorAll('.previews figcaption')].map(each => each.textContent)"
    assert wait_for(chrome, steps, len) == ["step 0", "step 50", "step 100"]
    cells = wait_for(
        chrome,
        "[...document.querySelectorAll('.previews button')].map(each => [each.getBoundingClientRect().left,"
        " each.getBoundingClientRect().width, each.firstChild.naturalWidth])",
        lambda found: all(loaded for *_, loaded in found),
    )
    assert [left for left, *_ in cells] == sorted(left for left, *_ in cells)
    assert all(80 < each < 140 for _, each, _ in cells)
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_map_is_walked_by_keys(chrome: Chrome, run: Path) -> None:
    open_page(chrome, run / "report.html")
    chrome.execute_script("document.querySelector('[data-view=map]').click()")
    wait_for(chrome, "document.querySelectorAll('#map > button').length === 9")
    chrome.execute_script("document.querySelector('#map > button').focus()")
    names = set()
    for _ in range(9):
        names.add(chrome.execute_script("return document.activeElement.getAttribute('aria-label')"))
        chrome.execute_script(
            "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }))"
        )
    assert names == {f"c{number}" for number in range(9)}


def test_a_page_without_its_parts_says_so(chrome: Chrome, run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "report.html", tmp_path)
    open_page(chrome, tmp_path / "report.html", state="#q=c8")
    wait_for(chrome, "document.querySelectorAll('.card').length === 1")
    assert shows(chrome, ["c8"]), "what is inside the page is found"
    assert "cannot be loaded: keep the folder" in wait_for(chrome, "document.getElementById('count').textContent")


def test_two_runs_are_shown_side_by_side(chrome: Chrome, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    page.write_text(Comparison.of(Side.read(str(run)), Side.read(str(run))).page(5))
    open_page(chrome, page, 390)
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= 390
    assert len(wait_for(chrome, TITLES, lambda names: len(names) == 9)) == 9
    assert chrome.execute_script("return document.querySelectorAll('.pair .samples').length") == 10
