"""Writes docs/api/ from the docstrings: one page per module, in the folders of the package, every public name on one.

    python docs/build_api.py            # writes the pages
    python docs/build_api.py --check    # writes nothing; exits with 1 and names what is undocumented

Docstrings here are Google style with simple tables and plain-text equations. They are turned into plain Markdown, so
that any site generator can build them.
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import optax_guard as og

HERE = Path(__file__).parent
# Modules that users import by themselves; everything else is reached as `optax_guard.name`.
TOP_LEVEL = ("models", "flax", "preflight", "diagnose", "smoothing", "report")
TITLES = {
    "accumulation/calls": "Across calls",
    "accumulation/scan": "Within one call",
    "attention/logits": "Largest logits",
    "attention/z_loss": "z-loss",
    "attention/qk_clip": "QK-Clip",
    "attention/layout": "Attention layouts",
    "common/axes": "Many devices",
    "common/bounds": "State of fixed clips",
    "recovery/ladder": "State of recovery",
    "recovery/loss_watch": "Loss watch",
    "recovery/reset": "Resetting moments",
    "rules/clip": "Fixed clips",
    "rules/norm_history": "Clipping by history",
    "published/index": "Published methods",
    "rules/adaptive": "Adaptive clips",
    "rules/published": "Published rules",
    "rules/skip": "Skipping",
    "state/events": "Events in words",
    "state/held": "State beside the optimizer",
    "state/metrics": "Metrics and flight log",
    "state/migration": "Adding and removing guards",
    "state/update_metrics": "Norms of updates and parameters",
    "step/act": "Taking a step",
    "step/judge": "A rule of your own",
    "common/new_params": "State of QK-Clip",
    "step/observe": "Gradient statistics",
    "step/reading": "Leaf names",
    "step/record": "Flight recorder",
    "transforms/elementwise": "Elementwise bounds",
    "transforms/published": "Published transformations",
    "transforms/spam": "State of SPAM",
}
SECTIONS = ("Guarantees", "Faults", "Limitations", "Args", "Returns", "Raises", "Example", "References", "See Also")


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description="Pages of reference from the docstrings.")
    parser.add_argument("--check", action="store_true", help="only check that every public name is documented")
    options = parser.parse_args(arguments)
    pages = {**private_pages(), **top_level_pages()}
    missing = [problem for members in pages.values() for problem in problems(*members)]
    missing += [f"optax_guard.{name} is on no page" for name in og.__all__ if not on_a_page(name, pages)]
    in_menu = set(re.findall(r": api/(\S+)\.md$", (HERE.parent / "mkdocs.yml").read_text(), re.MULTILINE)) - {"index"}
    missing += [f"mkdocs.yml: api/{page}.md is not in the menu" for page in pages if page not in in_menu]
    missing += [f"mkdocs.yml: there is no api/{page}.md" for page in sorted(in_menu) if page not in pages]
    if missing:
        print("\n".join(missing), file=sys.stderr)
        return 1
    if not options.check:
        folder = HERE / "api"
        folder.mkdir(exist_ok=True)
        for old in folder.rglob("*.md"):
            old.unlink()
        for page, (module, names) in pages.items():
            (folder / page).parent.mkdir(exist_ok=True)
            (folder / f"{page}.md").write_text(page_text(page, module, names), encoding="utf-8")
        (folder / "index.md").write_text(index_text(pages), encoding="utf-8")
        print(f"{len(pages)} pages in docs/api")
    return 0


def private_pages() -> dict[str, tuple[ModuleType, list[str]]]:
    """Page name -> (module, public names), for what `import optax_guard` gives: 'rules/skip' for `rules/_skip.py`."""
    pages: dict[str, tuple[ModuleType, list[str]]] = {}
    rooms = [thing for name in og.__all__ if inspect.ismodule(thing := getattr(og, name))]
    for room in rooms:
        pages[f"{room.__name__.removeprefix('optax_guard.')}/index"] = (room, [])
    for name, thing in ((name, getattr(owner, name)) for owner in (og, *rooms) for name in owner.__all__):
        if inspect.ismodule(thing):
            continue
        module = importlib.import_module(thing.__module__)
        page = re.sub(r"(^|/)_", r"\1", module.__name__.removeprefix("optax_guard.").replace(".", "/"))
        names = pages.setdefault(page, (module, []))[1]
        if name not in names:
            names.append(name)
    return {page: (module, by_place(module, names)) for page, (module, names) in sorted(pages.items())}


def top_level_pages() -> dict[str, tuple[ModuleType, list[str]]]:
    """The modules that are imported by themselves, where they exist."""
    pages = {}
    for name in TOP_LEVEL:
        if (Path(og.__file__).parent / name).exists() or (Path(og.__file__).parent / f"{name}.py").exists():
            module = importlib.import_module(f"optax_guard.{name}")
            pages[name] = (module, list(module.__all__))
    return pages


def by_place(module: ModuleType, names: list[str]) -> list[str]:
    """In reading order: functions as they stand in the file, then types."""
    source = inspect.getsource(module)

    def place(name: str) -> tuple[bool, int]:
        found = re.search(rf"^(def|class) {name}\b|^{name}\b", source, re.M)
        return inspect.isclass(getattr(module, name)), found.start() if found else 0

    return sorted(names, key=place)


def on_a_page(name: str, pages: dict[str, tuple[ModuleType, list[str]]]) -> bool:
    """Whether a public name of the package is documented somewhere."""
    return f"{name}/index" in pages or any(name in names for _, names in pages.values())


def is_published(page: str) -> bool:
    """Whether its names are reached as `optax_guard.published.name`."""
    return page.endswith("/published")


def problems(module: ModuleType, names: list[str]) -> list[str]:
    """What a reader would miss."""
    missing = [] if module.__doc__ else [f"{module.__name__} has no docstring"]
    for name in names:
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        text = inspect.getdoc(thing) or ""
        if not text:
            missing.append(f"{module.__name__}.{name} has no docstring")
        elif inspect.isfunction(thing):
            if module.__name__.partition("optax_guard.")[2] not in TOP_LEVEL and ">>>" not in text:
                missing.append(f"{module.__name__}.{name} has no example")
            if inspect.signature(thing).parameters and "Args:" not in text:
                missing.append(f"{module.__name__}.{name} does not describe its arguments")
    return missing


def page_text(page: str, module: ModuleType, names: list[str]) -> str:
    """One page of Markdown."""
    title = TITLES.get(page, page.removesuffix("/index").rpartition("/")[2].replace("_", " "))
    prefix = module.__name__ if page in TOP_LEVEL else "optax_guard.published" if is_published(page) else "optax_guard"
    first, _, rest = (inspect.getdoc(module) or "").partition("\n")
    parts = [f"# {title[0].upper()}{title[1:]}", first, markdown(rest)]
    for name in names:
        thing = getattr(module, name)
        parts.append(f"## `{name}` {{ #{name} }}")
        if inspect.isfunction(thing):
            parts.append(f"```python\n{prefix}.{signature(name, thing)}\n```")
        parts.append(markdown(description(thing)))
        if inspect.isclass(thing) and hasattr(thing, "_fields"):
            parts.append(fields(thing))
    return "\n\n".join(part for part in parts if part) + "\n"


def index_text(pages: dict[str, tuple[ModuleType, list[str]]]) -> str:
    """The names that the README shows first, then all names, alphabetical; each with its first sentence."""
    rows = {}
    for page, (module, names) in pages.items():
        room = page if page in TOP_LEVEL else "published" if is_published(page) else page.partition("/")[0]
        for name in names:
            text = description(getattr(module, name)).split("\n")[0]
            at_top = name in og.__all__ and page not in TOP_LEVEL and not is_published(page)
            shown = name if at_top else f"{room}.{name}"
            rows[shown] = f"| [`{shown}`]({page}.md#{name}) | {text.replace('|', chr(92) + '|')} |"
    first = [rows[name] for name in first_names()]
    every = [rows[shown] for shown in sorted(rows, key=lambda shown: (shown.rpartition(".")[2].lower(), shown))]
    head = "| name | |\n|---|---|\n"
    return (
        "# Names\n\n## The names that most programs need\n\n"
        + head
        + "\n".join(first)
        + "\n\n## All names\n\n"
        + head
        + "\n".join(every)
        + "\n"
    )


def first_names() -> list[str]:
    """The names in the list with which README begins."""
    listed = (HERE.parent / "README.md").read_text().partition("these twenty names:\n\n")[2].partition("\n\n")[0]
    return re.findall(r"`(\w+)`", listed)


def description(thing: Any) -> str:
    """The docstring; the values of an option's type, or of a constant."""
    if get_origin(thing) is Literal:
        return f"One of {', '.join(f'`{value!r}`' for value in get_args(thing))}."
    if isinstance(thing, int | float | str):
        return f"`{thing!r}`"
    return inspect.getdoc(thing) or ""


