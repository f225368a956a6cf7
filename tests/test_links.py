"""The project's pages name files, headings, modules and commands that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from pipeline import run

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("docs", "demo", "k8s", "manifests", "benchmarks")
_PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(page for folder in _FOLDERS for page in (ROOT / folder).rglob("*.md")))
    if ".work" not in page.parts
)
_TOP = ("textual_inversion", "pipeline", "tests", "demo", "k8s", "manifests", "benchmarks", "docs")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```[\s\S]*?```|^(?: {4}|\t).*$", re.MULTILINE)
_PATH = re.compile(r"(?<![\w./-])((?:" + "|".join(_TOP) + r")/[\w./-]*[\w/])(?![\w*{<])")


def links(text: str) -> list[str]:
    """Return the targets of a page's links, code blocks aside."""
    return _LINK.findall(_CODE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", _CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = []
    for link in links(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target.exists() and (not anchor or anchor in anchors(target.read_text()))
        found += [] if is_there else [link]
    return found


def paths(text: str) -> set[str]:
    """Return the paths of this repository that a page names in code or in backticks, without those that are made."""
    return {path for path in _PATH.findall(text) if not path.startswith(("demo/.work", "demo/flow"))}


def commands(text: str) -> list[str]:
    """Return the command lines `python -m MODULE ...` that a page prints, without `python -m`.

    In a code block a command ends at two spaces, before the explanation; between backticks it may go over two lines.
    """
    blocks = re.findall(r"python -m ((?:pipeline|benchmarks)\.\w+(?: \S+)*)", "\n".join(_CODE.findall(text)))
    between = re.findall(r"`python -m ((?:pipeline|benchmarks)\.\w+[^`]*)`", _CODE.sub("", text))
    return [*blocks, *(" ".join(command.split()) for command in between)]


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_exist(page: Path) -> None:
    """A page may name a path from the repository's root or from its own folder."""
    missing = {path for path in paths(page.read_text()) if not (ROOT / path).exists()}
    assert {path for path in missing if not (page.parent / path).exists()} == set()


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    """Every `python -m MODULE` of ours names a module."""
    named = re.findall(r"python -m ((?:pipeline|benchmarks|demo)\.\w+)", page.read_text())
    assert [name for name in dict.fromkeys(named) if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_understood(page: Path) -> None:
    """Every printed command line whose module has a parser of its own is one that it accepts."""
    for command in commands(page.read_text()):
        name, *arguments = shlex.split(command, comments=True)
        module = run if name == "pipeline.validate" else importlib.import_module(name)
        if arguments and hasattr(module, "parse"):
            module.parse(["7" if argument == "N" else argument for argument in arguments if argument != "..."])


def test_names_exist() -> None:
    """Each identifier in backticks on a page that describes the present code stands in a source."""
    folders = ("textual_inversion", "pipeline", "tests", "benchmarks", "demo", "k8s", ".ci")
    suffixes = (".py", ".toml", ".yaml", ".html")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in suffixes]
    sources = "\n".join(path.read_text() for path in [*files, ROOT / "pyproject.toml", ROOT / "Makefile"])
    words = set(re.findall(r"\w+", sources))
    history = ROOT / "docs" / "EXPERIMENTS.md"
    pages = [page for page in _PAGES if page.parent in (ROOT, ROOT / "docs") and page != history]
    named = {(page.name, name) for page in pages for name in re.findall(r"`([A-Za-z][\w.]*\w)`", page.read_text())}
    assert sorted((page, name) for page, name in named if name.split(".")[-1] not in words) == []


def test_what_the_checks_find(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: two\n[a](#a-heading-two) [b](gone.md) [c](page.md#gone) [d](https://x.org) `tests/e2e`\n"
    )
    assert broken(page) == ["gone.md", "page.md#gone"]
    assert paths(page.read_text()) == {"tests/e2e"}


def test_no_model_that_the_hub_removed() -> None:
    """Ids under which nothing can be downloaded any more."""
    gone = re.compile(r"runwayml/|stabilityai/stable-diffusion-2|CompVis/")
    files = [
        path
        for folder in (*_FOLDERS, "textual_inversion", "pipeline")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".py", ".toml", ".yaml") and ".work" not in path.parts
    ]
    assert [path.as_posix() for path in (*files, *ROOT.glob("*.md")) if gone.search(path.read_text())] == []
