"""The HTML pages: every link leads somewhere, nothing comes from elsewhere; and in a browser, these
pages, and the notebooks in JupyterLab.

The browser's tests want Chromium or Chrome with its chromedriver on PATH (Debian's packages
chromium and chromium-driver); without them they are skipped, the others are not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from typer.testing import CliRunner

nbformat = pytest.importorskip("nbformat", reason="the study extra is not installed")
pages = pytest.importorskip("asymconv.pages", reason="the study extra is not installed")
bs4 = pytest.importorskip("bs4", reason="the test extra is not installed")

from asymconv import record, study  # noqa: E402
from asymconv.cli import app  # noqa: E402

NOTEBOOKS = study.notebooks()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the committed notebooks."""
    folder = tmp_path_factory.mktemp("site") / "html"
    figure, readme = study.ROOT / "figures" / "ladder.svg", study.ROOT / "README.md"
    written = pages.write(NOTEBOOKS, folder, record.load(record.LADDER), figure, readme)
    assert [p.name for p in written] == ["index.html", *(f"{p.stem}.html" for p in NOTEBOOKS)]
    return folder


def soup(path: Path) -> bs4.BeautifulSoup:
    return bs4.BeautifulSoup(path.read_text(), "html.parser")


def title_of(notebook: Path) -> str:
    first = nbformat.read(notebook, as_version=4).cells[0].source
    return re.sub("[`*]", "", first.splitlines()[0].removeprefix("# "))


def test_every_link_and_picture_is_there(site: Path) -> None:
    for path in site.glob("*.html"):
        page = soup(path)
        targets = [(tag, tag["href"]) for tag in page.find_all(["a", "link"], href=True)]
        targets += [(tag, tag["src"]) for tag in page.find_all(src=True)]
        assert targets
        for tag, target in targets:
            parts = urlsplit(target)
            if tag.name == "a" and parts.netloc in ("doi.org", "arxiv.org"):
                continue  # a paper, for who has a network
            assert not parts.scheme or parts.scheme == "data", f"{path.name} wants {target}"
            assert not parts.netloc, f"{path.name} wants {target}"
            if parts.scheme:
                continue
            file = site / (parts.path or path.name)
            assert file.is_file(), f"{path.name} has a link to {target}"
            if parts.fragment:
                there = soup(file).find(id=[parts.fragment, unquote(parts.fragment)])
                assert there, f"{path.name}: {tag} leads to no place in {file.name}"


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for path in site.glob("*.html"):
        assert not soup(path).find_all(["script", "iframe", "object", "embed"])
    for path in (*site.glob("*.html"), *site.glob("*.css")):
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", path.read_text())


def test_titles_and_the_way_through(site: Path) -> None:
    """From the front page on, each page's next one is the next notebook, and back."""
    names = ["index.html", *(f"{p.stem}.html" for p in NOTEBOOKS)]
    titles = ["asymconv", *(title_of(p) for p in NOTEBOOKS)]
    for index, (name, title) in enumerate(zip(names, titles, strict=True)):
        page = soup(site / name)
        assert page.title.string == title
        assert page.h1.get_text().removesuffix("¶").strip() == title
        for rel, other in (("prev", index - 1), ("next", index + 1)):
            links = page.find_all("a", rel=rel)
            if index == 0 or not 0 < other < len(names):
                expected = [] if rel == "prev" or other >= len(names) else [names[other]] * 2
            else:
                expected = [names[other]] * 2
            assert [link["href"] for link in links] == expected
        if index:
            assert page.find("a", href="index.html")
    contents = soup(site / "index.html").select(".contents a[href]")
    assert [(a["href"], a.string) for a in contents] == list(zip(names, titles, strict=True))[1:]


def test_the_front_page_has_the_ladder(site: Path) -> None:
    page = soup(site / "index.html")
    rows = [row.get_text(" ") for row in page.table.find_all("tr")]
    for timing in record.load(record.LADDER).of_kind("rung"):
        assert any(timing.name in row for row in rows)
    assert page.find("img")["alt"]


def test_every_output_is_on_its_page(site: Path) -> None:
    for notebook in NOTEBOOKS:
        page = soup(site / f"{notebook.stem}.html")
        outputs = [
            output.get("data", {})
            for cell in nbformat.read(notebook, as_version=4).cells
            for output in cell.get("outputs", [])
        ]
        drawn = sum("image/svg+xml" in data for data in outputs)
        assert len(page.find_all("svg")) == drawn
        tables = sum(str(data.get("text/markdown")).count("\n| :--") for data in outputs)
        assert len(page.select(".output_area table")) == tables


