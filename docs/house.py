"""Draws which package of mmfn imports which into docs/architecture.md: `make house`.

`ROOMS` names every package, from the ground up, and what each may import: the drawing shows what they do import, and
tests/test_imports.py holds the two against each other. A file belongs to the room with the longest name that fits it.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "architecture.md", "<!-- drawn by make house -->", "<!-- end of the drawing -->"

CORE = ("core", "ops")
PROGRAMS = ("parallel.mesh", "parallel.weights", "parallel.context", "parallel.program", "parallel.transforms")
STEP = ("train", "train.optim", "train.data")
RUNS = ("train.config", "train.build", "train.run")
ROOMS: dict[str, tuple[str, ...]] = {
    "core": ("ops",),
    "ops": ("core",),
    "models": CORE,
    "model": (*CORE, "models"),
    "interop": (*CORE, "models", "model"),
    "parallel.mesh": CORE,
    "parallel.weights": (*CORE, "parallel.mesh"),
    "parallel.context": (*CORE, "parallel.mesh"),
    "parallel.program": (*CORE, "parallel.mesh", "parallel.weights"),
    "parallel.transforms": (*CORE, "parallel.mesh", "parallel.weights", "parallel.context", "parallel.program"),
    "parallel.planning": (*CORE, *PROGRAMS),
    "train": (*CORE, "models", "model", *PROGRAMS, "train.optim"),
    "train.optim": (*CORE, "parallel.mesh", "parallel.weights", "train"),
    "train.data": (*CORE, "models", "model", *PROGRAMS, "train"),
    "train.config": (*CORE, "models", *PROGRAMS, "train"),
    "train.build": (*CORE, "models", "model", "interop", *PROGRAMS, *STEP, "train.config", "train.run"),
    "train.checkpoint": (*CORE, "models", "interop", "parallel.mesh", "parallel.weights"),
    "train.run": (
        *(*CORE, "models", "model", "interop", *PROGRAMS, "parallel.planning", *STEP, *RUNS),
        *("train.checkpoint", "train.report"),
    ),
    "train.planning": (
        *(*CORE, "models", "model", "interop", *PROGRAMS, "parallel.planning", *STEP, *RUNS),
        "train.checkpoint",
    ),
    "train.report": (*CORE, "train", "train.data", *RUNS),
    "train.survey": ("core", "models", "train.data", "train.report"),
    "train.benchmarks": (*CORE, "models", "parallel.mesh", "train", "train.data", "train.run"),
    "train.evidence": (*CORE, "model", "interop", *PROGRAMS, *STEP, *RUNS, "train.checkpoint"),
    "train.doctor": ("core", "ops", "parallel.mesh", "parallel.planning", "train.evidence"),
    "train.commands": (
        *(*CORE, "models", "model", "interop", *PROGRAMS, "parallel.planning", *STEP, *RUNS),
        *("train.planning", "train.report", "train.survey", "train.evidence", "train.benchmarks", "train.doctor"),
    ),
}
"""Room -> the rooms it may import. "core": the modules of mmfn itself; "train": those that lie in it alone."""
EXCEPTIONS = {"mmfn.interop.module": ("train",)}  # the nn.Module view of a model can return its loss
SURFACE = ("mmfn", "mmfn.__main__", "mmfn.arguments", "mmfn.cli")  # these import everything, lazily


def modules() -> dict[str, Path]:
    """The files of the package by the name of their module, but the lazy surface."""
    found = {_module_name(path): path for path in sorted((ROOT / "mmfn").rglob("*.py"))}
    return {name: path for name, path in found.items() if name not in SURFACE}


def room_of(module: str) -> str:
    """The room of a module, or of a name in one."""
    inner = module.removeprefix("mmfn").removeprefix(".")
    return max((room for room in ROOMS if inner == room or inner.startswith(room + ".")), key=len, default="core")


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


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, another it imports) -> the modules that do; without `EXCEPTIONS`."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, path in modules().items():
        others = {room_of(other) for other in imports(path) if other.split(".")[0] == "mmfn"}
        for other in others - {room_of(name), *EXCEPTIONS.get(name, ())}:
            found.setdefault((room_of(name), other), []).append(name)
    return found


def page() -> str:
    """The page with the drawing of today between its marks: a table, and a graph of packages without the core."""
    drawn = arrows()
    rows = ["| room | imports |", "|---|---|"]
    rows += [f"| `{room}` | {', '.join(b for a, b in sorted(drawn) if a == room)} |" for room in ROOMS]
    tops = {(a.split(".")[0], b.split(".")[0]) for a, b in drawn}
    graph = [f"    {a} --> {b}" for a, b in sorted(tops) if a != b and b not in CORE]
    text = "\n".join([*rows, "", "```mermaid", "graph TD", *graph, "```"])
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{len(arrows())} arrows between {len(ROOMS)} rooms\n")
