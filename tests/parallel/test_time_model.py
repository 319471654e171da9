"""The model of a step's time, by numbers worked out by hand, and the account of work that it reads."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning import account, devices
from mmfn.parallel.planning.account import ATTENTION, BYTES, FLOPS, FUSED_BYTES, FUSED_LAUNCHES, LARGE, LAUNCHES, MEMORY
from mmfn.parallel.planning.time_model import Transfer, predict, ranks_in_node, wire_bytes
from mmfn.parallel.planning.trace import Recorder, Trace

PLAIN = replace(
    devices.device("h100"),
    flops=1000.0,
    memory_bandwidth=100.0,
    link=40.0,
    network=10.0,
    host_link=20.0,
    shares=dict.fromkeys(devices.device("h100").shares, 0.5),
    memory_share=0.8,
    link_share=0.5,
    network_share=0.5,
    launch_s=0.25,
    call_s=0.0,
    hop_s=0.0,
    network_hop_s=0.0,
    transfer_units=0.0,
)
"""Round numbers: 500 FLOPs and 80 bytes a second, 20 over links, 5 over the network, 10 to the host."""


def transfer(op: str = "all_gather", **changes: Any) -> Transfer:
    return Transfer(**{"op": op, "count": 1, "wire_bytes": 60, "size": 4, "node_size": 4, "is_ahead": False, **changes})


def test_each_class_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    work = Counter(
        {
            ("forward", LARGE, FLOPS): 1000,  # 2 s, its traffic half a second
            ("forward", LARGE, BYTES): 40,
            ("backward", ATTENTION, FLOPS): 250,
            ("backward", ATTENTION, BYTES): 240,  # 3 s
            ("forward", MEMORY, BYTES): 80,  # 1 s, fused half
            ("forward", MEMORY, FUSED_BYTES): 40,
            ("update", MEMORY, BYTES): 160,  # 2 s
        }
    )
    time = predict(work, [], PLAIN)
    assert time.classes == {LARGE: 2.0, ATTENTION: 3.0, MEMORY: 1.0}
    assert (time.compute_s, time.update_s, time.total_s) == (6.0, 2.0, 8.0)
    assert time.hfu == 1250 / (8 * 1000)
    assert predict(work, [], PLAIN, is_fused=True).classes == {LARGE: 2.0, ATTENTION: 0.5, MEMORY: 0.5}


def test_a_slow_host_is_the_bound() -> None:
    work = Counter({("forward", LARGE, FLOPS): 500, ("forward", LARGE, LAUNCHES): 3, ("forward", MEMORY, LAUNCHES): 9})
    work["forward", MEMORY, FUSED_LAUNCHES] = 1
    time = predict(work, [], PLAIN)
    assert time.classes == {LARGE: 1.0, "launches": 3.0}
    assert time.compute_s == 3.0
    assert predict(work, [], PLAIN, is_fused=True).compute_s == 1.0


def test_transfers_ahead_run_beside_work_and_others_behind_it() -> None:
    work = Counter({("forward", LARGE, FLOPS): 1000})
    inside, ahead = transfer(wire_bytes=20), transfer(wire_bytes=15, size=8, node_size=1, is_ahead=True)
    time = predict(work, [inside, ahead], PLAIN)
    assert (time.compute_s, time.overlapped_s, time.exposed_s, time.total_s) == (2.0, 3.0, 1.0, 4.0)
    busy = replace(PLAIN, transfer_units=0.25)
    assert predict(work, [inside, ahead], busy).total_s == 4.0  # transfers are the bound
    short = transfer(wire_bytes=20, is_ahead=True)  # 1 s, in which a quarter of the device is not there
    assert predict(work, [inside, short], busy).total_s == 2.25 + 1
    hosted = predict(work, [ahead], PLAIN, stashed_bytes=10, hosted_bytes=20)  # both ways
    assert (hosted.overlapped_s, hosted.update_s, hosted.total_s) == (3 + 2, 4, 5 + 4)


def test_collectives_by_algorithm() -> None:
    """A ring of 4 in a node, one over 2 nodes of 2 by two networks, one over 4 nodes by one; then latencies."""
    assert transfer().seconds(PLAIN) == 60 / 20
    assert transfer(node_size=2).seconds(PLAIN) == 60 / (2 * 5)
    assert transfer(node_size=1).seconds(PLAIN) == 60 / 5
    assert transfer(size=16, node_size=8).seconds(PLAIN) == 60 / 20  # eight networks are faster than the link
    assert transfer("all_to_all").seconds(PLAIN) == 60 / 20
    assert transfer("all_to_all", node_size=2).seconds(PLAIN) == pytest.approx(60 * 2 / 3 / 5)
    assert transfer("shift").seconds(PLAIN) == 60 / 20
    assert transfer("shift", node_size=2).seconds(PLAIN) == 60 / 5
    slow = replace(PLAIN, call_s=1.0, hop_s=10.0, network_hop_s=100.0)
    none = {"wire_bytes": 0, "size": 8, "node_size": 4, "count": 2}
    assert transfer(**none).seconds(slow) == 2 * (1 + 6 * 10 + 1 * 100)
    assert transfer("all_reduce", **none).seconds(slow) == 2 * (1 + 2 * (6 * 10 + 1 * 100))
    assert transfer("all_to_all", **none).seconds(slow) == 2 * (1 + 100)
    assert transfer("shift", **{**none, "node_size": 8}).seconds(slow) == 2 * (1 + 10)


def test_bytes_on_the_wire_and_places_in_nodes() -> None:
    assert wire_bytes("all_gather", 10, 4) == 30
    assert wire_bytes("reduce_scatter", 40, 4) == 30
    assert wire_bytes("all_reduce", 40, 4) == 60
    assert wire_bytes("all_to_all", 40, 4) == 30
    assert wire_bytes("shift", 40, 4) == 40
    h100 = devices.device("h100")
    assert ranks_in_node(Layout(dp=8, cp=2), "cp", h100) == 2
    assert ranks_in_node(Layout(dp=8, cp=2), "dp", h100, rank=15) == 4
    assert ranks_in_node(Layout(replicate=4, dp=8), "replicate", h100) == 1
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        devices.device("tpu")


@pytest.mark.parametrize("name", list(devices.DEVICES))
def test_more_is_never_faster(name: str) -> None:
    """Of work by every class, of bytes and calls of every collective, and of ranks that share them."""
    chosen = devices.device(name)
    base = Counter(
        {(phase, c, w): 10**9 for phase in ("forward", "update") for c in account.CLASSES for w in (FLOPS, BYTES)}
    )
    del base["forward", MEMORY, FLOPS], base["update", MEMORY, FLOPS]
    before = predict(base, [], chosen).total_s
    for entry in base:
        assert predict(base + Counter({entry: 10**13}), [], chosen).total_s > before
    for op in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "shift"):
        for size, node_size in ((2, 2), (8, 8), (8, 1), (64, 8)):
            one = transfer(op, wire_bytes=10**6, size=size, node_size=node_size)
            assert replace(one, wire_bytes=10**7).seconds(chosen) > one.seconds(chosen)
            assert replace(one, count=2).seconds(chosen) > one.seconds(chosen)
            assert replace(one, node_size=1).seconds(chosen) >= one.seconds(chosen)


def record(run: Any, *tensors: Tensor) -> Trace:
    """What a function does with tensors that are there before."""
    with Recorder(is_fake=False) as recorder:
        recorder.hold("batch", tensors)
        recorder.begin()
        out = run(*tensors)
        trace = recorder.trace()
    del out
    return trace


def test_elementwise_operators_are_counted_one_by_one_and_as_a_group() -> None:
    """`tanh(x * y) + x`: three operators, each of which reads and writes; as one it reads x, y, writes one."""
    x, y = torch.ones(2, 8), torch.ones(2, 8)
    work = record(lambda x, y: (x * y).tanh() + x, x, y).account
    assert work["forward", MEMORY, BYTES] == 64 * (3 + 2 + 3)
    assert work["forward", MEMORY, FUSED_BYTES] == 64 * 3
    assert (work["forward", MEMORY, LAUNCHES], work["forward", MEMORY, FUSED_LAUNCHES]) == (3, 1)


def test_products_end_a_group_and_count_by_their_width() -> None:
    """What a product reads is written before; views and integers count nothing."""
    x, w = torch.ones(1024, 1024), torch.ones(1024, 1024)
    narrow = torch.ones(1024, 8)
    ids = torch.arange(8)

    def run(x: Tensor, w: Tensor, narrow: Tensor, ids: Tensor) -> Any:
        h = (x * 2).t() @ w
        return h.exp_()[:4], w @ narrow, ids + 1

    work, size = record(run, x, w, narrow, ids).account, 4 * 1024 * 1024
    assert work["forward", LARGE, FLOPS] == 2 * 1024**3
    assert work["forward", account.NARROW, FLOPS] == 2 * 1024 * 1024 * 8
    assert work["forward", LARGE, BYTES] == 3 * size
    assert work["forward", MEMORY, BYTES] == work["forward", MEMORY, FUSED_BYTES] == 4 * size
    assert work["forward", MEMORY, FUSED_LAUNCHES] == 2


def test_a_look_up_reads_what_it_returns() -> None:
    table, ids = torch.ones(1000, 4), torch.tensor([1, 5])
    work = record(lambda table, ids: table[ids], table, ids).account
    assert work["forward", MEMORY, BYTES] == 2 * 2 * 4 * 4
