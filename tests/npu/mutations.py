"""Wrong calls: each changes one argument of one operator on its way, and names the check that has to fail.

`MUTATIONS`: (operator, what is wrong) -> (change, name in `CHECKS`). A change gets the operator's arguments by name and
returns those that differ. Not here, as no result tells them apart: sparse modes 2 and 3, which align the causal mask at
the top left and the bottom right. Queries and keys of a causal call are always the same tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.npu import test_emulated_ops as checks
from tests.npu import test_fused_exchange as over_ranks
from tests.npu.operators import bound

Change = Callable[[Mapping[str, Any]], dict[str, Any]]
OWN, OTHERS = (0, 5, 9), (0, 2, 12)
CHECKS: dict[str, Callable[[], None]] = {
    "causal": partial(checks.test_attention, "packed", True, {}),
    "windows": partial(checks.test_attention, "packed", False, {}),
    "tensors": partial(checks.test_attention, "packed", True, {"lengths": "tensor"}),
    "batched": partial(checks.test_attention, "equal", True, {"layout": "BSND"}),
    "causal block": partial(checks.test_blocks, (0, 5, 9, 9), None, True),
    "block of other keys": partial(checks.test_blocks, OWN, OTHERS, False),
    "norms": checks.test_norms,
    "rotary": partial(checks.test_rotary, 8),
    "activations": checks.test_activations,
    "dispatch and combine": partial(checks.test_dispatch_and_combine, 3),
    "experts": partial(checks.test_experts, (3, 0, 4, 2), False),
    "experts over ranks": partial(over_ranks.test_any_counts, over_ranks.EP2, "uneven"),
}


def inverted(a: Mapping[str, Any]) -> dict[str, Any]:
    return {"atten_mask": ~a["atten_mask"]}


def masked_from(diagonal: int) -> Change:
    return lambda a: {"atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(diagonal)}


def put(**values: Any) -> Change:
    return lambda a: values


def lengths_of(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def ends(fn: Callable[[list[int]], list[int]], *names: str) -> Change:
    """Other ends of queries and keys, or of those named."""
    return lambda a: {name: fn(list(a[name])) for name in names or ("actual_seq_qlen", "actual_seq_kvlen")}


def tensors(fn: Callable[[Tensor], Tensor], *names: str) -> Change:
    return lambda a: {name: fn(a[name]) for name in names}


def of_rows(change: Change) -> Change:
    """Of the products of rows alone."""
    return lambda a: change(a) if a["group_type"] == 0 else {}


def of_weights(change: Change) -> Change:
    """Of the gradients of weights alone."""
    return lambda a: change(a) if a["group_type"] == 2 else {}


def by_expert_first(a: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of one expert side by side, not those of one rank."""
    ranks, names = a["ep_world_size"], ("send_counts", "recv_counts")
    return {
        name: [n for i in range(len(a[name]) // ranks) for n in a[name][i :: len(a[name]) // ranks]] for name in names
    }


def counts_swapped(a: Mapping[str, Any]) -> dict[str, Any]:
    return {"send_counts": a["recv_counts"], "recv_counts": a["send_counts"]}


def of_first_rank(name: str) -> Change:
    """Its first two counts swapped: as many rows for a rank, others for its experts."""
    return lambda a: {name: [a[name][1], a[name][0], *a[name][2:]]}


OVER_RANKS: dict[str, tuple[Change, str]] = {
    "counts swapped": (counts_swapped, "experts over ranks"),
    "counts by expert, then rank": (by_expert_first, "experts over ranks"),
    "two experts' rows received swapped": (of_first_rank("recv_counts"), "experts over ranks"),
    "a row too few": (lambda a: {"gmm_x": a["gmm_x"][1:]}, "experts over ranks"),
    "ranks in another order": (
        lambda a: {name: a[name][::-1] for name in ("send_counts", "recv_counts")},
        "experts over ranks",
    ),
    "weights not turned, or turned": (
        lambda a: {"trans_gmm_weight": not a["trans_gmm_weight"]},
        "experts over ranks",
    ),
    "experts from the last": (tensors(lambda x: x.flip(0), "gmm_weight"), "experts over ranks"),
    "rows from the last": (tensors(lambda x: x.flip(0), "gmm_x"), "experts over ranks"),
    "one rank": (put(ep_world_size=1), "experts over ranks"),
    "another group": (put(hcom=""), "experts over ranks"),
}
ATTENTION: dict[str, tuple[Change, str]] = {
    "mask inverted": (inverted, "causal"),
    "no mask": (put(atten_mask=None), "causal"),
    "mask with the diagonal": (masked_from(0), "causal"),
    "mask one off": (masked_from(2), "causal"),
    "the default scale": (put(scale=1.0), "causal"),
    "scale squared": (lambda a: {"scale": a["scale"] ** 2}, "windows"),
    "lengths, not ends": (ends(lengths_of), "causal"),
    "last end one off": (ends(lambda x: [*x[:-1], x[-1] - 1]), "causal"),
    "first end one off": (ends(lambda x: [x[0] + 1, *x[1:]]), "windows"),
    "ends of the keys one off": (ends(lambda x: [x[0] - 1, *x[1:]], "actual_seq_kvlen"), "block of other keys"),
    "all one window": (ends(lambda x: x[-1:]), "windows"),
    "last window left out": (ends(lambda x: [*x[:-1], 0]), "windows"),
    "sparse mode of whole masks": (put(sparse_mode=0), "causal"),
    "sparse mode without sides": (put(sparse_mode=1), "causal"),
    "sparse mode of bands": (put(sparse_mode=4), "causal"),
    "windows with a causal mask": (lambda a: {**masked_from(1)(a), "sparse_mode": 3}, "windows"),
    "heads of the keys": (lambda a: {"head_num": a["key"].shape[1]}, "causal"),
    "dropout": (put(keep_prob=0.9), "causal"),
    "statistics head by head": (put(softmax_layout=""), "causal block"),
    "keys for values": (lambda a: {"value": a["key"]}, "windows"),
    "the other layout": (put(input_layout="BNSD"), "batched"),
}
GRADIENT: dict[str, tuple[Change, str]] = {
    "mask inverted": (inverted, "causal block"),
    "no mask": (put(atten_mask=None), "causal block"),
    "the default scale": (put(scale_value=1.0), "block of other keys"),
    "statistics head by head": (put(softmax_layout=""), "causal block"),
    "sums of 2": (tensors(lambda x: 2 * x, "softmax_sum"), "causal block"),
    "maxima of 0": (tensors(torch.zeros_like, "softmax_max"), "block of other keys"),
    "output for its gradient": (lambda a: {"attention_in": a["dy"]}, "causal block"),
    "ends swapped": (
        lambda a: {"actual_seq_qlen": a["actual_seq_kvlen"], "actual_seq_kvlen": a["actual_seq_qlen"]},
        "block of other keys",
    ),
    "sparse mode of bands": (put(sparse_mode=4), "causal block"),
    "lengths, not ends": (ends(lengths_of), "causal block"),
}
WITH_TENSORS: dict[str, tuple[Change, str]] = {
    "mask inverted": (inverted, "tensors"),
    "the default scale": (put(scale=1.0), "tensors"),
    "no segment of padding": (
        tensors(lambda x: x[:-1], "actual_seq_qlen", "actual_seq_kvlen"),
        "tensors",
    ),
    "lengths, not ends": (
        tensors(lambda x: x.diff(prepend=x.new_zeros(1)), "actual_seq_qlen", "actual_seq_kvlen"),
        "tensors",
    ),
}
OTHER: dict[tuple[str, str], tuple[Change, str]] = {
    ("npu_rms_norm", "a large epsilon"): (put(epsilon=1e-2), "norms"),
    ("npu_rms_norm", "weights squared"): (tensors(torch.square, "gamma"), "norms"),
    ("npu_rotary_mul", "neighbouring channels"): (put(rotary_mode="interleave"), "rotary"),
    ("npu_rotary_mul", "the opposite turn"): (tensors(torch.neg, "r2"), "rotary"),
    ("npu_rotary_mul", "sine for cosine"): (lambda a: {"r1": a["r2"], "r2": a["r1"]}, "rotary"),
    ("npu_swiglu", "halves swapped"): (tensors(lambda x: x.roll(x.shape[-1] // 2, -1), "input"), "activations"),
    ("npu_swiglu", "the first dim"): (put(dim=0), "activations"),
    ("npu_gelu", "the other formula"): (
        lambda a: {"approximate": "none" if a["approximate"] == "tanh" else "tanh"},
        "activations",
    ),
    ("npu_moe_token_permute", "experts in another order"): (
        tensors(lambda x: x.flip(1), "indices"),
        "dispatch and combine",
    ),
    ("npu_moe_token_permute", "rows cut off"): (put(num_out_tokens=5), "dispatch and combine"),
    ("npu_moe_token_unpermute", "no weights"): (put(probs=None), "dispatch and combine"),
    ("npu_moe_token_unpermute", "the inverse places"): (
        tensors(lambda x: x.argsort().int(), "sorted_indices"),
        "dispatch and combine",
    ),
    ("npu_grouped_matmul", "ends for sizes"): (put(group_list_type=1), "experts"),
    ("npu_grouped_matmul", "an end one off"): (
        tensors(lambda x: torch.cat([x[:1] + 1, x[1:]]), "group_list"),
        "experts",
    ),
    ("npu_grouped_matmul", "groups from the last"): (tensors(lambda x: x.flip(0), "group_list"), "experts"),
    ("npu_grouped_matmul", "padding left out"): (
        of_rows(tensors(lambda x: x.clamp(max=9), "group_list")),
        "experts",
    ),
    ("npu_grouped_matmul", "one output for each"): (put(split_item=0), "experts"),
    ("npu_grouped_matmul", "weights turned"): (
        of_rows(lambda a: {"weight": [w.transpose(1, 2) for w in a["weight"]]}),
        "experts",
    ),
    ("npu_grouped_matmul", "gradient of weights turned"): (
        of_weights(lambda a: {"x": [a["weight"][0].t()], "weight": [a["x"][0].t()]}),
        "experts",
    ),
    ("npu_grouped_matmul", "gradient of weights by rows"): (of_weights(put(group_type=0)), "experts"),
}
MUTATIONS: dict[tuple[str, str], tuple[Change, str]] = {
    **{("npu_fusion_attention", name): change for name, change in ATTENTION.items()},
    **{("npu_fusion_attention_grad", name): change for name, change in GRADIENT.items()},
    **{("npu_fusion_attention_v3", name): change for name, change in WITH_TENSORS.items()},
    **{("npu_alltoallv_gmm", name): change for name, change in OVER_RANKS.items()},
    **{("npu_gmm_alltoallv", name): change for name, change in OVER_RANKS.items() if "received" not in name},
    ("npu_gmm_alltoallv", "two experts' rows sent swapped"): (of_first_rank("send_counts"), "experts over ranks"),
    **OTHER,
}


class Mutated:
    """An operator that gets other arguments than it is called with; `default`: as it was."""

    def __init__(self, name: str, change: Change) -> None:
        self.name, self.change, self.calls = name, change, 0
        self.default = getattr(torch.ops.npu, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = bound(self.name, args, kwargs)
        changed = self.change(arguments)
        self.calls += bool(changed)
        return self.default(**{**arguments, **changed})
