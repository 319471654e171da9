"""Draws which package of mmfn imports which, into docs/architecture.md: `make house`.

`ROOMS` names every package, from the ground up, and what each may import: the drawing shows what they do import, and
tests/test_imports.py holds both against each other. A file belongs to the room with the longest name that fits.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "architecture.md", "<!-- house: made by `make house` -->", "<!-- end of house -->"

CORE = ("core", "ops")
PARALLEL = ("parallel.mesh", "parallel.weights", "parallel.context", "parallel.program", "parallel.transforms")
TRAIN = ("train", "train.optim", "train.data")
ROOMS: dict[str, tuple[str, ...]] = {
    "core": ("ops",),
    "ops": ("core",),
    "models": CORE,
    "interop": (*CORE, "models"),
    "parallel.mesh": CORE,
    "parallel.weights": (*CORE, "parallel.mesh"),
    "parallel.context": (*CORE, "parallel.mesh"),
    "parallel.program": (*CORE, "parallel.mesh", "parallel.weights"),
    "parallel.transforms": (*CORE, "parallel.mesh", "parallel.weights", "parallel.context", "parallel.program"),
    "parallel.planning": (*CORE, *PARALLEL),
    "train": (*CORE, "models", *PARALLEL, "train.optim"),
    "train.optim": (*CORE, "parallel.mesh", "parallel.weights", "train"),
    "train.data": (*CORE, "models", *PARALLEL, "train"),
    "train.config": (*CORE, "models", "train"),
    "train.build": (*CORE, "models", "interop", *PARALLEL, *TRAIN, "train.config", "train.run"),
    "train.run": (*CORE, "models", "interop", *PARALLEL, *TRAIN, "train.config", "train.build", "train.report"),
    "train.planning": (
        *CORE,
        "models",
        "interop",
        *PARALLEL,
        "parallel.planning",
        *TRAIN,
        "train.config",
        "train.build",
    ),
    "train.report": (*CORE, "train", "train.run"),
}
"""Room -> the rooms it may import. "core": mmfn's own modules; "train": the modules that lie in it alone."""


def files() -> list[Path]:
    """The modules of the package, but the lazy surface (`mmfn`, its command line), which may import everything."""
    surface = {"__init__", "__main__", "cli"}
    found = sorted((ROOT / "mmfn").rglob("*.py"))
    return [path for path in found if path.parent.name != "mmfn" or path.stem not in surface]


def module_name(path: Path) -> str:
    """`mmfn.ops.norm` of its file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module, or of a name in one."""
    inner = module.removeprefix("mmfn").removeprefix(".")
    fitting = [room for room in ROOMS if inner == room or inner.startswith(room + ".")]
    return max(fitting, key=len, default="core")


def imports(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows() -> dict[tuple[str, str], int]:
    """`(from, to)` -> how many files of a room import something of another."""
    found: dict[tuple[str, str], int] = {}
    for path in files():
        room = room_of(module_name(path))
        for other in {room_of(name) for name in imports(path) if name.split(".")[0] == "mmfn"} - {room}:
            found[room, other] = found.get((room, other), 0) + 1
    return found


def drawing() -> str:
    """A table of rooms and a Mermaid graph without the arrows to the core, which everything has."""
    counts = {room: [p for p in files() if room_of(module_name(p)) == room] for room in ROOMS}
    lines = ["| room | files | lines | imports |", "|---|---|---|---|"]
    for room, paths in counts.items():
        lines_of = sum(path.read_text(encoding="utf-8").count("\n") for path in paths)
        targets = ", ".join(b for a, b in sorted(arrows()) if a == room)
        lines.append(f"| `{room}` | {len(paths)} | {lines_of:,} | {targets} |")
    graph = [f"    {a} --> {b}" for a, b in sorted(arrows()) if b not in CORE and a not in CORE]
    return "\n".join([*lines, "", "```mermaid", "graph TD", *graph, "```"])


def page(text: str) -> str:
    """The page with the drawing of today between its marks."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n\n" + drawing() + "\n\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(text), encoding="utf-8")
    sys.stdout.write(f"{len(arrows())} arrows between {len(ROOMS)} rooms\n")
