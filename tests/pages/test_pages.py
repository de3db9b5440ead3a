"""The documentation as a whole: links, anchors and mentioned files exist, every page is in the menu, names are real."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from running import ROOT

import optax_guard as og

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "api" not in page.relative_to(ROOT).parts),
]
TAUGHT = {"skip_small"}  # CONTRIBUTING.md shows how to write it
MODULES = "diagnose|flax|models|preflight|report|smoothing"


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as site generators make them."""
    titles = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(prose(file.read_text())), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_begin_a_block_of_their_own(page: Path) -> None:
    """Else the site shows them as running text, although other renderers do not."""
    for block in re.split(r"\n\s*\n", prose(page.read_text())):
        lines = [line for line in block.splitlines() if not line.startswith("<!--")]
        for mark in ("- ", "|", "1. "):
            assert not any(line.startswith(mark) for line in lines) or lines[0].startswith(mark), lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_number_lies_in_its_own_interval(page: Path) -> None:
    """A number and its quartiles are of one statistic, as written: 0.78 (0.80 to 0.88) is not."""
    text = re.sub(r"(?<=\d)[  ](?=\d{3}\b)", "", page.read_text())
    number = r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
    for found in re.finditer(rf"(?<![\w.]){number}(?: \w+)? \({number} to {number}(?: \w+)?\)", text):
        value, low, high = map(float, found.groups())
        assert low <= value <= high, found[0]


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert written == {page for page in menu if not page.startswith("api/")}


def test_every_public_name_is_on_a_page_of_the_reference_which_is_in_the_menu() -> None:
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.main(["--check"]) == 0


def sources_of(command: str) -> list[Path]:
    """The files of the program that a line of the shell runs: a script, or a module with its siblings."""
    script, module = re.search(r"python3? (?:(?!-)(\S+\.py)|-m (\S+))", command).groups()
    if script:
        return [ROOT / script]
    place = ROOT / module.replace(".", "/")
    return [*place.glob("*.py"), place.with_suffix(".py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_programs_and_options_that_pages_write(page: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    lines = [line for line in lines if re.search(r"^\S*\bpython3? ", line)]
    lines += re.findall(r"`((?:\.venv/bin/)?python [^`]*)`", prose(text))
    for line in lines:
        command = line.split(" #")[0].replace("\n", " ")
        if re.search(r"-m (pytest|http\.server|pip)\b", command) or command.endswith("python"):
            continue
        files = [file for file in sources_of(command) if file.is_file()]
        assert files, command
        source = "".join(file.read_text() for file in files)
        for option in re.findall(r" (--[\w-]+)", command):
            assert f'"{option}"' in source, f"{command}: {option}"
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    for target in re.findall(r"(?:`|^)make ([a-z.][\w./-]*)", text, re.MULTILINE):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make {target}"


def test_pages_that_code_mentions_exist() -> None:
    files = [
        file for folder in ("optax_guard", "tests", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    ]
    for file in [*files, ROOT / "Makefile", ROOT / "CHANGELOG.md", *PAGES]:
        for mentioned in re.findall(r"\bdocs/[\w./-]+\.(?:md|png)", file.read_text()):
            assert (ROOT / mentioned).exists() or "/api/" in mentioned, f"{file.relative_to(ROOT)}: {mentioned}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_on_pages_exist(page: Path) -> None:
    text = page.read_text()
    for dotted in re.findall(r"\bog\.((?:[a-z_]+\.)?\w+)", text):
        thing = og
        for name in dotted.split("."):
            if not hasattr(thing, name):
                assert not inspect.ismodule(thing) or name in TAUGHT, f"og.{dotted}"
                break  # an attribute of a result, as in og.guard(...).init
            thing = getattr(thing, name)
    for module, name in re.findall(rf"\boptax_guard\.({MODULES})\.(\w+)", text):
        assert hasattr(importlib.import_module(f"optax_guard.{module}"), name), f"optax_guard.{module}.{name}"
