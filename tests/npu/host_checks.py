"""Single calls on NPUs that are none, in a process of their own: `python -m tests.npu.host_checks`.

One line of JSON: the kernels that calls get to, and what the wheel's host checks say to wrong ones.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.ops.npu import npu
from tests.npu import stub
from tests.npu.device import OnHost, kernel_reached


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="npu:0")


def attend(**choice: Any) -> None:
    where = Segments.of(torch.tensor([0, 16, 32], dtype=torch.int32))
    npu(**choice).attention(*(empty(32, 4, 32) for _ in range(3)), where, is_causal=True)


RIGHT: dict[str, Callable[[], Any]] = {
    "BNSD": partial(attend, layout="BNSD"),
    "BSND": partial(attend, layout="BSND"),
    "tensor": partial(attend, lengths="tensor"),
    "wide weight of a norm": lambda: npu().rms_norm(empty(4, 64), empty(64, dtype=torch.float32), 1e-6),
}


def reached(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call gets to."""
    with OnHost(torch.device("npu", 0)) as seen:
        call()
    return sorted(str(name) for names in seen.kernels.values() for name in names)


def wrong() -> dict[str, Callable[[], Any]]:
    q, ends = empty(48, 4, 32), {"actual_seq_qlen": [16, 48], "actual_seq_kvlen": [16, 48]}
    rows, weights = empty(96, 64), empty(8, 64, 32)
    groups = {"group_list": empty(8, dtype=torch.int64), "group_list_type": 0}
    attend, multiply = torch.ops.npu.npu_fusion_attention, torch.ops.npu.npu_grouped_matmul
    send, counts = torch.ops.npu.npu_alltoallv_gmm, [2] * 48
    return {
        "unknown layout": lambda: attend(q, q, q, 4, "XYZ", **ends),
        "no lengths": lambda: attend(q, q, q, 4, "TND"),
        "sparse mode 99": lambda: attend(q, q, q, 4, "TND", sparse_mode=99, **ends),
        "sparse mode 5 of packed rows": lambda: attend(q, q, q, 4, "TND", sparse_mode=5, **ends),
        "keep probability 2": lambda: attend(q, q, q, 4, "TND", keep_prob=2.0, **ends),
        "split item 7": lambda: multiply([rows], [weights], split_item=7, group_type=0, **groups),
        "weights of two dims": lambda: send(rows, weights[0], "comm", 8, counts, counts),
        "fewer rows than none": lambda: send(rows, weights, "comm", 8, counts, [-2] * 48),
        "group type 9": lambda: multiply([rows], [weights], split_item=2, group_type=9, **groups),
    }


def refusal(call: Callable[[], Any]) -> str:
    """What it says, "" where it gets to a kernel."""
    try:
        kernel_reached(call)
    except (RuntimeError, ValueError, IndexError) as error:
        return str(error).partition("\n")[0]
    return ""


def main() -> None:
    backend = stub.load()._C._distributed_c10d.ProcessGroupHCCL
    found = {name: reached(call) for name, call in RIGHT.items()}
    refused = {name: refusal(call) for name, call in wrong().items()}
    print(json.dumps({"reached": found, "refused": refused, "of groups": dir(backend)}))


if __name__ == "__main__":
    main()
