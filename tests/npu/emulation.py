"""torch_npu's operators as their documents describe them, on CPU tensors: schemas of the wheel, plain formulas.

Written from the documents of op-plugin and without a line of mmfn. What a document leaves undefined is NaN here (rows
behind the last end, weights of a group without rows), and what it forbids is refused. Beside the documents: float64 is
taken, and gives float64 statistics. Gradients exist where the wheel registers one, by the operators it calls for them.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    line.partition("(")[0]: line for line in (Path(__file__).parent / "schemas.txt").read_text("utf-8").splitlines()
}
UNUSED = ("pse", "padding_mask", "softmax_in", "prefix", "sink", "dropout_mask")


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- attention


def sequences(x: Tensor, layout: str, ends: Sequence[int] | None) -> list[Tensor]:
    """[N, L, D] of every sequence, views of x."""
    if layout == "TND":
        assert ends is not None, "TND needs actual_seq_qlen and actual_seq_kvlen"
        return [x[start:end].transpose(0, 1) for start, end in pieces(ends, x.shape[0])]
    if layout in ("BSH", "SBH"):
        raise NotImplementedError(layout)
    return list({"BNSD": x, "BSND": x.transpose(1, 2)}[layout])


def pieces(ends: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
    """Start and end of the sequences that cumulative ends tell; zeros at the end are sequences that are left out."""
    used = list(ends)
    while used and used[-1] == 0:
        used.pop()
    assert used == sorted(used), f"ends {ends} fall"
    assert not used or used[-1] <= num_tokens, f"ends {ends} lead behind the {num_tokens} tokens"
    return list(itertools.pairwise([0, *used]))


def masked_out(length: int, keys: int, mask: Tensor | None, mode: int, pre_tokens: int, next_tokens: int) -> Tensor:
    """bool[L, S], true where a pair does not meet."""
    if mask is None:  # then nothing else counts
        return torch.zeros(length, keys, dtype=torch.bool)
    assert mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}"
    mask = mask.bool()
    step = torch.arange(keys)[None] - torch.arange(length)[:, None]  # above 0: the key is later
    if mode in (0, 1):
        assert mask.shape == (length, keys), f"modes 0 and 1 read a whole mask, {length} x {keys}"
        outside = (step > next_tokens) | (-step > pre_tokens)
        return mask | outside if mode == 0 else mask
    assert mask.shape == (2048, 2048), f"mode {mode} reads the compressed mask but got {tuple(mask.shape)}"
    if mode in (3, 4):
        step = step - (keys - length)  # aligned at the bottom right
    if mode in (2, 3):
        return torch.where(step > 0, mask[0, step.clamp(0, 2047)], mask[(-step).clamp(0, 2047), 0])
    if mode == 4:
        return (step > next_tokens) | (-step > pre_tokens)
    raise NotImplementedError(f"sparse mode {mode}")


def scores(q: Tensor, k: Tensor, scale: float, out: Tensor) -> Tensor:
    """[N, L, S], -inf where a pair does not meet; query head n reads kv head n // (N / Nkv)."""
    x = torch.einsum("nld,nsd->nls", q.to(wide(q)), repeated(k, q)) * scale
    return x.masked_fill(out, -torch.inf)


