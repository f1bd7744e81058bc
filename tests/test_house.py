"""The layout of the package: rooms on floors, and imports that only run down."""

import ast
import functools
from pathlib import Path

import ig_jax

PACKAGE = Path(ig_jax.__file__).parent

# From the ground up. Rooms of one floor do not import each other.
FLOORS = [
    {"base"},
    {"parallel", "pictures", "weightfiles"},
    {"models"},
    {"data", "diffusion", "optim", "checkpoints"},
    {"config"},
    {"interop", "generation", "encoding"},
    {"training"},
    {"forecast", "benchmarking", "evaluation"},
    {"train", "sample", "visualize", "evaluate", "encode", "convert", "preflight", "benchmark"},  # the commands
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room of a dotted module name below ig_jax, "" for the package itself."""
    return (module.split(".") + [""])[1]


@functools.cache
def imports() -> list[tuple[str, str, str]]:
    """(file, room, imported room) of every import, those inside functions too."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{relative}: relative imports hide the room they come from"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(str(relative), room, room_of(name)) for name in names if name.split(".")[0] == "ig_jax"]
    return found


def test_every_room_stands_on_a_floor():
    rooms = {room for _, room, _ in imports()} - {"__init__"}
    assert rooms == set(FLOOR)


def test_imports_only_run_down():
    upward = [
        f"{file} imports {target}"
        for file, room, target in imports()
        if room in FLOOR and target and target != room and FLOOR.get(target, len(FLOORS)) >= FLOOR[room]
    ]
    assert not upward, upward


def test_inside_a_room_no_two_files_import_each_other():
    """A circle of files, found by taking away whatever imports nothing that is left."""
    files = {
        ".".join(["ig_jax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                targets |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        arrows[name] = targets & files.keys() - {name, "ig_jax"}
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, sorted(arrows)


def test_no_import_is_hidden_from_the_running_program():
    hiding = [path.name for path in PACKAGE.rglob("*.py") if "TYPE_CHECKING" in path.read_text()]
    assert not hiding, hiding
