"""Writing folders of torch.distributed.checkpoint by its own writer, one tensor after the other in memory."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

MODEL = "model"  # of the state's entries the one with weights
BESIDE = {"checkpoint_version": 3.0}  # what trainers that grew out of Megatron look for


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that `read` makes when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have no values, and makes each of them when it is written."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The values of a tensor."""
        name = write_item.index.fqn.removeprefix(f"{MODEL}.")
        if name not in self.tensors:
            return super().resolve_data(write_item)
        tensor = self.tensors[name]
        values = tensor.read().contiguous()
        assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype), name
        return values


def write(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors under `model`, as torch.distributed.checkpoint reads them; the files are durable then.

    Raises OSError when the disk does not take it.
    """
    model = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # disabled, as meant: this is one process
        writer = FileSystemWriter(folder, thread_count=1, single_file_per_rank=True, sync_files=True)
        try:
            save({MODEL: model, **BESIDE}, storage_writer=writer, planner=_Planner(tensors), no_dist=True)
        except CheckpointException as error:  # a BaseException around what was raised
            raise next(cause for cause, _ in error.failures.values()) from error
