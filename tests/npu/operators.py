"""The emulated operators under their names: a kernel for each schema, and `register`, which makes them `torch.ops.npu`.

As in the wheel, some have a gradient, by other operators, and some have none: then gradients stop.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.npu import emulation

SPACE = "npu"
CALLS: Counter[str] = Counter()
"""How often each kernel has run."""


def _attention(**a: Any) -> tuple[Any, ...]:
    return *emulation.fusion_attention(**a), a["query"].new_empty(0), 0, 0, 0


def _attention_by_tensors(**a: Any) -> tuple[Any, ...]:
    none = torch.zeros(1, dtype=torch.int64)
    return *emulation.fusion_attention(**_with_lists(a)), a["query"].new_empty(0), none, none.clone()


def _attention_grad(**a: Any) -> tuple[Any, ...]:
    return *emulation.fusion_attention_grad(**_with_lists(a)), a["query"].new_empty(0), a["query"].new_empty(0)


def _with_lists(a: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: a[name].tolist() for name in ("actual_seq_qlen", "actual_seq_kvlen") if isinstance(a[name], Tensor)}
    return {**a, **lists}


def _rotary_grad(grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str) -> tuple[Tensor, ...]:
    raise NotImplementedError("the gradient of npu_rotary_mul is not used: the backward is the opposite turn")


def _unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Any, padded_mode: bool, restore_shape: Any
) -> Any:
    assert not padded_mode
    return emulation.token_unpermute(permuted_tokens, sorted_indices, probs, restore_shape), permuted_tokens.clone()


def _unpermute_grad(**a: Any) -> tuple[Tensor, Tensor]:
    return emulation.token_unpermute_grad(
        a["grad_unpermuted_tokens"],
        a["sorted_indices"],
        a["permuted_tokens_size_0"],
        a["probs"],
        a["permuted_tokens"],
    )


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": _attention,
    "npu_fusion_attention_grad": _attention_grad,
    "npu_fusion_attention_v3": _attention_by_tensors,
    "npu_fusion_attention_grad_v3": _attention_grad,
    "npu_rms_norm": emulation.rms_norm,
    "npu_rms_norm_backward": emulation.rms_norm_backward,
    "npu_rotary_mul": emulation.rotary_mul,
    "npu_rotary_mul_backward": _rotary_grad,
    "npu_swiglu": emulation.swiglu,
    "npu_swiglu_backward": emulation.swiglu_backward,
    "npu_gelu": lambda input, approximate: torch.nn.functional.gelu(input, approximate=approximate),
    "npu_gelu_backward": emulation.gelu_backward,
    "npu_moe_token_permute": emulation.token_permute,
    "npu_moe_token_permute_grad_v2": lambda **a: emulation.token_permute_grad(
        a["grad_permuted_tokens"], a["sorted_indices"], a["tokens_size_0"], a["num_topK"]
    ),
    "_npu_moe_token_unpermute": _unpermute,
    "npu_moe_token_unpermute_grad_v2": _unpermute_grad,
    "npu_grouped_matmul": emulation.grouped_matmul,
    "npu_alltoallv_gmm": emulation.alltoallv_gmm,
    "npu_gmm_alltoallv": emulation.gmm_alltoallv,
}
"""What computes, by all arguments of the schema."""
MEETING = ("npu_alltoallv_gmm", "npu_gmm_alltoallv")
"""What waits for other ranks."""
COMPOSITE = {"npu_moe_token_unpermute": "_npu_moe_token_unpermute"}
"""What is the first result of another."""


def _no_attention(**a: Any) -> tuple[Tensor, ...]:
    """Output and statistics without values."""
    q, layout = a["query"], a["input_layout"]
    rows = q.shape[:2] if layout == "TND" else (q.shape[0], a["head_num"], q.shape[1 if layout == "BSND" else 2])
    return q.new_empty(q.shape), *(q.new_empty((*rows, 8), dtype=emulation.wide(q)) for _ in range(2)), q.new_empty(0)


def _no_gradients(**a: Any) -> tuple[Tensor, ...]:
    return *(a[name].new_empty(a[name].shape) for name in ("query", "key", "value")), *[a["query"].new_empty(0)] * 2


def _no_products(x: Any, weight: Any, **a: Any) -> list[Tensor]:
    groups = a["group_list"].shape if a["group_type"] == 2 else ()
    return [x[0].new_empty((*groups, x[0].shape[0], weight[0].shape[-1]))]


def _no_rows(tokens: Tensor, indices: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(indices.numel(), tokens.shape[1]), indices.new_empty(indices.numel(), dtype=torch.int32)


FAKES: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": lambda **a: (*_no_attention(**a), 0, 0, 0),
    "npu_fusion_attention_grad": _no_gradients,
    "npu_fusion_attention_v3": lambda **a: (
        *_no_attention(**a),
        *(a["query"].new_empty(1, dtype=torch.int64) for _ in range(2)),
    ),
    "npu_fusion_attention_grad_v3": _no_gradients,
    "npu_rms_norm": lambda input, **_: (
        input.new_empty(input.shape),
        input.new_empty((*input.shape[:-1], 1), dtype=emulation.wide(input)),
    ),
    "npu_rms_norm_backward": lambda input, gamma, rstd, **_: (
        input.new_empty(input.shape),
        rstd.new_empty(gamma.shape),
    ),
    "npu_rotary_mul": lambda input, **_: input.new_empty(input.shape),
    "npu_swiglu": lambda input, dim: torch.empty_like(input.chunk(2, dim)[0], memory_format=torch.contiguous_format),
    "npu_swiglu_backward": lambda input, **_: input.new_empty(input.shape),
    "npu_gelu": lambda input, **_: input.new_empty(input.shape),
    "npu_gelu_backward": lambda input, **_: input.new_empty(input.shape),
    "npu_moe_token_permute": _no_rows,
    "npu_moe_token_permute_grad_v2": lambda **a: a["grad_permuted_tokens"].new_empty(
        a["tokens_size_0"], a["grad_permuted_tokens"].shape[1]
    ),
    "_npu_moe_token_unpermute": lambda permuted_tokens, probs, **_: (
        permuted_tokens.new_empty(len(permuted_tokens if probs is None else probs), permuted_tokens.shape[1]),
        permuted_tokens.new_empty(permuted_tokens.shape),
    ),
    "npu_moe_token_unpermute_grad_v2": lambda **a: (
        a["grad_unpermuted_tokens"].new_empty(a["permuted_tokens_size_0"], a["grad_unpermuted_tokens"].shape[1]),
        a["grad_unpermuted_tokens"].new_empty(0 if a["probs"] is None else a["probs"].shape),
    ),
    "npu_grouped_matmul": _no_products,
}
"""Shapes and dtypes alone, for graphs and plans."""

SAME = ("query", "key", "value", "head_num", "input_layout", "atten_mask", "keep_prob", "pre_tockens", "next_tockens")
LENGTHS = ("inner_precise", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode", "softmax_layout")


def _of_attention(name: str) -> Callable[..., dict[str, Any]]:
    def grad(a: Mapping[str, Any], outs: tuple[Any, ...], dy: Tensor) -> dict[str, Any]:
        given = {key: a[key] for key in (*SAME, *LENGTHS)}
        stats = {"softmax_max": outs[1], "softmax_sum": outs[2], "attention_in": outs[0]}
        found = op(name)(dy=dy, scale_value=a["scale"], **given, **stats)
        return dict(zip(("query", "key", "value"), found, strict=False))

    return grad


def _of_unpermute(a: Mapping[str, Any], outs: tuple[Any, ...], dy: Tensor) -> dict[str, Any]:
    rows, probs = a["permuted_tokens"], a["probs"]
    grad = op("npu_moe_token_unpermute_grad_v2")
    drows, dprobs = grad(dy, a["sorted_indices"], rows.shape[0], rows.dtype, probs=probs, permuted_tokens=outs[1])
    return {"permuted_tokens": drows} | ({} if probs is None else {"probs": dprobs})


def _of_permute(a: Mapping[str, Any], outs: tuple[Any, ...], dy: Tensor) -> dict[str, Any]:
    (num_tokens, _), chosen = a["tokens"].shape, a["indices"].shape[1]
    return {"tokens": op("npu_moe_token_permute_grad_v2")(dy, outs[1], num_tokens, dy.dtype, chosen)}


GRADIENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "npu_fusion_attention": _of_attention("npu_fusion_attention_grad"),
    "npu_fusion_attention_v3": _of_attention("npu_fusion_attention_grad_v3"),
    "npu_rms_norm": lambda a, outs, dy: dict(
        zip(("input", "gamma"), op("npu_rms_norm_backward")(dy, a["input"], a["gamma"], outs[1]), strict=True)
    ),
    "npu_rotary_mul": lambda a, outs, dy: dict(
        zip(("input", "r1", "r2"), op("npu_rotary_mul_backward")(dy, *list(a.values())[:4]), strict=True)
    ),
    "npu_swiglu": lambda a, outs, dy: {"input": op("npu_swiglu_backward")(dy, a["input"], a["dim"])},
    "npu_gelu": lambda a, outs, dy: {"input": op("npu_gelu_backward")(dy, a["input"], approximate=a["approximate"])},
    "npu_moe_token_permute": _of_permute,
    "_npu_moe_token_unpermute": _of_unpermute,
}
"""Gradients by the name of an argument, from all arguments, results and the gradient of the first result."""


def op(name: str) -> Any:
    """The overload of a name."""
    return getattr(torch.ops.npu, name).default


def bound(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, in the order of the schema, defaults included."""
    arguments = op(name)._schema.arguments
    given = dict(zip((x.name for x in arguments), args, strict=False)) | dict(kwargs)
    return {x.name: given.get(x.name, x.default_value) for x in arguments}


