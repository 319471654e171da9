"""What devices can do, and how long a step takes on them by a stated model. Figures are those of public data sheets."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmfn.errors import UserError
from mmfn.parallel.mesh.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator. `flops`: dense bfloat16 per second. Bandwidths in bytes per second.

    `link`: what one rank sends to ranks of its own node, in one direction; `network`: to ranks of other nodes;
    `host_link`: to the host's memory.
    """

    name: str
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link: float
    network: float
    host_link: float
    ranks_per_node: int


GB, TFLOPS = 10**9, 10**12
DEVICES = {
    d.name: d
    for d in (
        # Atlas 900 A2: 376 TFLOPS in bfloat16, 64 GB at 1.6 TB/s, HCCS 392 GB/s both ways, 200 Gbit/s RoCE per chip,
        # PCIe 4.0 x16 to the host
        Device(
            name="910b",
            flops=376 * TFLOPS,
            memory_bytes=64 * GB,
            memory_bandwidth=1600 * GB,
            link=196 * GB,
            network=25 * GB,
            host_link=32 * GB,
            ranks_per_node=8,
        ),
        # Atlas 900 A3 (910C) is two dies, each a rank: 752 TFLOPS, 128 GB at 3.2 TB/s, 784 GB/s both ways a package;
        # a CloudMatrix 384 is one domain of that fabric, 400 Gbit/s RDMA per package beyond it
        Device(
            name="a3",
            flops=376 * TFLOPS,
            memory_bytes=64 * GB,
            memory_bandwidth=1600 * GB,
            link=196 * GB,
            network=25 * GB,
            host_link=32 * GB,
            ranks_per_node=768,
        ),
        # H100 SXM: 989 TFLOPS dense bfloat16, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways, 400 Gbit/s InfiniBand,
        # PCIe 5.0 x16
        Device(
            name="h100",
            flops=989 * TFLOPS,
            memory_bytes=80 * GB,
            memory_bandwidth=3350 * GB,
            link=450 * GB,
            network=50 * GB,
            host_link=64 * GB,
            ranks_per_node=8,
        ),
        # H200 SXM: as H100 with 141 GB at 4.8 TB/s
        Device(
            name="h200",
            flops=989 * TFLOPS,
            memory_bytes=141 * GB,
            memory_bandwidth=4800 * GB,
            link=450 * GB,
            network=50 * GB,
            host_link=64 * GB,
            ranks_per_node=8,
        ),
        # A core of a current server with AVX-512 in float32, and its share of the memory; no data sheet
        Device(
            name="cpu",
            flops=0.1 * TFLOPS,
            memory_bytes=4 * GB,
            memory_bandwidth=10 * GB,
            link=5 * GB,
            network=1 * GB,
            host_link=10 * GB,
            ranks_per_node=8,
        ),
    )
}

NAMES = {"910_93": "a3", "910b": "910b", "h100": "h100", "h200": "h200"}  # in what torch calls a device

EFFICIENCY = 0.5  # of the peak in matrix products; what well-tuned training reaches
BANDWIDTH_EFFICIENCY = 0.8  # of links and memory
MODEL = (
    f"time = max(FLOPs / ({EFFICIENCY:g} peak), transfers beside work) + exposed transfers + update; a transfer "
    f"takes its bytes on the wire / ({BANDWIDTH_EFFICIENCY:g} of link or network), the update its FLOPs / "
    f"({EFFICIENCY:g} peak) + (parameters and state read and written, gradients read) / ({BANDWIDTH_EFFICIENCY:g} of "
    "memory bandwidth); what is kept on the host crosses its link both ways, activations in every micro-batch, beside "
    "the computation, state in the update"
)


def device(name: str) -> Device:
    """The device of a name. Raises ValueError for an unknown one."""
    if name not in DEVICES:
        raise UserError(f"device {name!r} is unknown; known are {', '.join(DEVICES)}")
    return DEVICES[name]


def peak_flops(name: str) -> float | None:
    """The dense bfloat16 peak of what torch calls a device, None of one that is not known: `NVIDIA H100 80GB HBM3`."""
    found = [known for part, known in NAMES.items() if part in name.lower()]
    return DEVICES[found[0]].flops if found else None


def wire_bytes(op: str, sent_bytes: int, size: int) -> float:
    """Bytes one rank puts on the wire for a collective it gives `sent_bytes` to, by the ring algorithms."""
    others = (size - 1) / size
    factors = {
        "all_gather": size - 1,
        "reduce_scatter": others,
        "all_reduce": 2 * others,
        "all_to_all": others,
        "shift": 1,
    }
    return sent_bytes * factors[op]


def is_inside_node(layout: Layout, axis: str, chosen: Device, rank: int = 0) -> bool:
    """True where all ranks of an axis are in one node, ranks filling nodes in order."""
    group = next(g for g in layout.partition(axis) if rank in g)
    return len({r // chosen.ranks_per_node for r in group}) == 1


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Calls of one kind: bytes on the wire, whether within a node, and whether they run beside the computation."""

    wire_bytes: float
    is_inside_node: bool
    is_ahead: bool


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one step and its parts; `hfu` is the share of the device's peak, what is computed again included."""

    compute_s: float
    overlapped_s: float
    exposed_s: float
    update_s: float
    total_s: float
    hfu: float


def predict(
    flops: float,
    update_flops: float,
    update_bytes: float,
    transfers: Sequence[Transfer],
    chosen: Device,
    *,
    stashed_bytes: float = 0,
    hosted_bytes: float = 0,
) -> Time:
    """See `MODEL`. `flops`: forward and backward; `update_bytes`: what the update reads and writes on this rank.

    On the host: `stashed_bytes` of activations, over all micro-batches, and `hosted_bytes` of state.
    """
    compute, update = (n / (EFFICIENCY * chosen.flops) for n in (flops, update_flops))
    spent = [
        (t.is_ahead, t.wire_bytes / (BANDWIDTH_EFFICIENCY * (chosen.link if t.is_inside_node else chosen.network)))
        for t in transfers
    ]
    to_host, state = (2 * n / (BANDWIDTH_EFFICIENCY * chosen.host_link) for n in (stashed_bytes, hosted_bytes))
    overlapped = sum(s for is_ahead, s in spent if is_ahead) + to_host
    exposed = sum(s for is_ahead, s in spent if not is_ahead)
    update += update_bytes / (BANDWIDTH_EFFICIENCY * chosen.memory_bandwidth) + state
    total = max(compute, overlapped) + exposed + update
    hfu = flops / (total * chosen.flops) if total else 0.0
    return Time(
        compute_s=compute,
        overlapped_s=overlapped,
        exposed_s=exposed,
        update_s=update,
        total_s=total,
        hfu=hfu,
    )
