"""Figures of devices as files: what is written is read, and what is wrong is one sentence."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfn.parallel.planning import devices
from mmfn.train.planning.device_file import device_text, planned_device


@pytest.mark.parametrize("name", list(devices.DEVICES))
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    chosen, path = devices.device(name), str(tmp_path / "here.yaml")
    Path(path).write_text(device_text(chosen, ["measured", "here"]))
    found = planned_device(path)
    assert (found.name, found.kind, found.source) == (path, chosen.kind, chosen.source)
    assert Path(path).read_text().startswith("# measured\n# here\nkind: ")
    for key, value in asdict(chosen).items():
        if key not in ("name", "kind", "source"):
            assert getattr(found, key) == pytest.approx(value, rel=1e-3)
    assert type(found.memory_bytes) is type(found.ranks_per_node) is int


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one missing": (lambda d: d.pop("flops"), "lacks 'flops'; it may have kind, flops, "),
    "one too many": (lambda d: d.update(colour=1), "has an unknown 'colour'"),
    "a text": (lambda d: d.update(link="fast"), "link is 'fast' but should be a positive number"),
    "a truth": (lambda d: d.update(link=True), "link is True but should be a positive number"),
    "nothing": (lambda d: d.update(network=0), "network is 0 but should be a positive number"),
    "endless": (lambda d: d.update(network=float("inf")), "network is inf but should be a positive number"),
    "a number for a text": (lambda d: d.update(source=3), "source is 3 but should be text"),
    "a class missing": (lambda d: d["shares"].pop("attention"), "shares should have products, narrow products, "),
    "a share": (lambda d: d["shares"].update(attention=-1), "the share of attention is -1 but should be"),
    "a list": (lambda d: d.update(shares=[1]), "shares should have products"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_one_sentence(name: str, tmp_path: Path) -> None:
    change, expected = DAMAGE[name]
    values = yaml.safe_load(device_text(devices.device("cpu"), []))
    change(values)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"device file '.*bad.yaml'") as error:
        planned_device(str(path))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"), [("[", "cannot be read"), ("- 1", "holds no settings"), ("", "holds no")]
)
def test_what_is_no_device(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        planned_device(str(path))
    with pytest.raises(ValueError, match=r"cannot be read: .*; write one with mmfn calibrate --out FILE"):
        planned_device(str(tmp_path / "absent.yaml"))


def test_a_device_of_torch_is_like_one_of_the_table() -> None:
    assert devices.like("cuda", "NVIDIA GB200").name == "gb200"
    assert devices.like("cuda", "NVIDIA B200").name == "b200"
    assert devices.like("cuda", "NVIDIA A10G").name == "h100"
    assert devices.like("npu", "Ascend910_9362").name == "a3"
    assert devices.like("cpu", "").name == "cpu"
    with pytest.raises(ValueError, match="no figures of devices of type 'mps'"):
        devices.like("mps", "Apple M4")
