"""The rooms of the house: imports go one way, and nothing outgrows its plan."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "krony"

# A room may import those that stand before it in the same list or in an earlier one. Rooms of one
# floor know nothing of each other.
FLOORS: list[list[str]] = [
    ["errors", "runtime"],  # what travels without krony stands on nothing of it
    ["words"],
    ["maths", "text"],
    ["nn"],
    ["hf"],
    ["measure"],
    ["compression", "healing", "export"],
    ["compare", "demo", "report"],
    ["cli"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(SOURCE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {_name(path) for path in MODULES}


@cache
def _imported(path: Path) -> list[str]:
    """Modules of krony that a file imports, those inside of functions too."""
    return list(_found(ast.parse(path.read_text(encoding="utf-8"))))


def _found(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "krony":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "krony")


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_imports_go_one_way():
    wrong = []
    for path in MODULES:
        room = _room(_name(path))
        if room in ("", "__main__", "moved"):  # the front door
            continue
        assert room in FLOOR, f"{path} stands in no room"
        for name in _imported(path):
            other = _room(name)
            if other not in ("", room) and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{_name(path)} imports {name}")
    assert not wrong


def test_there_is_no_circle():
    graph = {_name(path): set(_imported(path)) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name in done:
            return
        for other in graph.get(name, ()):
            if other != name:
                visit(other, (*above, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_file_outgrows_its_reader():
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    long = {_name(path): count for path, count in lines.items() if count > 450}
    assert not long, "split them by what their parts are about"


def test_packages_are_no_deeper_than_two():
    for path in MODULES:
        assert len(path.relative_to(SOURCE).parts) <= 3, path


def test_every_room_says_what_lives_there():
    for folder in sorted({path.parent for path in MODULES}):
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), folder


def test_nothing_forks():
    """Whoever ran a model has threads of OpenMP, and a child of a fork waits for them for ever:
    what needs another process starts one, or asks a server that never multiplied."""
    root = SOURCE.parents[1]
    forks = ("os.fork" + "(", 'get_context("fork' + '")', "get_context('fork" + "')")
    for folder in ("src", "tests", "benchmarks", "recipes"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in forks), path
