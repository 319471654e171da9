"""The ready configs: one for every published size, device and way to train; each fits as its head says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mmfn import cli
from mmfn.train.planning.suggest import Measures

ROOT = Path(__file__).parents[2]
FAST = {("Qwen3-VL-2B", False), ("Qwen3-VL-30B-A3B", True)}


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configs", ROOT / "configs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generate()
CASES = [
    pytest.param(
        size,
        is_lora,
        id=f"{size.model}{'-lora' * is_lora}",
        marks=[] if (size.model, is_lora) in FAST else pytest.mark.slow,
    )
    for size in GENERATE.SIZES
    for is_lora in (False, True)
]


def test_every_published_size_has_them_and_nothing_else_is_there() -> None:
    expected = {
        GENERATE.path_of(size, device, is_lora=is_lora)
        for size in GENERATE.SIZES
        for device in GENERATE.DEVICES
        for is_lora in (False, True)
    }
    assert set((ROOT / "configs").glob("*/*.yaml")) == expected
    assert {size.model for size in GENERATE.SIZES} == {path.parent.name for path in ROOT.glob("configs/models/*/*")}
    assert len(expected) == 6 * len(GENERATE.SIZES)


@pytest.mark.parametrize(("size", "is_lora"), CASES)
def test_it_fits_as_its_head_says(size: object, is_lora: bool) -> None:
    """Planned again, the file is the same to the letter."""
    measures = Measures(GENERATE.SAMPLE_TOKENS)
    for device in GENERATE.DEVICES:
        path = GENERATE.path_of(size, device, is_lora=is_lora)
        choice = GENERATE.refresh(size, device, measures, is_lora=is_lora)
        assert choice.fits
        assert path.read_text(encoding="utf-8") == GENERATE.text_of(size, choice, path), "run make configs"


@pytest.mark.parametrize(("size", "is_lora"), CASES)
def test_it_passes_all_checks(size: object, is_lora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for files that are not here; that it fits is planned above."""
    for device in GENERATE.DEVICES:
        path = GENERATE.path_of(size, device, is_lora=is_lora)
        moved = [f"model.path={ROOT / 'configs' / 'models' / size.model}", f"output.path={tmp_path / 'run'}"]
        world = str(size.lora_world if is_lora else size.world)
        assert cli.main(["check", str(path), "--no-files", "--world", world, *moved, "model.device=mps"]) == 0
        assert "nothing is wrong" in capsys.readouterr().out
