"""Runs examples/notebooks/*.py and writes them with their outputs into docs/notebooks/: pages, and notebooks to open.

    python docs/build_notebooks.py                 # all of them, some minutes on two cores
    python docs/build_notebooks.py rescue_a_run    # one

A source is a Python file in cells, as Jupytext, VS Code and PyCharm read them: `# %%` begins a cell of code and
`# %% [markdown]` one of text. Of a cell, what it prints is shown, and its last line if that is a figure of matplotlib.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SOURCES = HERE.parent / "examples" / "notebooks"
PAGES = HERE / "notebooks"


class Cell(NamedTuple):
    """A cell, and what came of it."""

    is_code: bool
    text: str
    printed: str = ""
    picture: bytes = b""


def cells_of(source: str) -> list[Cell]:
    """The cells of a file; what stands above the first is not shown."""
    cells = []
    for head, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", source, re.MULTILINE):
        is_code = "[markdown]" not in head
        text = body if is_code else re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(Cell(is_code, text.strip()))
    return cells


def ran(cell: Cell, names: dict[str, Any]) -> Cell:
    """The cell with its output."""
    output, tree = io.StringIO(), ast.parse(cell.text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(output):
        exec(compile(tree, "program.py", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "program.py", "eval"), names)
    picture = io.BytesIO()
    if hasattr(value, "savefig"):
        value.savefig(picture, dpi=80, format="png", metadata={"Software": None})
    return cell._replace(printed=output.getvalue(), picture=picture.getvalue())


def page(name: str, cells: list[Cell]) -> str:
    """Markdown; what a cell prints follows it, as on all pages."""
    parts = []
    for number, cell in enumerate(cells):
        parts.append(f"```python\n{cell.text}\n```" if cell.is_code else cell.text)
        parts += [f"```\n{cell.printed.rstrip()}\n```"] if cell.printed else []
        parts += [f"![Output of the cell above]({picture_of(name, number)})"] if cell.picture else []
    title, rest = parts[0].split("\n", 1)
    origin = f"*A notebook: [{name}.ipynb]({name}.ipynb), or `examples/notebooks/{name}.py`.*"
    return "\n\n".join([title, origin, rest.strip(), *parts[1:]]) + "\n"


def picture_of(name: str, number: int) -> str:
    """The file of a cell's picture."""
    return f"{name}-{number}.png"


def notebook(cells: list[Cell]) -> dict[str, Any]:
    """The same in Jupyter's format."""
    made = []
    for number, cell in enumerate(cells):
        common = {"id": f"cell-{number}", "metadata": {}, "source": cell.text.splitlines(keepends=True)}
        if not cell.is_code:
            made.append({"cell_type": "markdown", **common})
            continue
        outputs: list[dict[str, Any]] = []
        if cell.printed:
            outputs.append({"output_type": "stream", "name": "stdout", "text": cell.printed.splitlines(keepends=True)})
        if cell.picture:
            data = {"image/png": base64.b64encode(cell.picture).decode()}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        made.append({"cell_type": "code", "execution_count": None, **common, "outputs": outputs})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main(arguments: list[str] | None = None) -> None:
    """Runs and writes."""
    parser = argparse.ArgumentParser(description="Notebooks with their outputs, as pages and as .ipynb.")
    known = sorted(path.stem for path in SOURCES.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all by default")
    names = parser.parse_args(arguments).names or known
    PAGES.mkdir(exist_ok=True)
    for name in names:
        shared: dict[str, Any] = {}
        cells = [ran(cell, shared) if cell.is_code else cell for cell in cells_of((SOURCES / f"{name}.py").read_text())]
        for old in PAGES.glob(f"{name}-*.png"):
            old.unlink()
        for number, cell in enumerate(cells):
            if cell.picture:
                (PAGES / picture_of(name, number)).write_bytes(cell.picture)
        (PAGES / f"{name}.md").write_text(page(name, cells))
        (PAGES / f"{name}.ipynb").write_text(json.dumps(notebook(cells), indent=1) + "\n")
        print(f"docs/notebooks/{name}.md and .ipynb")


if __name__ == "__main__":
    main()
