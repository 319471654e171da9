"""Who may import whom, how large files may be, and what importing costs. The rooms are those of docs/house.py."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOUSE = load_house()
MODULES: dict[str, Path] = HOUSE.modules()


def test_every_arrow_is_one_that_is_allowed() -> None:
    wrong = {arrow: names for arrow, names in HOUSE.arrows().items() if arrow[1] not in HOUSE.ROOMS[arrow[0]]}
    assert wrong == {}


def test_rooms_do_not_allow_what_nobody_draws_upwards() -> None:
    """Models know neither interop nor programs nor runs; programs know no models; nobody but runs knows runs."""
    for room, targets in HOUSE.ROOMS.items():
        tops = {target.split(".")[0] for target in targets}
        if room in ("core", "ops", "models"):
            assert tops <= {"core", "ops"}, room
        if room.startswith("parallel"):
            assert tops <= {"core", "ops", "parallel"}, room
        if not room.startswith("train"):
            assert "train" not in tops, room


def test_the_drawing_on_the_page_is_that_of_today() -> None:
    assert HOUSE.PAGE.read_text(encoding="utf-8") == HOUSE.page(), "run make house"


@pytest.mark.parametrize("name", MODULES)
def test_foreign_packages_stay_where_they_belong(name: str) -> None:
    """The core, models and programs need torch and optree alone; torch.distributed is for programs, and its writer of
    checkpoints for who converts to them.
    """
    room, imported = HOUSE.room_of(name), HOUSE.imports(MODULES[name])
    if not room.startswith("parallel") and name != "mmfn.interop.dcp_write":
        assert not any(other.startswith("torch.distributed") for other in imported)
    if room.startswith(("interop", "train")):
        return
    allowed = {"mmfn", "torch", "optree", *sys.stdlib_module_names}
    if name == "mmfn.serialize":
        allowed.add("msgpack")
    assert {other.split(".")[0] for other in imported} <= allowed


def test_files_are_small_and_functions_short() -> None:
    """What a reader holds in mind at once: at most 450 lines, half of them 180, functions of 60, 25 imports."""
    lengths, long_functions, many_imports = {}, [], []
    for name, path in {**MODULES, "mmfn.cli": ROOT / "mmfn" / "cli.py"}.items():
        text = path.read_text(encoding="utf-8")
        lengths[name], parsed = text.count("\n"), ast.parse(text)
        for node in ast.walk(parsed):
            if (
                isinstance(node, ast.FunctionDef)
                and node.end_lineno is not None
                and node.end_lineno - node.lineno >= 60
            ):
                long_functions.append(f"{name}.{node.name}: {node.end_lineno - node.lineno + 1}")
        many_imports += [f"{name}: {count}"] if (count := num_imports(parsed)) > 25 else []
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}
    assert median(lengths.values()) <= 180
    assert long_functions == []
    assert many_imports == []


def test_files_of_tests_are_small_too() -> None:
    """At most 450 lines and 25 imports: what several files set up is in a file of cases."""
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert len(texts) > 100
    assert {name: lines for name, text in texts.items() if (lines := text.count("\n")) > 450} == {}
    assert {name: num for name, text in texts.items() if (num := num_imports(ast.parse(text))) > 25} == {}


def num_imports(module: ast.Module) -> int:
    """Import statements at the top of a file."""
    return sum(isinstance(node, ast.Import | ast.ImportFrom) for node in module.body)


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
    names = [*MODULES, "mmfn", "mmfn.cli"]
    loaded = loaded_by("\n".join(f"import {n}" for n in names))
    assert set(names) <= loaded
    assert not loaded & {"torch_npu", "sklearn", "transformers", "torchvision", "triton"}