def repeated(k: Tensor, q: Tensor) -> Tensor:
    return k.to(wide(k)).repeat_interleave(q.shape[0] // k.shape[0], 0)


def block(stat: Tensor, layout: str, softmax_layout: str) -> Tensor:
    """A sequence's statistics [N, L, 8] in the order they are stored in, as rows of 8."""
    assert softmax_layout in ("", "TND"), softmax_layout
    assert not softmax_layout or layout == "TND", "softmax_layout is for TND"
    return (stat.transpose(0, 1) if softmax_layout == "TND" else stat).reshape(-1, 8)


def unblock(rows: Tensor, num_heads: int, softmax_layout: str) -> Tensor:
    """[N, L, 1] of the rows of one sequence."""
    if softmax_layout == "TND":
        return rows.view(-1, num_heads, 8).transpose(0, 1)[..., :1]
    return rows.view(num_heads, -1, 8)[..., :1]


def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **a: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(query, key, value, head_num, input_layout, a)
    out = torch.full(query.shape, torch.nan, dtype=query.dtype)
    groups = [
        sequences(x, input_layout, a[ends])
        for x, ends in ((query, "actual_seq_qlen"), (key, "actual_seq_kvlen"), (value, "actual_seq_kvlen"))
    ]
    stats: list[list[Tensor]] = [[], []]
    for q, k, v, o in zip(*groups, sequences(out, input_layout, a["actual_seq_qlen"]), strict=True):
        hidden = masked_out(
            q.shape[1], k.shape[1], a["atten_mask"], a["sparse_mode"], a["pre_tockens"], a["next_tockens"]
        )
        x = scores(q, k, a["scale"], hidden)
        most = x.amax(-1, keepdim=True) if k.shape[1] else x.new_full((*x.shape[:2], 1), -torch.inf)
        weights = (x - most).exp()
        total = weights.sum(-1, keepdim=True)
        o.copy_(torch.einsum("nls,nsd->nld", weights / total, repeated(v, q)))
        for found, stat in zip(stats, (most, total), strict=True):
            found.append(block(stat.expand(-1, -1, 8), input_layout, a["softmax_layout"]))
    shape = (*query.shape[:2], 8) if input_layout == "TND" else (len(groups[0]), *groups[0][0].shape[:2], 8)
    whole = [torch.full(shape, torch.nan, dtype=wide(query)) for _ in stats]
    for stat, found in zip(whole, stats, strict=True):
        rows = torch.cat(found)
        stat.view(-1, 8)[: len(rows)] = rows
    return out, whole[0], whole[1]


def fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, **a: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(query, key, value, head_num, input_layout, a)
    assert dy.dtype == query.dtype == a["attention_in"].dtype
    assert a["softmax_max"].dtype == a["softmax_sum"].dtype == wide(query)
    grads = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (query, key, value)]
    ends, key_ends = a["actual_seq_qlen"], a["actual_seq_kvlen"]
    own = [sequences(x, input_layout, ends) for x in (query, dy, a["attention_in"], grads[0])]
    others = [sequences(x, input_layout, key_ends) for x in (key, value, grads[1], grads[2])]
    place = 0
    for q, do, o, dq, k, v, dk, dv in zip(*own, *others, strict=True):
        part = slice(place, place := place + q.shape[0] * q.shape[1])
        most, total = (
            unblock(a[name].reshape(-1, 8)[part], q.shape[0], a["softmax_layout"])
            for name in ("softmax_max", "softmax_sum")
        )
        hidden = masked_out(
            q.shape[1], k.shape[1], a["atten_mask"], a["sparse_mode"], a["pre_tockens"], a["next_tockens"]
        )
        probs = (scores(q, k, a["scale_value"], hidden) - most).exp() / total
        do, o = do.to(probs.dtype), o.to(probs.dtype)
        slope = torch.einsum("nld,nsd->nls", do, repeated(v, q)) - (do * o).sum(-1, keepdim=True)
        dx = probs * slope * a["scale_value"]
        dq.copy_(torch.einsum("nls,nsd->nld", dx, repeated(k, q)))
        for grad, found in (
            (dk, torch.einsum("nls,nld->nsd", dx, q.to(dx.dtype))),
            (dv, torch.einsum("nls,nld->nsd", probs, do)),
        ):
            grad.copy_(found.unflatten(0, (grad.shape[0], -1)).sum(1))
    return grads[0], grads[1], grads[2]


