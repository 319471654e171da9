"""How long a step takes, from what it does and what a device can do: pure functions of numbers.

Every class of work (`planning.account`) takes the longer of its arithmetic and its reading and writing; classes follow
one another. A host that issues operators takes its own time for each, beside the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning import account
from mmfn.parallel.planning.devices import Device
from mmfn.parallel.planning.trace import BACKWARD, FORWARD, UPDATE

MODEL = (
    "time = max(work + units * collectives that run ahead, transfers that run ahead) + all other transfers + update; "
    "units: the share of the device's units that collectives hold meanwhile; work = max(operators issued * launch, "
    "sum over classes of max(FLOPs / share of the peak, bytes / share of the memory bandwidth)); a transfer takes its "
    "bytes on the wire / share of link or network, in a ring over nodes with as many networks as it has ranks in one, "
    "and a latency a hop; what is kept on the host crosses its link both ways, activations in every micro-batch, "
    "beside the computation, state in the update"
)


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


def ranks_in_node(layout: Layout, axis: str, chosen: Device, rank: int = 0) -> int:
    """How many ranks of an axis are in the node of a rank, itself among them, ranks filling nodes in order."""
    group = next(g for g in layout.partition(axis) if rank in g)
    return sum(r // chosen.ranks_per_node == rank // chosen.ranks_per_node for r in group)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """All calls of one kind: how many, bytes on the wire, ranks, how many of them in a node, whether beside work."""

    op: str
    count: int
    wire_bytes: float
    size: int
    node_size: int
    is_ahead: bool

    def seconds(self, chosen: Device) -> float:
        """Of all calls, one behind the other.

        A ring that leaves its node does so over the networks of all its ranks in it, as rings are cut into pieces, each
        with another rank at the border. Of an all-to-all each rank sends over its own network, what stays in the node
        beside it; a shift waits for the one rank at the border.
        """
        link, network = chosen.link_share * chosen.link, chosen.network_share * chosen.network
        num_nodes = max(1, self.size // self.node_size)
        if self.op == "all_to_all":
            away = (self.size - self.node_size) / max(1, self.size - 1)
            longest = max(away / network, (1 - away) / link) * self.wire_bytes
            steps_inside, steps_away = (0, 1) if away else (1, 0)
        elif self.op == "shift":
            longest = self.wire_bytes / (link if num_nodes == 1 else network)
            steps_inside, steps_away = (1, 0) if num_nodes == 1 else (0, 1)
        else:
            longest = self.wire_bytes / (link if num_nodes == 1 else min(link, self.node_size * network))
            rounds = 2 if self.op == "all_reduce" else 1
            steps_inside, steps_away = rounds * (self.size - num_nodes), rounds * (num_nodes - 1)
        latency = chosen.call_s + steps_inside * chosen.hop_s + steps_away * chosen.network_hop_s
        return longest + self.count * latency


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one step and its parts; `hfu` is the share of the device's peak, what is computed again included.

    `compute_s`: forward and backward; `classes`: what each class of their work takes, and "launches" the host, which
    is beside them.
    """

    compute_s: float
    overlapped_s: float
    exposed_s: float
    update_s: float
    total_s: float
    hfu: float
    classes: dict[str, float]


def class_seconds(
    work: Mapping[account.Entry, int], phases: Sequence[str], chosen: Device, *, is_fused: bool
) -> dict[str, float]:
    """Seconds of each class of work in some phases, and "launches": what the host takes to issue it all."""
    bytes_of, launches_of = (
        (account.FUSED_BYTES, account.FUSED_LAUNCHES) if is_fused else (account.BYTES, account.LAUNCHES)
    )

    def total(name: str, what: str) -> int:
        return sum(work.get((phase, name, what), 0) for phase in phases)

    bandwidth = chosen.memory_share * chosen.memory_bandwidth
    seconds = {
        name: max(
            total(name, account.FLOPS) / (chosen.shares.get(name, 1.0) * chosen.flops),
            total(name, bytes_of) / bandwidth,
        )
        for name in account.CLASSES
    }
    launches = sum(total(name, launches_of) for name in account.CLASSES) * chosen.launch_s
    return {name: s for name, s in {**seconds, "launches": launches}.items() if s}


def work_seconds(seconds: Mapping[str, float]) -> float:
    """What classes take together (`class_seconds`): the device, or the host where it is slower."""
    launches = seconds.get("launches", 0.0)
    return max(sum(seconds.values()) - launches, launches)


def predict(
    work: Mapping[account.Entry, int],
    transfers: Sequence[Transfer],
    chosen: Device,
    *,
    is_fused: bool = False,
    stashed_bytes: float = 0,
    hosted_bytes: float = 0,
) -> Time:
    """See `MODEL`. `work`: of a trace (`planning.account`); `is_fused`: as a compiler runs it.

    On the host: `stashed_bytes` of activations, over all micro-batches, and `hosted_bytes` of state.
    """
    classes = class_seconds(work, (FORWARD, BACKWARD), chosen, is_fused=is_fused)
    compute = work_seconds(classes)
    update = work_seconds(class_seconds(work, (UPDATE,), chosen, is_fused=is_fused))
    to_host, state = (2 * n / (chosen.link_share * chosen.host_link) for n in (stashed_bytes, hosted_bytes))
    spent = [(t.is_ahead, t.seconds(chosen)) for t in transfers]
    collectives = sum(s for is_ahead, s in spent if is_ahead)
    overlapped = collectives + to_host
    exposed = sum(s for is_ahead, s in spent if not is_ahead)
    update += state
    total = max(compute + chosen.transfer_units * collectives, overlapped) + exposed + update
    flops = sum(n for (phase, _, what), n in work.items() if what == account.FLOPS and phase in (FORWARD, BACKWARD))
    return Time(
        compute_s=compute,
        overlapped_s=overlapped,
        exposed_s=exposed,
        update_s=update,
        total_s=total,
        hfu=flops / (total * chosen.flops) if total else 0.0,
        classes=classes,
    )
