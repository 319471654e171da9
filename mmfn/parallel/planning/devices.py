"""What devices can do: figures of public data sheets, and which share of them kernels and networks reach."""

from collections.abc import Mapping
from dataclasses import dataclass

from mmfn.errors import UserError
from mmfn.parallel.planning.account import ATTENTION, GROUPED, LARGE, NARROW, NARROW_GROUPED

GB, TFLOPS, US = 10**9, 10**12, 1e-6


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator. `flops`: dense bfloat16 per second. Bandwidths in bytes per second.

    `kind`: of torch device. `link`: what one rank sends to ranks of its own node, in one direction; `network`: to ranks
    of other nodes; `host_link`: to the host's memory. `shares`: of `flops`, by class of work (`planning.account`), and
    what is reached of the bandwidths of memory, link and network. `launch_s`: of the host, to issue an operator.
    A collective begins after `call_s` and takes `hop_s` for every rank that a piece goes to next in its node,
    `network_hop_s` where that is in another. `transfer_units`: the share of its units of computation that collectives
    hold while they run beside work. `source`: of the shares and latencies.
    """

    name: str
    kind: str
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link: float
    network: float
    host_link: float
    ranks_per_node: int
    shares: Mapping[str, float]
    memory_share: float = 0.8
    link_share: float = 0.8
    network_share: float = 0.9
    launch_s: float = 5 * US
    call_s: float = 8.4 * US
    hop_s: float = 3.4 * US
    network_hop_s: float = 14 * US
    transfer_units: float = 0.0
    source: str


def shares_of(products: float, grouped: float, attention: float) -> dict[str, float]:
    """Shares of the peak by class; narrow products reach two thirds of what others do."""
    return {
        LARGE: products,
        NARROW: products * 2 / 3,
        GROUPED: grouped,
        NARROW_GROUPED: grouped * 2 / 3,
        ATTENTION: attention,
    }


BEST = (
    "best matrix product: mamf-finder, table of ml-engineering (Bekman), of which products of a step reach nine tenths"
)
GROUPS = (
    "grouped products two thirds of the best product: 524 and 545 TFLOP/s of 16 experts of 5120 x 8192 on H100 "
    "(pytorch/ao 2490); narrow ones two thirds of that: 2.5 TFLOP of 128 experts of 2048 x 768 in 7 of 10.2 ms "
    "(VeOmni 460)"
)
MOVES = (
    "memory 0.8: copies reach 0.77 of H100 (nccl 1264) and 0.87 of A100 (gpu-workshop-JuliaCon23 7); link 0.8: "
    "all-gather and reduce-scatter of 8 H200 at 361 and 363 of 450 GB/s, A100 235 of 300; network 0.9: a ring over 4 "
    "nodes at 365 (H200) and 381 (B200) of 8 x 50 GB/s (ml-engineering); latencies: rings of NCCL, protocol simple "
    "(tuning.cc); launch 5 us: assumed; transfers hold 24 multiprocessors (channels of nccl-tests 100, blocks of "
    "UniRL 467), which kernels then lack (nccl 689)"
)
ASCEND = "assumed: no published measurements of single operators; latencies as NCCL's"
DEVICES = {
    d.name: d
    for d in (
        # Atlas 900 A2: 376 TFLOPS in bfloat16, 64 GB at 1.6 TB/s, HCCS 392 GB/s both ways, 200 Gbit/s RoCE per chip,
        # PCIe 4.0 x16 to the host
        Device(
            name="910b",
            kind="npu",
            flops=376 * TFLOPS,
            memory_bytes=64 * GB,
            memory_bandwidth=1600 * GB,
            link=196 * GB,
            network=25 * GB,
            host_link=32 * GB,
            ranks_per_node=8,
            shares=shares_of(0.7, 0.45, 0.45),
            source=ASCEND,
        ),
        # Atlas 900 A3 (910C) is two dies, each a rank: 752 TFLOPS, 128 GB at 3.2 TB/s, 784 GB/s both ways a package;
        # a CloudMatrix 384 is one domain of that fabric, 400 Gbit/s RDMA per package beyond it
        Device(
            name="a3",
            kind="npu",
            flops=376 * TFLOPS,
            memory_bytes=64 * GB,
            memory_bandwidth=1600 * GB,
            link=196 * GB,
            network=25 * GB,
            host_link=32 * GB,
            ranks_per_node=768,
            shares=shares_of(0.7, 0.45, 0.45),
            source=ASCEND,
        ),
        # A100 SXM: 312 TFLOPS, 80 GB at 2.04 TB/s, NVLink 600 GB/s both ways, 200 Gbit/s InfiniBand, PCIe 4.0 x16
        Device(
            name="a100",
            kind="cuda",
            flops=312 * TFLOPS,
            memory_bytes=80 * GB,
            memory_bandwidth=2039 * GB,
            link=300 * GB,
            network=25 * GB,
            host_link=32 * GB,
            ranks_per_node=8,
            shares=shares_of(0.78, 0.58, 0.6),
            transfer_units=24 / 108,
            source=f"{BEST}: 0.869; {GROUPS}; attention: 0.50 to 0.73 (FlashAttention-2, abstract); {MOVES}",
        ),
        # H100 SXM: 989 TFLOPS dense bfloat16, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways, 400 Gbit/s InfiniBand,
        # PCIe 5.0 x16
        Device(
            name="h100",
            kind="cuda",
            flops=989 * TFLOPS,
            memory_bytes=80 * GB,
            memory_bandwidth=3350 * GB,
            link=450 * GB,
            network=50 * GB,
            host_link=64 * GB,
            ranks_per_node=8,
            shares=shares_of(0.72, 0.53, 0.35),
            transfer_units=24 / 132,
            source=f"{BEST}: 0.803; {GROUPS}; attention: 0.35 (FlashAttention-3, abstract, of 2); {MOVES}",
        ),
        # H200 SXM: as H100 with 141 GB at 4.8 TB/s
        Device(
            name="h200",
            kind="cuda",
            flops=989 * TFLOPS,
            memory_bytes=141 * GB,
            memory_bandwidth=4800 * GB,
            link=450 * GB,
            network=50 * GB,
            host_link=64 * GB,
            ranks_per_node=8,
            shares=shares_of(0.72, 0.53, 0.35),
            transfer_units=24 / 132,
            source=f"{BEST}: 0.803; {GROUPS}; attention: 0.35 (FlashAttention-3, abstract, of 2); {MOVES}",
        ),
        # B200 SXM (HGX): 2,250 TFLOPS, 180 GB at 8 TB/s, NVLink 1,800 GB/s both ways, 400 Gbit/s, PCIe 5.0 x16
        Device(
            name="b200",
            kind="cuda",
            flops=2250 * TFLOPS,
            memory_bytes=180 * GB,
            memory_bandwidth=8000 * GB,
            link=900 * GB,
            network=50 * GB,
            host_link=64 * GB,
            ranks_per_node=8,
            shares=shares_of(0.7, 0.52, 0.15),
            transfer_units=24 / 148,
            source=f"{BEST}: 0.776; {GROUPS}; attention: 333 TFLOP/s of FlashAttention-2 (its issue 1589); {MOVES}",
        ),
        # GB200 NVL72: 2,500 TFLOPS, 186 GB at 8 TB/s, NVLink 1,800 GB/s both ways among 72, 400 Gbit/s, half of
        # NVLink-C2C's 450 GB/s to the host
        Device(
            name="gb200",
            kind="cuda",
            flops=2500 * TFLOPS,
            memory_bytes=186 * GB,
            memory_bandwidth=8000 * GB,
            link=900 * GB,
            network=50 * GB,
            host_link=225 * GB,
            ranks_per_node=72,
            shares=shares_of(0.66, 0.49, 0.14),
            transfer_units=24 / 152,
            source=f"{BEST}: 0.729; {GROUPS}; attention: as B200's; {MOVES}",
        ),
        # A core of a current server with AVX-512 in float32, and its share of the memory; no data sheet
        Device(
            name="cpu",
            kind="cpu",
            flops=0.1 * TFLOPS,
            memory_bytes=4 * GB,
            memory_bandwidth=10 * GB,
            link=5 * GB,
            network=1 * GB,
            host_link=10 * GB,
            ranks_per_node=8,
            shares=shares_of(0.8, 0.6, 0.4),
            network_share=0.8,
            source="assumed; mmfn calibrate measures",
        ),
    )
}

NAMES = {
    "910_93": "a3",
    "910b": "910b",
    "a100": "a100",
    "h100": "h100",
    "h200": "h200",
    "gb200": "gb200",
    "b200": "b200",
}  # in what torch calls a device


def device(name: str) -> Device:
    """The device of a name. Raises ValueError for an unknown one."""
    if name not in DEVICES:
        known = ", ".join(DEVICES)
        raise UserError(f"device {name!r} is unknown; known are {known}, and files of mmfn calibrate (NAME.yaml)")
    return DEVICES[name]


USUAL = {"cpu": "cpu", "cuda": "h100", "npu": "910b"}
"""Type of torch device -> what it is taken for where nothing more is known."""


def like(kind: str, name: str) -> Device:
    """The device of the table that is nearest to one of torch: by what torch calls it, else by its type.

    Raises ValueError for a type of which there is none.
    """
    known = next((own for part, own in NAMES.items() if part in name.lower()), None)
    if known is None and kind not in USUAL:
        raise UserError(f"no figures of devices of type {kind!r} are known; use one of {', '.join(USUAL)}")
    return DEVICES[known or USUAL[kind]]


def peak_flops(name: str) -> float | None:
    """The dense bfloat16 peak of what torch calls a device, None of one that is not known: `NVIDIA H100 80GB HBM3`."""
    found = [known for part, known in NAMES.items() if part in name.lower()]
    return DEVICES[found[0]].flops if found else None
