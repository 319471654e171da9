"""Which packages a machine may use: every refusal is one sentence that ends with the fix."""

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mmfn.errors import UserError
from mmfn.ops import portable
from mmfn.ops.packages import PACKAGES, fla, fla_conv, flash_attn, machine_of, overlay
from mmfn.ops.packages.package import Machine, Span, why_not
from mmfn.train.build.kernels import build_ops, planned_ops
from mmfn.train.config.schema import ModelSection
from tests.packages.fakes import installed
from tests.packages.table import VERSIONS, laid_over, machine
from tests.train.test_rules import config_of

HOPPER = "fla is refused with triton {}: gradients of the gated delta rule are wrong on Hopper with Triton 3.4.0 to "


@pytest.mark.parametrize("name", PACKAGES)
def test_a_machine_with_known_versions_may(name: str) -> None:
    for device in PACKAGES[name].needs:
        assert why_not(PACKAGES[name], machine(device)) is None


REFUSED: list[tuple[str, Machine, str]] = [
    ("fla", machine("cpu"), "fla has kernels for cuda and npu, not for cpu; remove 'fla' from model.kernel_packages"),
    ("flash-attn", machine("npu"), "flash-attn has kernels for cuda, not for npu; remove 'flash-attn' from model.k"),
    ("fla", machine(fla_core=None), "fla is not installed; pip install 'fla-core', or remove 'fla' from model.kern"),
    ("fla", machine(triton=None), "fla needs triton, which is not installed; pip install 'triton', or remove 'fla' f"),
    ("fla", machine("npu", triton_ascend=None), "fla needs triton-ascend, which is not installed; pip install 'trit"),
    ("flash-attn", machine(flash_attn=None), "flash-attn is not installed; pip install 'flash-attn', or remove"),
    *(("fla", machine(triton=version), HOPPER.format(version)) for version in ("3.4.0", "3.5.1", "3.6.0", "3.7.0")),
    ("fla", machine(generation=None, triton="3.6.0"), HOPPER.format("3.6.0")),
    ("fla", machine(fla_core="0.5.1"), "fla is refused with fla-core 0.5.1: its gated delta rule gives NaN at some"),
    ("fla", machine(fla_core="0.5.2"), "fla 0.5.2 is not among the versions whose functions were checked; pip install"),
    ("fla", machine(fla_core="0.7.0"), "fla 0.7.0 is not among .*pip install 'fla-core>=0.6,<0.7', or remove 'fla'"),
    ("flash-attn", machine(flash_attn="2.6.3"), "flash-attn is refused with flash-attn 2.6.3: its functions take w"),
    ("flash-attn", machine(flash_attn="2.9.0"), "flash-attn 2.9.0 is not among the versions whose functions were"),
    ("flash-attn", machine(flash_attn="3.0.0"), "flash-attn 3.0.0 is not among the versions whose functions were"),
]


@pytest.mark.parametrize(("name", "found", "sentence"), REFUSED)
def test_what_is_refused_by_name(name: str, found: Machine, sentence: str) -> None:
    with installed(), pytest.raises(UserError, match=f"^{sentence}") as error:
        overlay(portable(), [name], found)
    text = str(error.value)
    assert any(fix in text.rpartition("; ")[2] for fix in ("pip install", "install torch", "remove")), text


@pytest.mark.parametrize(("version", "generation"), [("3.3.1", 9), ("3.7.1", 9), ("3.6.0", 8), ("3.6.0", 10)])
def test_other_compilers_and_other_gpus_are_not_refused(version: str, generation: int) -> None:
    assert why_not(fla.PACKAGE, machine(generation=generation, triton=version)) is None
    assert why_not(fla.PACKAGE, machine("npu", triton="3.6.0")) is None, "there it is triton-ascend that compiles"


def test_versions_are_read_as_numbers() -> None:
    span = Span((2, 7), (2, 10))
    assert [span.has(v) for v in ("2.6.3", "2.7", "2.7.0.post2", "2.9.1+cu128", "2.10.0", "nightly")] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    assert str(span) == ">=2.7,<2.10"


def test_a_package_that_cannot_be_imported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    with pytest.raises(UserError, match=r"flash-attn cannot be imported \(undefined symbol: _ZN3c10\); install it for"):
        overlay(portable(), ["flash-attn"], machine())


def test_the_notes_say_what_was_laid_over() -> None:
    with installed():
        assert laid_over("flash-attn").notes[-1] == (
            "attention, attention_block, attention_block_grad by flash-attn 2.8.3.post2"
        )
        assert laid_over().notes[-2].endswith("causal_conv1d by fla 0.6.0")
    ops = portable()
    assert overlay(ops, [], None) is ops
    with pytest.raises(UserError, match="'flash' is no package of kernels; use one of 'fla', 'flash-attn'"):
        overlay(portable(), ["flash"], None)


def test_the_setting_names_all_packages() -> None:
    kinds = get_args(get_args(ModelSection.model_fields["kernel_packages"].annotation)[0])
    assert kinds == tuple(PACKAGES)


def test_a_run_asks_and_a_plan_does_not() -> None:
    section = ModelSection(path="x", device="cuda", kernels="portable", kernel_packages=("fla",))
    if machine_of("cuda").versions["fla-core"] is None:
        with pytest.raises(UserError, match="fla is not installed"):
            build_ops(section)
    planned = planned_ops(config_of({"model.device": "cuda", "model.kernel_packages": ["fla"]}))
    assert planned.notes[-1].endswith("causal_conv1d by fla")
    assert build_ops(ModelSection(path="x")).notes == portable().notes
    assert set(machine_of("npu").versions) == set(VERSIONS)


class OnDevice:
    """As far as the checks look."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda"), dtype, torch.Size(shape)


def test_what_kernels_lack_is_said() -> None:
    def check(dtype: torch.dtype, C: int, V: int) -> None:
        rows: Any = OnDevice(dtype, 3, 2, C), OnDevice(dtype, 3, 2, V)
        fla.check_kernel(*rows)

    check(torch.bfloat16, 256, 128)
    with pytest.raises(UserError, match=r"made for bfloat16 and float16 but got torch.float32; set layout.compute_"):
        check(torch.float32, 64, 64)
    for C, V in ((258, 64), (63, 64), (64, 63)):
        with pytest.raises(UserError, match=f"but these have {C} and {V}; remove 'fla' from model.kernel_packages"):
            check(torch.float16, C, V)
    wrong: Any = OnDevice(torch.float32, 3, 2, 64)
    with pytest.raises(UserError, match=r"attention of flash-attn is made for .*, or remove 'flash-attn' from"):
        flash_attn.check(wrong)
    x = torch.zeros(3, 4, dtype=torch.float64, device="meta")
    with pytest.raises(UserError, match=r"causal_conv1d of fla is made for .* but got torch.float64; remove 'fla'"):
        fla_conv.check_kernel(x)
