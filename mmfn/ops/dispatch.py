"""What lies around experts: rows sorted by expert, and each token's rows added up again.

    experts_TX = [[1, 0], [3, 3], [1, 2]]   # 3 experts, 2 for each token; the second token is padding: expert 3 is none
    dispatch   -> rows of tokens 0 | 0 2 | 2 | 1 1, counts_E [1, 2, 1], place_TX [[1, 0], [4, 5], [2, 3]]
    combine    -> y_TD[t] = sum_i weights_TX[t, i] * y_RD[place_TX[t, i]]

The backward of each is what the other does forward: no row is added to a place it has to share, so results are the same
on every device, and of tensors of routed rows only those are made that experts read and write.

Legend: T tokens, X experts per token, R = T * X routed rows, D width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel, Operators

WIDE_VALUES = 2**19
"""Values of bfloat16 rows that are cast to float32 at a time: 2 MiB, which a core's cache holds."""


def dispatch(x_TD: Tensor, experts_TX: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(x_RD, counts_E, place_TX)`: a row of x for each of a token's experts, sorted by expert.

    `x_TD`: floating[T, D]. `experts_TX`: int64[T, X] in [0, E]; E stands for no expert, and such rows come last. Rows
    of one expert are in the order of tokens. `counts_E`: int64[E], how many rows each expert has; `place_TX`:
    int64[T, X], the row of each of a token's experts. Raises ValueError for other shapes. Oracle: `dispatch_reference`.
    """
    check_experts(x_TD, experts_TX)
    T, X = experts_TX.shape
    sorted_R, order_R = experts_TX.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_R, torch.arange(num_experts, device=x_TD.device), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    slots_R = torch.arange(T * X, device=x_TD.device)
    place_TX = torch.empty_like(order_R).scatter(0, order_R, slots_R).view(T, X)
    x_RD: Tensor = _rows(x_TD, order_R // max(1, X), place_TX)
    return x_RD, counts_E, place_TX


def dispatch_reference(x_TD: Tensor, experts_TX: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch` one expert after the other."""
    check_experts(x_TD, experts_TX)
    pairs = [(experts_TX == e).nonzero() for e in range(num_experts + 1)]
    tokens_R, choices_R = torch.cat(pairs).unbind(1)
    place_TX = torch.zeros_like(experts_TX)
    place_TX[tokens_R, choices_R] = torch.arange(len(tokens_R), device=x_TD.device)
    counts_E = torch.tensor([len(own) for own in pairs[:-1]], device=x_TD.device)
    return x_TD[tokens_R], counts_E, place_TX


def combine(y_RD: Tensor, place_TX: Tensor, weights_TX: Tensor) -> Tensor:
    """`y_TD[t] = sum_i weights_TX[t, i] * y_RD[place_TX[t, i]]`, added in the order of i in float32 or wider.

    `y_RD`: floating[R, D]. `place_TX`: int64[T, X], every row once (as `dispatch` gives them). `weights_TX`: of y's
    dtype. Returns y's dtype. Raises ValueError for other shapes and dtypes. Oracle: `combine_reference`.
    """
    check_rows(y_RD, place_TX, weights_TX)
    y_TD: Tensor = _weighted(y_RD, place_TX, weights_TX)
    return y_TD


def combine_reference(y_RD: Tensor, place_TX: Tensor, weights_TX: Tensor) -> Tensor:
    """`combine` with all rows at once."""
    check_rows(y_RD, place_TX, weights_TX)
    dtype = wide(y_RD.dtype)
    return (y_RD[place_TX].to(dtype) * weights_TX[..., None].to(dtype)).sum(1).to(y_RD.dtype)


def check_experts(x_TD: Tensor, experts_TX: Tensor) -> None:
    """Raise ValueError unless tokens and their experts fit."""
    if x_TD.ndim != 2 or experts_TX.ndim != 2 or x_TD.shape[0] != experts_TX.shape[0]:
        raise ValueError(
            f"x_TD {tuple(x_TD.shape)} and experts_TX {tuple(experts_TX.shape)} must be [T, D] and [T, X] with one T"
        )


def check_rows(y_RD: Tensor, place_TX: Tensor, weights_TX: Tensor) -> None:
    """Raise ValueError unless rows, their places and weights fit."""
    if y_RD.ndim != 2 or place_TX.shape != weights_TX.shape or place_TX.numel() != y_RD.shape[0]:
        raise ValueError(
            f"y_RD {tuple(y_RD.shape)}, place_TX {tuple(place_TX.shape)} and weights_TX {tuple(weights_TX.shape)} must "
            "be [T * X, D], [T, X] and [T, X]"
        )
    if y_RD.dtype != weights_TX.dtype:
        raise ValueError(f"y_RD is {y_RD.dtype} and weights_TX {weights_TX.dtype}; cast the weights")


def _take_rows(x_TD: Tensor, tokens_R: Tensor, place_TX: Tensor) -> Tensor:
    """A row of x for each row; `place_TX` is of use to the gradient alone."""
    return x_TD.index_select(0, tokens_R)


def _sum_rows(x_RD: Tensor, place_TX: Tensor, weights_TX: Tensor | None) -> Tensor:
    """The sum over i of rows `place_TX[:, i]`, times weights where there are any."""
    if x_RD.device.type != "cpu" or x_RD.dtype != torch.bfloat16:
        return F.embedding_bag(place_TX, x_RD, mode="sum", per_sample_weights=weights_TX)
    # on a CPU embedding_bag rounds ties away from zero where bfloat16 rows lie dense: so it adds up float32
    y_TD = x_RD.new_empty(place_TX.shape[0], x_RD.shape[1])
    size = max(1, WIDE_VALUES // max(1, place_TX.shape[1] * x_RD.shape[1]))
    parts = [x.split(size) for x in (y_TD, place_TX, *(() if weights_TX is None else (weights_TX.float(),)))]
    for y, place, *weights in zip(*parts, strict=True):
        rows_RD = x_RD.index_select(0, place.flatten()).float()
        slots_TX = torch.arange(place.numel(), device=place.device).view(place.shape)
        y.copy_(F.embedding_bag(slots_TX, rows_RD, mode="sum", per_sample_weights=weights[0] if weights else None))
    return y_TD


def _weigh_rows(dy_TD: Tensor, place_TX: Tensor, weights_TX: Tensor) -> Tensor:
    """The gradient of y_RD: each row's token's, times its weight."""
    T, X = place_TX.shape
    slot_R = torch.empty_like(place_TX).flatten()
    slot_R = slot_R.scatter(0, place_TX.flatten(), torch.arange(T * X, device=slot_R.device))
    weights_R1 = weights_TX.flatten().index_select(0, slot_R)[:, None]
    return dy_TD.index_select(0, slot_R // max(1, X)).mul_(weights_R1)


def _row_products(dy_TD: Tensor, y_RD: Tensor, place_TX: Tensor) -> Tensor:
    """The gradient of the weights: [T, X], the product of each row and its token's gradient."""
    dw_TX = y_RD.new_empty(place_TX.shape)
    for i in range(place_TX.shape[1]):
        dw_TX[:, i] = y_RD.index_select(0, place_TX[:, i]).mul_(dy_TD).sum(-1)
    return dw_TX


def _save_place(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _of_tokens(ctx: Context, dx_RD: Tensor) -> tuple[Tensor | None, ...]:
    return SUM_ROWS(dx_RD, *ctx.saved_tensors, None), None, None


def _save_all(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_rows(ctx: Context, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    y_RD, place_TX, weights_TX = ctx.saved_tensors
    needs_dy, _, needs_dw = ctx.needs_input_grad
    dw_TX = ROW_PRODUCTS(dy_TD, y_RD, place_TX) if needs_dw else None
    dy_RD = WEIGH_ROWS(dy_TD, place_TX, weights_TX) if needs_dy else None
    return dy_RD, None, dw_TX


TAKE_ROWS = operator("mmfn::take_rows", _take_rows, lambda x, tokens, place: x.new_empty(tokens.shape[0], x.shape[1]))
SUM_ROWS = operator("mmfn::sum_rows", _sum_rows, lambda x, place, weights: x.new_empty(place.shape[0], x.shape[1]))
WEIGH_ROWS = operator("mmfn::weigh_rows", _weigh_rows, lambda dy, place, w: dy.new_empty(place.numel(), dy.shape[1]))
ROW_PRODUCTS = operator("mmfn::row_products", _row_products, lambda dy, y, place: y.new_empty(place.shape))
_rows = TAKE_ROWS.with_gradient(_save_place, _of_tokens)
_weighted = SUM_ROWS.with_gradient(_save_all, _of_rows)
OPERATORS: Operators = dict.fromkeys(op.name for op in (TAKE_ROWS, SUM_ROWS, WEIGH_ROWS, ROW_PRODUCTS))
DISPATCH = Kernel(dispatch, operators=OPERATORS, results=(TAKE_ROWS.name,))
COMBINE = Kernel(combine, operators=OPERATORS, results=(SUM_ROWS.name,))
