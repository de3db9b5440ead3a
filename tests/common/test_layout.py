"""The rooms of the package: imports go downward, and what a module is for is in its `__all__`."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import mutants

import optax_guard as og

PACKAGE = Path(og.__file__).parent
# From the ground up; a room imports from lower floors and from itself.
FLOORS = (
    {"_common"},
    {"_step"},
    {"rules", "recovery"},
    {"accumulation", "_loss_scaling"},
    {"_guard"},
    {"_halt"},
    {"transforms", "attention"},
    {"state", "_stabilize", "published"},
    {"__init__"},
    {"_host", "models"},
    {"preflight", "diagnose", "report", "smoothing", "flax"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The first name below the package."""
    return [*module.split("."), "__init__"][1]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports from the package, also those inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, f"{file}: a relative import"
    return {name for name in found if name.split(".")[0] == "optax_guard"}


def test_rooms_import_only_from_below() -> None:
    wrong = []
    for file in FILES:
        room = room_of(name_of(file))
        for module in imports_of(file):
            below = room_of(module)
            if below in FLOOR and below != room and FLOOR[below] >= FLOOR[room]:
                wrong.append(f"{name_of(file)} imports {module}")
    assert not wrong, wrong
    assert {room_of(name_of(file)) for file in FILES} == set(FLOOR)


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {name_of(file).removesuffix(".__init__"): file for file in FILES}
    needs = {
        name: {module if module in names else module.rpartition(".")[0] for module in imports_of(file)}
        for name, file in names.items()
    }
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys() - {name}}
        assert free, f"in a circle: {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


def test_every_module_lists_all_that_it_offers() -> None:
    for found in pkgutil.walk_packages(og.__path__, "optax_guard."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        assert module.__doc__, found.name
        if found.name.endswith("_") or not hasattr(module, "__all__"):
            continue
        here = {
            name
            for name, thing in vars(module).items()
            if not name.startswith("_")
            and (inspect.isfunction(thing) or inspect.isclass(thing))
            and thing.__module__ == found.name
        }
        assert here <= set(module.__all__), f"{found.name}: {sorted(here - set(module.__all__))}"
        assert all(hasattr(module, name) for name in module.__all__), found.name


def test_what_the_rooms_offer_is_offered_at_the_top() -> None:
    rooms = (og.rules, og.recovery, og.accumulation, og.transforms, og.attention, og.state)
    functions = {name for room in rooms for name in room.__all__ if name[0].islower()}
    assert functions <= set(og.__all__)
    types = [name for room in rooms for name in room.__all__ if name[0].isupper()]
    assert len(types) == len(set(types))


def test_only_a_few_functions_make_transformations() -> None:
    """So that none can forget to compare the trees and the state: the others call `transformation`."""
    makers = {name_of(file) for file in FILES if re.search(r"GradientTransformationExtraArgs\(\w", file.read_text())}
    assert makers == {
        "optax_guard._common.transformation",
        "optax_guard._step.act",  # `fast_transformation`, with the same checks, and `as_transformation` of a user's
        "optax_guard._stabilize",  # calls the `update` of another
    }


def test_states_are_made_by_the_names_of_their_fields() -> None:
    """Not by position, where a new field would shift the others."""
    by_position = re.compile(r"(State|Series|Row)\(\*|type\(\w+\)\(\*|\bstate\[\d*:")
    assert not [name_of(file) for file in FILES if by_position.search(file.read_text())]


def test_nothing_private_is_left_unused() -> None:
    unused = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        made = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        made += [target.id for target in targets if isinstance(target, ast.Name)]
        unused += [(name_of(file), name) for name in made if re.match("_[^_]", name) and name not in read]
    assert not unused


def test_every_mutant_that_is_explained_exists() -> None:
    names = {mutant.name for module in mutants.OWNERS for mutant in mutants.mutants_of(module)}
    rows = [line[2:] for line in mutants.ALIVE.read_text().splitlines() if line.startswith("| ")][1:]
    assert rows
    assert not [row for row in rows if not any(row.startswith(f"{name} | ") for name in names)]