class _Entry(torch.autograd.Function):
    """The entry of an operator that has a gradient."""

    @staticmethod
    def forward(ctx: Any, name: str, *values: Any) -> Any:
        names = [x.name for x in op(name)._schema.arguments]
        with torch._C._AutoDispatchBelowAutograd():
            out = op(name)(**dict(zip(names, values, strict=True)))
        outs = out if isinstance(out, tuple) else (out,)
        everything = (*values, *outs)
        ctx.name, ctx.names, ctx.rest = name, names, [None if isinstance(x, Tensor) else x for x in everything]
        ctx.places = [i for i, x in enumerate(everything) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(everything[i] for i in ctx.places))
        ctx.mark_non_differentiable(*(x for x in outs[1:] if isinstance(x, Tensor)))
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        everything = list(ctx.rest)
        for place, x in zip(ctx.places, ctx.saved_tensors, strict=True):
            everything[place] = x
        arguments = dict(zip(ctx.names, everything, strict=False))
        grads = GRADIENTS[ctx.name](arguments, tuple(everything[len(arguments) :]), dy.contiguous())
        return None, *(grads.get(name) for name in ctx.names)


@cache
def register() -> tuple[Any, ...]:
    """Make the operators, once in a process. Not where torch_npu has been imported."""
    library = torch.library.Library(SPACE, "DEF")
    for name, schema in emulation.SCHEMAS.items():
        library.define(schema)
        if name in COMPOSITE:
            inner = COMPOSITE[name]
            library.impl(name, lambda *a, _inner=inner, **k: op(_inner)(*a, **k)[0], "CompositeImplicitAutograd")
            continue
        library.impl(name, _kernel(name), "CPU")
        if name in FAKES:
            library.impl(name, lambda *a, _name=name, **k: FAKES[_name](**bound(_name, a, k)), "Meta")
        if name in GRADIENTS:
            for key in ("AutogradCPU", "AutogradMeta"):
                library.impl(name, _entry(name), key)
    return (library,)


def _kernel(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return KERNELS[name](**bound(name, args, kwargs))

    return kernel


def _entry(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _Entry.apply(name, *bound(name, args, kwargs).values())