def signature(name: str, function: Any) -> str:
    """One parameter a line where it is long."""
    parts: list[str] = []
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            if not any(part.startswith("*") for part in parts):
                parts.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={default_text(parameter.default)}"
        parts.append(f"{star}{parameter.name}{default}")
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= 88 else f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def default_text(value: Any) -> str:
    """A default as a person would write it."""
    return getattr(value, "__name__", None) or repr(value)


def fields(state: type) -> str:
    """A NamedTuple's fields with the comments that stand behind them."""
    try:
        source = inspect.getsource(state)
    except OSError:
        return ""
    rows = re.findall(r"^    (\w+): ([^#\n]+?)\s*#\s*(.*)$", source, re.M)
    rows += [(n, t.strip(), "") for n, t in re.findall(r"^    (\w+): ([^#\n=]+)$", source, re.M) if n in state._fields]
    known = {name: (kind, comment) for name, kind, comment in reversed(rows)}
    lines = [f"| `{n}` | {escape(known[n][1])} |" for n in state._fields if n in known]
    return "| field | |\n|---|---|\n" + "\n".join(lines) if lines else ""


def escape(text: str) -> str:
    """Safe inside a table cell."""
    return text.replace("|", "\\|")


def markdown(text: str) -> str:
    """Google-style docstring with simple tables -> Markdown."""
    out: list[str] = []
    lines = text.strip("\n").split("\n")
    i = 0
    while i < len(lines):
        line = lines[i]
        section = line.rstrip(":")
        if re.fullmatch(r"=+( +=+)+", line.strip()) and len(line.strip()) > 8:
            table, i = simple_table(lines, i)
            out += ["", *table, ""]
            continue
        if line.endswith(":") and section in SECTIONS:
            body, i = indented(lines, i + 1)
            out += ["", f"**{section}**", "", *section_body(section, body), ""]
            continue
        if line.startswith(">>>"):
            j = i
            while j < len(lines) and lines[j].strip():
                j += 1
            out += ["```pycon", *lines[i:j], "```"]
            i = j
            continue
        paragraph = []
        while i < len(lines) and lines[i].strip():
            paragraph.append(lines[i])
            i += 1
        i += not paragraph
        out += ["", *(equation(paragraph) if is_equation(paragraph) else paragraph), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def is_equation(paragraph: list[str]) -> bool:
    """A paragraph of formulas: aligned columns or arrows, and no sentence."""
    return bool(paragraph) and (
        any(re.search(r"<-|\S   +\S|^\w[^.`]* = ", line) for line in paragraph)
        and not re.search(r"[a-z]{3,}\. [A-Z]|\.$", paragraph[-1])
    )


def equation(paragraph: list[str]) -> list[str]:
    """Kept as it stands."""
    return ["```text", *paragraph, "```"]


def indented(lines: list[str], i: int) -> tuple[list[str], int]:
    """The indented block from line i, dedented, and the line after it."""
    block = []
    while i < len(lines) and (not lines[i].strip() or lines[i].startswith("  ")):
        block.append(lines[i])
        i += 1
    return inspect.cleandoc("\n".join(block)).split("\n"), i


def section_body(section: str, body: list[str]) -> list[str]:
    """Args and Raises become lists, examples code; the rest is text."""
    if section == "Example":
        return [markdown("\n".join(body))]
    if section in ("Args", "Raises"):
        items: list[str] = []
        for line in body:
            found = re.match(r"(\*{0,2}\w+): (.*)", line)
            if found and not line.startswith(" "):
                items.append(f"- `{found[1]}`: {found[2]}")
            elif line.strip() and items:
                items.append("  " + line.strip())
        return items
    return [re.sub(r"^  +", "  ", line) for line in body]


def simple_table(lines: list[str], i: int) -> tuple[list[str], int]:
    """A reStructuredText simple table -> a Markdown one. A row whose first cell is empty continues the row above."""
    starts = [(m.start(), m.end()) for m in re.finditer("=+", lines[i])]
    rows: list[list[str]] = []
    rules = 0
    while i < len(lines) and (lines[i].strip() or rules < 3):
        line = lines[i]
        i += 1
        if re.fullmatch(r"[= ]+", line) and "=" in line:
            rules += 1
            if rules == 3:
                break
            continue
        ends = [start for start, _ in starts[1:]] + [None]
        cells = [line[start:end].strip() for (start, _), end in zip(starts, ends, strict=True)]
        if not cells[0] and rows:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    table = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return [table[0], "|" + "---|" * len(starts), *table[1:]], i


if __name__ == "__main__":
    sys.exit(main())
