"""A lint: nothing that mmfn reads can run. No pickle, whatever brings it along."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmfn"
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
WRITING = {"dumps", "PicklingError"}  # of these modules, for what processes of one run tell each other
BUILTINS = {"eval", "exec", "compile"}
# What unpickles unless it is told not to, and the argument that tells it so.
READERS = {"load": ("weights_only", True), "safe_globals": None, "unsafe_load": None, "full_load": None}
# What looks every name up in a table of records without behaviour (tests/interop/test_convert.py plants code there).
TABLES = {"interop/safe_pickle.py": ["pickle.Unpickler"]}
OWNERS = {"torch", "np", "numpy", "serialization", "yaml", "dcp"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            if node.attr not in WRITING:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.asname and name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Call):
            yield from unsafe_call(node)


def unsafe_call(node: ast.Call) -> Iterator[tuple[int, str]]:
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
        yield node.lineno, node.func.id
    if not isinstance(node.func, ast.Attribute) or not isinstance(node.func.value, ast.Name):
        return
    owner, name = node.func.value.id, node.func.attr
    if owner not in OWNERS or name not in READERS:
        return
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if owner == "yaml" and name == "load":
        loader = given.get("Loader")
        is_safe = isinstance(loader, ast.Name) and "Loader" in loader.id
    elif owner in ("np", "numpy"):
        is_safe = "allow_pickle" not in given
    else:
        only = given.get("weights_only")
        is_safe = isinstance(only, ast.Constant) and only.value is True
    if not is_safe:
        yield node.lineno, f"{owner}.{name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_ever_unpickled(path: Path) -> None:
    found = [what for _, what in unsafe(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == TABLES.get(path.relative_to(PACKAGE).as_posix(), [])


@pytest.mark.parametrize(
    "text",
    [
        "import pickle; pickle.loads(x)",
        "import pickle as p",
        "from pickle import loads",
        "marshal.loads(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "eval(x)",
        "class Reader(pickle.Unpickler): pass",
    ],
)
def test_the_lint_finds_it(text: str) -> None:
    assert list(unsafe(ast.parse(text)))


def test_the_lint_leaves_what_is_safe() -> None:
    text = "pickle.dumps(x); torch.load(f, weights_only=True); yaml.load(f, Loader=_YamlLoader); np.load(f)"
    assert not list(unsafe(ast.parse(text)))
