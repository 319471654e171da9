"""Who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = (
    "errors",
    "tree",
    "spec",
    "rng",
    "grad",
    "batch",
    "packing",
    "dims",
    "dtypes",
    "serialize",
    "lora",
    "dropout",
    "ops",
    "torch_private",
)
FILES = sorted((ROOT / "mmfn").rglob("*.py"))

# Package -> what it may import of mmfn besides the core. A name stands for itself and everything below it.
MAY_IMPORT = {
    **dict.fromkeys(CORE, ()),
    "models": ("models",),  # key maps and config readers are theirs: interop reads them, never the other way round
    "parallel": ("parallel",),
    "model": ("models",),
    "interop": ("interop", "models", "model"),
    "train": ("train", "parallel", "interop", "models", "model"),
}
EXCEPTIONS = {"mmfn.interop.module": ("train.objective",)}  # the nn.Module view of a model can return its loss
SURFACE = ("mmfn", "mmfn.__main__", "mmfn.cli")  # these import everything, lazily


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module or name imported anywhere in a file, as full dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p))
def test_direction_of_imports(path: Path) -> None:
    name = module_name(path)
    if name in SURFACE:
        return
    (own,) = [may for package, may in MAY_IMPORT.items() if below(name, f"mmfn.{package}")]
    allowed = [f"mmfn.{package}" for package in (*CORE, *own, *EXCEPTIONS.get(name, ()))]
    for imported in imports(path):
        if below(imported, "mmfn"):
            assert any(below(imported, package) for package in allowed), f"{name} must not import {imported}"
        if below(imported, "torch.distributed"):
            assert below(name, "mmfn.parallel") or below(name, "mmfn.train.checkpoint"), f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p))
def test_core_needs_torch_and_optree_only(path: Path) -> None:
    name = module_name(path)
    if not any(below(name, p) for p in ("mmfn.models", "mmfn.parallel", *(f"mmfn.{n}" for n in CORE))):
        return
    allowed = {"mmfn", "torch", "optree", *sys.stdlib_module_names}
    if name == "mmfn.serialize":
        allowed.add("msgpack")
    assert {i.split(".")[0] for i in imports(path)} <= allowed


def loaded_by(code: str) -> set[str]:
    """Names of the modules a new interpreter has loaded after running `code`."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(out.stdout.split())


def test_import_mmfn_does_no_work() -> None:
    loaded = loaded_by("import mmfn; dir(mmfn)")
    assert "mmfn" in loaded
    assert not loaded & {"torch", "numpy", "optree", "transformers", "mmfn.models", "mmfn.train"}


def test_importing_every_module_needs_nothing_optional() -> None:
    names = [module_name(p) for p in FILES if not p.name.startswith("__main__")]
    loaded = loaded_by("\n".join(f"import {n}" for n in names))
    assert set(names) <= loaded
    assert not loaded & {"torch_npu", "sklearn", "transformers", "torchvision", "triton"}