def check_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str, a: dict[str, Any]) -> None:
    heads = {"TND": 1, "BNSD": 1, "BSND": 2}[layout]
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[heads] == head_num, f"head_num {head_num} of a query {tuple(query.shape)}"
    assert head_num % key.shape[heads] == 0
    assert a["keep_prob"] == 1.0
    assert all(a.get(name) is None or not a[name].numel() for name in UNUSED)


# ---- norms, rotary, activations


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    assert gamma.dtype in (input.dtype, torch.float32)
    x = input.to(wide(input))
    rstd = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma).to(input.dtype), rstd


def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    x, dy = input.to(rstd.dtype), dy.to(rstd.dtype)
    normed, scaled = x * rstd, dy * gamma
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(input.dtype), (dy * normed).flatten(0, -2).sum(0)


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None) -> Tensor:
    assert input.ndim == r1.ndim == r2.ndim == 4
    assert input.dtype == r1.dtype == r2.dtype
    assert rotate is None
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-input[..., 1::2], input[..., ::2]], -1).flatten(-2)
    return r1 * input + r2 * turned


def swiglu(input: Tensor, dim: int) -> Tensor:
    first, second = input.to(wide(input)).chunk(2, dim)
    return (first * first.sigmoid() * second).to(input.dtype)


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int) -> Tensor:
    first, second = input.to(wide(input)).chunk(2, dim)
    share, dy = first.sigmoid(), grad_output.to(first.dtype)
    dfirst = dy * second * share * (1 + first * (1 - share))
    return torch.cat([dfirst, dy * first * share], dim).to(input.dtype)


