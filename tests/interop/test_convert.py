"""Folders of torch.distributed.checkpoint: what its own reader and writer take and give, and what is refused."""

import os
import pickle
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import mmfn
from mmfn import tree
from mmfn.errors import UserError
from mmfn.interop.convert import dcp_to_hf, hf_to_dcp
from mmfn.interop.dcp_names import Prefixes
from mmfn.interop.dcp_read import find_folder, open_dcp
from tests import tiny
from tests.interop import whole_export

NAMES = [name for name in tiny.TINY if name != "toy"]
WAYS: dict[str, dict[str, Any]] = {
    "meg": {"prefix": "model.", "experts": "flat"},
    "native": {"prefix": "", "experts": "merged"},
    "plain": {"prefix": "", "experts": "hub"},
}


def source_of(name: str, folder: Path) -> Path:
    """A checkpoint of a tiny model in two files, whose leaves are not all of one dtype."""
    model = tiny.model_of(name)
    params = tree.map(lambda leaf: leaf.to(torch.float32 if leaf.ndim == 1 else torch.bfloat16), model.params)
    mmfn.save_hf(folder, replace(model, params=params), max_shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors, as torch.distributed.checkpoint reads them into a plain state."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in entries.items()
        if isinstance(one, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def store(folder: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {n: v for file in folder.glob("*.safetensors") for n, v in load_file(file).items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trips_are_bitwise(name: str, way: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path / "source")
    hf_to_dcp(source, tmp_path / "dcp", **WAYS[way])
    assert (tmp_path / "dcp" / "latest_checkpointed_iteration.txt").read_text() == "release"
    stored = load(tmp_path / "dcp" / "release")
    prefix = f"model.{WAYS[way]['prefix']}"
    assert all(key.startswith(prefix) for key in stored)
    plain = tensors_in(source)
    assert sum(value.nbytes for value in stored.values()) == sum(value.nbytes for value in plain.values())
    for key, value in plain.items():
        if ".experts." not in key or way == "plain":
            assert torch.equal(stored[prefix + key], value)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", model=source)
    found = tensors_in(tmp_path / "out")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in plain.items())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["moe", "glm", "delta_moe"])
@pytest.mark.parametrize("is_flat", [True, False])
def test_experts_are_merged_as_written_out(name: str, is_flat: bool, tmp_path: Path) -> None:
    """[E, in, out] of gate and up side by side, and of down: made here by hand from single matrices."""
    model = tiny.model_of(name)
    model = replace(model, params=tree.map(lambda leaf: leaf.float(), model.params))
    mmfn.save_hf(tmp_path / "source", model)
    hf_to_dcp(tmp_path / "source", tmp_path / "dcp", experts="flat" if is_flat else "merged")
    stored = load(tmp_path / "dcp" / "release")
    layer = max(i for i, block in enumerate(model.params["text"]["layers"]) if "moe" in block)
    experts = model.params["text"]["layers"][layer]["moe"]["experts"]
    head = f"model.model.model.language_model.layers.{layer}.mlp.experts."
    for key, leaf in (("gate_up_proj", experts["gate_up"]), ("down_proj", experts["down"])):
        want = torch.stack([matrix.T for matrix in leaf])
        assert torch.equal(stored[head + key], want.reshape(-1, want.shape[-1]) if is_flat else want)


def test_a_part_alone_gets_the_rest_from_the_original(tmp_path: Path) -> None:
    """A thinker without its prefix, trained apart; talker and blocks ahead are those of the original."""
    for name, lacks in (("omni", "talker."), ("delta_moe", "mtp.")):
        source = source_of(name, tmp_path / name)
        file = next(source.glob("*-00001-*"))
        if name == "omni":
            more = {"talker.head.weight": torch.randn(3, 5), "code2wav.scale": torch.tensor(2.0)}
            save_file(load_file(file) | more, file, metadata={"format": "pt"})
            index = (source / "model.safetensors.index.json").read_text()
            entries = "".join(f'"{key}": "{file.name}",' for key in more)
            (source / "model.safetensors.index.json").write_text(
                index.replace('"weight_map": {', '"weight_map": {' + entries)
            )
        plain = tensors_in(source)
        trained = {
            key.removeprefix("thinker."): value + 1
            for key, value in plain.items()
            if not key.startswith((lacks, "code2wav."))
        }
        store(tmp_path / f"{name} dcp" / "iter_0000020", {"model": trained, "optimizer": {"step": torch.tensor(3)}})
        (tmp_path / f"{name} dcp" / "latest_checkpointed_iteration.txt").write_text("20")
        dcp_to_hf(tmp_path / f"{name} dcp", tmp_path / f"{name} out", model=source)
        found = tensors_in(tmp_path / f"{name} out")
        assert found.keys() == plain.keys()
        for key, value in plain.items():
            change = 0 if key.startswith((lacks, "code2wav.")) else 1
            assert torch.equal(found[key], value + change), key


def test_what_is_beside_the_model_goes_over_and_back(tmp_path: Path) -> None:
    source = source_of("omni", tmp_path / "source")
    (file,) = source.glob("*-00001-*")
    more = {"talker.head.weight": torch.randn(3, 5).bfloat16(), "talker.empty": torch.empty(0, 4)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").unlink()
    save_file(tensors_in(source), source / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("model-*"):
        path.unlink()
    hf_to_dcp(source, tmp_path / "dcp")
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", model=source)
    found, plain = tensors_in(tmp_path / "out"), tensors_in(source)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in plain.items())


def test_a_tied_head_is_stored_where_asked(tmp_path: Path) -> None:
    source = source_of("dense", tmp_path / "source")
    hf_to_dcp(source, tmp_path / "dcp", has_head=True)
    stored = load(tmp_path / "dcp" / "release")
    head = stored["model.model.lm_head.weight"]
    assert torch.equal(head, stored["model.model.model.language_model.embed_tokens.weight"])
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", model=source)
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")


def test_bfloat16_where_nothing_wider_is_declared(tmp_path: Path) -> None:
    model = tiny.model_of("glm")
    mmfn.save_hf(tmp_path / "source", replace(model, params=tree.map(lambda leaf: leaf.float(), model.params)))
    hf_to_dcp(tmp_path / "source", tmp_path / "dcp")
    dcp_to_hf(
        tmp_path / "dcp", tmp_path / "out", model=tmp_path / "source", dtype=torch.bfloat16, layout="transformers"
    )
    want = mmfn.load_hf(tmp_path / "source", dtype=torch.bfloat16)
    whole_export.write(tmp_path / "want", whole_export.tensors_of(want, "transformers"), 5_000_000_000)
    assert whole_export.content(tmp_path / "out") == whole_export.content(tmp_path / "want")
    assert '"dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()


def test_tensors_in_pieces_of_ranks(tmp_path: Path) -> None:
    """As FSDP saves them: each rank its rows, and a transposed one; all are put together."""
    from torch.multiprocessing.spawn import spawn

    spawn(save_rank, (str(tmp_path),), 3)
    stored = open_dcp(find_folder(tmp_path / "dcp"))
    assert torch.equal(stored["model.a"].read(), torch.arange(35.0).view(7, 5))
    assert torch.equal(stored["model.a"].read(((1, 6), (2, 4))), torch.arange(35.0).view(7, 5)[1:6, 2:4])
    assert torch.equal(stored["model.b"].read(), torch.arange(6).view(2, 3).T)
    assert torch.equal(stored["model.c"].read(), torch.tensor(2.5))
    assert set(stored) == {"model.a", "model.b", "model.c"}


def save_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    a = distribute_tensor(torch.arange(35.0).view(7, 5), init_device_mesh("cpu", (3,)), [Shard(0)])
    state = {"a": a, "b": torch.arange(6).view(2, 3).T, "c": torch.tensor(2.5), "note": "text"}
    dcp.save({"model": state}, checkpoint_id=f"{folder}/dcp")
    dist.destroy_process_group()


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['BOMB']}",)


@pytest.mark.parametrize("place", ["metadata", "index", "object", "tensor"])
def test_nothing_that_is_stored_is_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    source = source_of("dense", tmp_path / "source")
    hf_to_dcp(source, tmp_path / "dcp")
    folder = tmp_path / "dcp" / "release"
    metadata = FileSystemReader(folder).read_metadata()
    if place == "metadata":
        metadata.planner_data["x"] = Bomb()
    if place == "index":
        metadata.storage_data[Bomb] = os.system  # a name alone
    if place in ("metadata", "index"):
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    if place == "object":
        store(tmp_path / "other", {"model": {"x": torch.ones(2), "bomb": Bomb()}})
        assert list(open_dcp(tmp_path / "other")) == ["model.x"]  # it is no tensor: not read at all
    if place == "tensor":
        file = folder / "__0_0.distcp"
        file.write_bytes(
            file.read_bytes().replace(b"ctorch._utils\n_rebuild_tensor_v2", b"cposix\nsystem" + b"\n" * 18)
        )
    if place != "object":
        with pytest.raises(ValueError, match=r"may run code; nothing of it was run|is damaged"):
            dcp_to_hf(tmp_path / "dcp", tmp_path / "out", model=source)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert pickle.loads(pickle.dumps(Bomb())) == 0  # it works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_one_sentence(seed: int, tmp_path: Path) -> None:
    """A flipped byte or a cut anywhere in the metadata, or a file cut short or missing: refused, or no difference."""
    r = random.Random(seed)
    store(tmp_path / "dcp", {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5)}})
    path = tmp_path / "dcp" / (".metadata" if seed % 2 else r.choice(["__0_0.distcp", "__0_1.distcp"]))
    data = bytearray(path.read_bytes())
    if seed % 2 and seed % 3:
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    else:
        del data[r.randrange(len(data)) // 2 :]
    path.write_bytes(data)
    said, found = "", {}
    try:
        found = {name: tensor.read() for name, tensor in open_dcp(tmp_path / "dcp").items()}
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    if said:
        assert str(tmp_path / "dcp") in said
    else:  # a letter of a name, or what is not read
        assert seed % 2
        assert all(value.shape in {(3, 4), (5,)} for value in found.values())


def test_prefixes_and_folders_are_found_or_named(tmp_path: Path) -> None:
    source = source_of("dense", tmp_path / "source")
    plain = tensors_in(source)
    store(tmp_path / "a", {"module": {f"net.{key}": value for key, value in plain.items()}})
    with pytest.raises(ValueError, match=r"no tensor has a name of this model, such as 'model\..*but 'module.net"):
        dcp_to_hf(tmp_path / "a", tmp_path / "out", model=source)
    dcp_to_hf(tmp_path / "a", tmp_path / "out", model=source, prefixes=Prefixes(cut="module.net.", put=""))
    assert tensors_in(tmp_path / "out").keys() == plain.keys()
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        dcp_to_hf(tmp_path / "a", tmp_path / "out", model=source)
    del plain["model.language_model.norm.weight"]
    store(tmp_path / "b" / "release", {"model": plain})
    with pytest.raises(ValueError, match=r"b/release lacks tensor 'model.language_model.norm.weight' for parameter"):
        dcp_to_hf(tmp_path / "b", tmp_path / "out2", model=source)
    (tmp_path / "b" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ValueError, match=r"names '7' but .*iter_0000007 has no .metadata"):
        dcp_to_hf(tmp_path / "b", tmp_path / "out2", model=source)
    with pytest.raises(ValueError, match="and none in it has one; name one folder"):
        find_folder(source)
    assert not (tmp_path / "out2").exists()