def test_a_notebook_without_a_title_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00_none.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    figure, readme = study.ROOT / "figures" / "ladder.svg", study.ROOT / "README.md"
    with pytest.raises(ValueError, match=r"00_none\.ipynb does not begin with a title"):
        pages.write([path], tmp_path / "html", record.load(record.LADDER), figure, readme)


def test_the_study_writes_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_execute", shutil.copyfile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["study", "--html", "--only", "00,01", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "html" / "index.html") in result.output
    names = {p.name for p in (tmp_path / "html").iterdir()}
    assert names == {"index.html", "00_problem.html", "01_seed.html", "style.css", "ladder.svg"}


# --- in a browser --------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A headless browser that can reach no network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("no Chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1100,900"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    service = webdriver.chrome.service.Service(driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        opened.set_page_load_timeout(60)
        yield opened


WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
UNSTYLED = "return getComputedStyle(document.body).maxWidth"
FLAT = (
    "return [...document.querySelectorAll('main svg')]"
    ".filter(s => s.getBoundingClientRect().height < 50 || s.getBoundingClientRect().width < 300)"
    ".length"
)


def test_a_reader_clicks_through_it(site: Path, browser) -> None:
    titles = ["asymconv", *(title_of(p) for p in NOTEBOOKS)]
    browser.get((site / "index.html").as_uri())
    for index, title in enumerate(titles):
        assert browser.title == title
        heading = browser.find_element("css selector", "h1")
        assert heading.is_displayed()
        assert title in heading.text
        assert browser.execute_script(BROKEN) == 0
        assert browser.execute_script(FLAT) == 0
        assert browser.execute_script(UNSTYLED) != "none", "the stylesheet is not there"
        for width in (1100, 500):  # a wide table scrolls by itself, the page does not
            browser.set_window_size(width, 900)
            assert browser.execute_script(WIDE) <= 0, f"{title}: cut off at a width of {width}"
        browser.set_window_size(1100, 900)
        assert [entry["message"] for entry in browser.get_log("browser")] == []
        if index + 1 < len(titles):
            browser.find_elements("css selector", "a[rel=next]")[index % 2].click()
    for title in reversed(titles[1:-1]):
        browser.find_element("css selector", "a[rel=prev]").click()
        assert browser.title == title
    browser.find_element("link text", "contents").click()
    assert browser.title == titles[0]
    for title in titles[1:]:
        browser.find_element("link text", title).click()
        assert browser.title == title
        browser.back()


# --- in JupyterLab -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab whose folder holds copies of the notebooks."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(study.NOTEBOOKS, folder / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ip=127.0.0.1", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    settings = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / "config")}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=settings)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api"):
                break
            time.sleep(0.5)
        else:
            pytest.fail((folder / "log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(30)


PANEL = "document.querySelector('.jp-WindowedPanel-outer')"
CUT_OFF = (
    "return [...document.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown')]"
    ".filter(e => e.scrollWidth > e.clientWidth + 2).map(e => e.innerText.slice(0, 60))"
)
ERRORS = (
    "return [...document.querySelectorAll("
    "'[data-mime-type=\"application/vnd.jupyter.stderr\"], .jp-RenderedText[data-mime-type*=error]'"
    ")].map(e => e.innerText.slice(0, 60))"
)
SEEN = "return [...document.querySelectorAll('.jp-Notebook .jp-Cell')].map(c => c.innerText)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_whole_in_jupyterlab(lab: str, browser, path: Path) -> None:
    """From the first to the last cell: nothing is cut off, no output is an error."""
    cells = nbformat.read(path, as_version=4).cells
    title = cells[0].source.splitlines()[0].lstrip("# ")
    browser.set_window_size(1280, 1000)
    browser.get(f"{lab}/doc/tree/notebooks/{path.name}?reset")
    for _ in range(120):
        if browser.execute_script(f"return !!{PANEL}") and title in "".join(
            browser.execute_script(SEEN)
        ):
            break
        time.sleep(0.5)
    else:
        pytest.fail(f"{title} did not appear")
    seen, top = "", 0
    while True:  # cells are drawn as they come into view
        browser.execute_script(f"{PANEL}.scrollTop = {top}")
        time.sleep(0.5)
        seen += "".join(browser.execute_script(SEEN))
        assert browser.execute_script(CUT_OFF) == []
        assert browser.execute_script(ERRORS) == []
        height, view = browser.execute_script(
            f"return [{PANEL}.scrollHeight, {PANEL}.clientHeight]"
        )
        if top + view >= height:
            break
        top += view - 100
    browser.set_window_size(1100, 900)
    last = next(c for c in reversed(cells) if c.cell_type == "code")
    assert last.source.splitlines()[-1].strip() in seen, "the end was not reached"
