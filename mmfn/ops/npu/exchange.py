"""Experts over ranks by `npu_alltoallv_gmm` and `npu_gmm_alltoallv`: an exchange and a grouped product in one operator.

    there  rows by rank and expert travel, are sorted by expert, and meet the weights     x -> y, and the sorted rows
    back   rows by expert meet the weights, are sorted by rank and expert, and travel     y -> x

Neither has a gradient of its own; that of each is the other, with the weights turned and the counts swapped, and the
weights' is a grouped product of rows that lie here: of those that `there` has sorted. Counts are lists of the host, one
for each rank and expert there, those of one rank side by side.

An adapter's matrix lies beside the weight it adapts, so that no row travels twice: `[gate_up | a]` gives its low rows
with the wide ones, and `[y | low]` meets `[down | b]`.

The operators want at least one row sent and one received. A rank that has none sends itself a row of zeros.

Legend: R routed rows of a rank (U of them have an expert), S rows that arrive at it, D width, F feed-forward width,
E experts of a rank, W ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.ops.custom import Context, function
from mmfn.ops.exchange import Experts, Routes, first_rows, with_padding
from mmfn.ops.kernel import Operators
from mmfn.ops.npu.activation import swiglu_halves
from mmfn.ops.npu.experts import OPERATORS as PRODUCTS
from mmfn.ops.npu.experts import grouped_linear, weight_grad
from mmfn.ops.npu.limits import LIMITS, Limits, listed
from mmfn.torch_private import group_backend
from mmfn.tree import Tree

WITHOUT = "or set layout.fused_exchange=false"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How rows go to their experts and come back. `to_E`, `from_E`: rows for and from the experts of every rank."""

    group: str
    size: int
    to_E: Sequence[int]
    from_E: Sequence[int]
    exchanging: Callable[[], AbstractContextManager[None]]

    def there(
        self, x_UD: Tensor, weight: Tensor, *, is_turned: bool, returns_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The rows that arrive times the weights [E, D, F], or [E, F, D] `is_turned`, and these rows, by expert."""
        with self.exchanging():
            y_SF, _, x_SD = torch.ops.npu.npu_alltoallv_gmm(
                x_UD.contiguous(),
                weight,
                self.group,
                self.size,
                self.to_E,
                self.from_E,
                trans_gmm_weight=is_turned,
                permute_out_flag=returns_rows,
            )
        return y_SF, x_SD if returns_rows else None

    def back(self, x_SD: Tensor, weight: Tensor, *, is_turned: bool) -> Tensor:
        """What rows by expert give with the weights, where the rows came from."""
        with self.exchanging():
            y_UF: Tensor = torch.ops.npu.npu_gmm_alltoallv(
                x_SD.contiguous(),
                weight,
                self.group,
                self.size,
                self.from_E,
                self.to_E,
                trans_gmm_weight=is_turned,
            )[0]
        return y_UF


def hccl_name(group: str) -> str:
    """The name that HCCL has for a process group. Raises ValueError where its ranks have not met over HCCL."""
    try:
        name: str = group_backend(group, "npu").get_hccl_comm_name(torch.distributed.get_rank())
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"layout.fused_exchange needs ranks that meet over HCCL; use NPUs, {WITHOUT}") from error
    return name


def experts_over_ranks(
    x_RD: Tensor,
    weights: Tree,
    routes: Routes,
    experts: Experts,
    *,
    limits: Limits = LIMITS,
    name_of: Callable[[str], str] = hccl_name,
) -> Tensor:
    """`mmfn.ops.exchange.experts_over_ranks`; `experts` is not called. `name_of`: what HCCL calls a group.

    Raises ValueError beyond the limits of the operators, in a graph, and where ranks have not met over HCCL.
    """
    check(x_RD, weights, routes, limits)
    to_E, from_E = routes.by_expert()
    rows = max(sum(to_E), sum(from_E))
    if rows > limits.exchange_rows:
        raise UserError(
            f"layout.fused_exchange takes at most {limits.exchange_rows} rows of a rank but got {rows}; use smaller "
            f"batches, {WITHOUT}"
        )
    x_UD, counts_E = first_rows(x_RD, sum(to_E)), routes.from_WG.sum(0)
    is_empty, place = not sum(to_E) or not sum(from_E), sum(to_E[: routes.index * len(counts_E)])
    if is_empty:  # a row of zeros from this rank to its own first expert
        own = routes.index * len(counts_E)
        to_E[own], from_E[own] = to_E[own] + 1, from_E[own] + 1
        x_UD = torch.cat([x_UD[:place], x_UD.new_zeros(1, x_UD.shape[1]), x_UD[place:]])
        counts_E = counts_E + (torch.arange(len(counts_E), device=counts_E.device) == 0)
    way = Way(group=name_of(routes.group), size=routes.size, to_E=to_E, from_E=from_E, exchanging=routes.exchanging)
    y_UD = _computed(x_UD, counts_E, weights, way, limits)
    if is_empty:
        y_UD = torch.cat([y_UD[:place], y_UD[place + 1 :]])
    return with_padding(y_UD, x_RD.shape[0])


def _computed(x_UD: Tensor, counts_E: Tensor, weights: Tree, way: Way, limits: Limits) -> Tensor:
    """`down(silu(gate(x)) * up(x))` with rows that travel; adapters beside the weights."""
    adapters, groups = weights.get("lora", {}), (counts_E, counts_E.cumsum(0))
    product = partial(grouped_linear, counts_E=groups[0], ends_E=groups[1], limits=limits)
    own = adapters.get("gate_up")
    if own is None:
        gate_up_SF: Tensor = _there(way, *groups, x_UD, weights["gate_up"])
    else:
        y_SF = _there(way, *groups, x_UD, weights["gate_up"], own.a)
        wide_SF, low_SF = torch.split(y_SF, [weights["gate_up"].shape[1], own.a.shape[1]], dim=1)
        gate_up_SF = wide_SF + product(own.scale * low_SF, own.b)
    h_SF, own = swiglu_halves(gate_up_SF, limits=limits), adapters.get("down")
    if own is None:
        y_UD: Tensor = _back(way, *groups, h_SF, weights["down"])
    else:
        y_UD = _back(way, *groups, h_SF, own.scale * product(h_SF, own.a), weights["down"], own.b)
    return y_UD


def check(x_RD: Tensor, weights: Tree, routes: Routes, limits: Limits) -> None:
    """Raise ValueError for what the operators do not take."""

    def refuse(takes: str, got: object, fix: str) -> UserError:
        return UserError(f"layout.fused_exchange {takes} but got {got}; {fix}, {WITHOUT}")

    if torch.compiler.is_compiling():
        raise UserError(
            f"layout.fused_exchange takes counts of the host, as no graph has; use train.compile=none, {WITHOUT}"
        )
    if x_RD.dtype not in limits.exchange_dtypes:
        raise refuse(f"takes {listed(limits.exchange_dtypes)}", x_RD.dtype, "set layout.compute_dtype=bfloat16")
    device = device_name(x_RD.device)
    sizes = next((sizes for start, sizes in limits.exchange_ranks if device.startswith(start)), None)
    if sizes is None:
        known = ", ".join(start for start, _ in limits.exchange_ranks)
        raise refuse(f"is for devices {known}", device, "use one of them")
    if routes.size not in sizes:
        raise refuse(f"takes ep of {', '.join(map(str, sizes))} on {device}", routes.size, "use one of them")
    E, adapters = weights["gate_up"].shape[0], weights.get("lora", {})
    ranks = [own.a.shape[1] for own in adapters.values()]
    width = max(*weights["gate_up"].shape[1:], *weights["down"].shape[1:]) + max(ranks, default=0)
    fewest, most = limits.exchange_chosen
    if routes.num_chosen is not None and not fewest <= routes.num_chosen <= most:
        raise refuse(f"takes {fewest} to {most} experts of a token", routes.num_chosen, "use another model")
    for what, size, largest, fix in (
        ("experts of a rank", E, limits.exchange_experts, "use more ep ranks"),
        ("experts of all ranks", E * routes.size, limits.exchange_experts_of_all, "use a smaller model"),
        ("channels", width, limits.width, "use a smaller model"),
    ):
        if size > largest:
            raise refuse(f"takes at most {largest} {what}", size, fix)


@cache
def device_name(device: torch.device) -> str:
    """The name of an NPU; the type of any other device."""
    return str(torch.get_device_module(device).get_device_name(device)) if device.type == "npu" else device.type


def _beside(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _forward_there(ctx: Context, way: Way, counts_E: Tensor, ends_E: Tensor, x_UD: Tensor, *weights: Tensor) -> Tensor:
    needs_dw = any(ctx.needs_input_grad[4:])  # frozen weights need no rows
    y_SF, x_SD = way.there(x_UD, _beside(weights, 1), is_turned=True, returns_rows=needs_dw)
    ctx.save_for_backward(x_SD, counts_E, ends_E, *weights)
    ctx.settings = way
    return y_SF


def _backward_there(ctx: Context, dy_SF: Tensor) -> tuple[Tensor | None, ...]:
    (x_SD, counts_E, ends_E, *weights), way = ctx.saved_tensors, ctx.settings
    _, _, _, needs_dx, *needs_dw = ctx.needs_input_grad
    dx_UD = way.back(dy_SF, _beside(weights, 1), is_turned=False) if needs_dx else None
    parts = torch.split(dy_SF, [weight.shape[1] for weight in weights], dim=1)
    dw = [
        weight_grad(part.contiguous(), x_SD, counts_E, ends_E) if needs else None
        for part, needs in zip(parts, needs_dw, strict=True)
    ]
    return None, None, None, dx_UD, *dw


def _forward_back(ctx: Context, way: Way, counts_E: Tensor, ends_E: Tensor, *rows_and_weights: Tensor) -> Tensor:
    number = len(rows_and_weights) // 2
    y_UD = way.back(_beside(rows_and_weights[:number], 1), _beside(rows_and_weights[number:], 2), is_turned=True)
    ctx.save_for_backward(counts_E, ends_E, *rows_and_weights)
    ctx.settings = way
    return y_UD


def _backward_back(ctx: Context, dy_UD: Tensor) -> tuple[Tensor | None, ...]:
    (counts_E, ends_E, *rows_and_weights), way = ctx.saved_tensors, ctx.settings
    number = len(rows_and_weights) // 2
    rows, weights = rows_and_weights[:number], rows_and_weights[number:]
    needs_dw = ctx.needs_input_grad[3 + number :]
    drows_SF, dy_SD = way.there(dy_UD, _beside(weights, 2), is_turned=False, returns_rows=any(needs_dw))
    drows = torch.split(drows_SF, [x.shape[1] for x in rows], dim=1)
    dw = [
        weight_grad(dy_SD, x, counts_E, ends_E) if needs and dy_SD is not None else None
        for x, needs in zip(rows, needs_dw, strict=True)
    ]
    return None, None, None, *drows, *dw


def _flops_there(
    x: Tensor, weight: Tensor, group: str, size: int, to_E: Sequence[int], from_E: Sequence[int], **_: Any
) -> int:
    """Every row that arrives meets a weight."""
    return 2 * sum(from_E) * weight.numel() // weight.shape[0]


def _flops_back(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * weight.numel() // weight.shape[0]


_there = function(_forward_there, _backward_there)
_back = function(_forward_back, _backward_back)
RESULTS = ("npu::npu_alltoallv_gmm", "npu::npu_gmm_alltoallv")
OPERATORS: Operators = {RESULTS[0]: _flops_there, RESULTS[1]: _flops_back, **PRODUCTS}