def gelu_backward(grad_output: Tensor, input: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(grad_output, input, approximate=approximate)


# ---- experts


def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    assert not num_out_tokens
    assert not padded_mode
    assert indices.dtype in (torch.int32, torch.int64)
    chosen = indices.shape[1] if indices.ndim == 2 else 1
    order = indices.flatten().argsort(stable=True)
    return tokens[order // chosen], order.argsort().int()


def token_permute_grad(grad: Tensor, sorted_indices: Tensor, num_tokens: int, chosen: int) -> Tensor:
    rows = grad.to(wide(grad))[sorted_indices.long()]
    return rows.view(num_tokens, chosen, -1).sum(1).to(grad.dtype)


def token_unpermute(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None, restore_shape: Any) -> Tensor:
    assert sorted_indices.dtype == torch.int32
    assert sorted_indices.ndim == 1
    assert restore_shape is None
    rows = permuted.to(wide(permuted))[sorted_indices.long()]
    if probs is None:
        return rows.to(permuted.dtype)
    return (rows.view(*probs.shape, -1) * probs[..., None]).sum(1).to(permuted.dtype)


def token_unpermute_grad(
    grad: Tensor, sorted_indices: Tensor, size: int, probs: Tensor | None, permuted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    chosen = 1 if probs is None else probs.shape[1]
    rows, weights = grad.repeat_interleave(chosen, 0), 1 if probs is None else probs.flatten()[:, None]
    dpermuted = torch.zeros(size, grad.shape[1], dtype=grad.dtype)
    dpermuted[sorted_indices.long()] = rows * weights
    if probs is None:
        return dpermuted, grad.new_empty(0)
    assert permuted is not None
    return dpermuted, (permuted[sorted_indices.long()] * rows).sum(-1).view(probs.shape).to(probs.dtype)


def grouped_matmul(x: Sequence[Tensor], weight: Sequence[Tensor], **a: Any) -> list[Tensor]:
    settings = ("group_list", "split_item", "group_type", "group_list_type")
    assert all(value in (None, 0) for name, value in a.items() if name not in settings)
    (rows,), (factor,), groups = x, weight, a["group_list"]
    assert rows.dtype == factor.dtype
    assert groups.dtype == torch.int64
    assert groups.ndim == 1
    if a["group_list_type"] == 0:
        ends = groups.tolist()
    else:
        assert a["group_list_type"] == 1, "pairs are for int8"
        assert len(groups) > 1, "a list of sizes may not have one entry"
        ends = groups.cumsum(0).tolist()
    shared = rows.shape[0 if a["group_type"] == 0 else 1]
    assert ends[-1] == shared, f"ends {ends} must lead to the {shared} of the grouped axis"
    parts = pieces(ends, shared) if ends[-1] else [(0, 0)] * len(ends)
    if a["group_type"] == 0:
        assert rows.stride(-1) == 1, "x may not be transposed where its rows are grouped"
        assert factor.shape[0] == len(ends)
        found = [rows[start:end] @ w for (start, end), w in zip(parts, factor, strict=True)]
        out = torch.cat(found)
    else:
        assert a["group_type"] == 2, a["group_type"]
        assert rows.stride(0) == 1, "x has to be transposed where the summed axis is grouped"
        found = [rows[:, start:end] @ factor[start:end] for start, end in parts]
        found = [y if end > start else y.fill_(torch.nan) for y, (start, end) in zip(found, parts, strict=True)]
        out = torch.stack(found)
    return [out] if a["split_item"] in (2, 3) else found


# ---- experts over ranks

GROUPS: dict[str, Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]] = {}
"""By the name of a group, how its ranks exchange rows: (rows by rank, how many go to each, and come from each)."""


def alltoallv_gmm(**a: Any) -> tuple[Tensor, None, Tensor | None]:
    """Rows travel, are sorted by expert (those of one by rank), and meet the weights."""
    send, receive = checked_counts(a)
    rows = GROUPS[a["hcom"]](a["gmm_x"], *([sum(counts) for counts in side] for side in (send, receive)))
    parts = rows.split([count for counts in receive for count in counts])
    own = [torch.cat(parts[expert :: len(receive[0])]) for expert in range(len(receive[0]))]
    y = torch.cat([x @ w for x, w in zip(own, turned(a), strict=True)])
    return y, None, torch.cat(own) if a["permute_out_flag"] else None


def gmm_alltoallv(**a: Any) -> tuple[Tensor, None]:
    """Rows by expert meet the weights, are sorted by rank (those of one by expert), and travel."""
    send, receive = checked_counts(a)
    own = a["gmm_x"].split([sum(counts) for counts in zip(*send, strict=True)])
    y = torch.cat([x @ w for x, w in zip(own, turned(a), strict=True)])
    parts = y.split([counts[expert] for expert in range(len(send[0])) for counts in send])
    rows = torch.cat([part for rank in range(len(send)) for part in parts[rank :: len(send)]])
    return GROUPS[a["hcom"]](rows, *([sum(counts) for counts in side] for side in (send, receive))), None


def turned(a: dict[str, Any]) -> Tensor:
    """The weights of an expert as the rows meet them."""
    return a["gmm_weight"].transpose(1, 2) if a["trans_gmm_weight"] else a["gmm_weight"]


def checked_counts(a: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows sent to and received from each rank, for each of its experts or of this rank's."""
    x, weight, ranks, given = a["gmm_x"], a["gmm_weight"], a["ep_world_size"], ("send_counts", "recv_counts")
    unused = ("send_counts_tensor", "recv_counts_tensor", "mm_x", "mm_weight", "comm_mode")
    assert all(a[name] is None for name in unused)
    assert not a["trans_mm_weight"]
    assert x.ndim == 2
    assert weight.ndim == 3
    assert x.dtype == weight.dtype
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert 0 < len(a["hcom"]) < 128
    experts = weight.shape[0]
    assert experts <= 32
    assert all(len(a[name]) == experts * ranks <= 256 for name in given), "a count for each expert of each rank"
    assert all(sum(a[name]) > 0 for name in given), "a rank has to send and to receive"
    assert sum(a["send_counts"]) == x.shape[0], "the rows that are sent are those given"
    send, receive = ([list(a[name][i : i + experts]) for i in range(0, experts * ranks, experts)] for name in given)
    return send, receive
