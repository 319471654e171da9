"""`context_parallel`: the tokens of one packed batch spread over the ranks of cp."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from mmfn.batch import Batch, Segments, TowerKind
from mmfn.errors import UserError
from mmfn.ops import Attention, Ops
from mmfn.ops.kernel import wrapping
from mmfn.parallel.context.delta import check_recurrent, spread_recurrence
from mmfn.parallel.context.key_gather import key_gather_attention
from mmfn.parallel.context.ring import ring_attention
from mmfn.parallel.context.token_order import CP_KINDS, segment_multiple, split_tokens, token_multiple
from mmfn.parallel.context.tower_split import split_towers, spread_features
from mmfn.parallel.context.ulysses import kv_repeats, ulysses_attention
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.program import Program, Transform, noted, uses


def context_parallel(
    kind: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    towers: Mapping[str, TowerKind],
    is_recurrent: bool = False,
) -> Transform:
    """Spread tokens over cp ranks, and the items that encoders read with them.

    Placement of a batch's tokens: whole on every cp rank -> Shard over cp in the order of `token_order`. Of a tower's
    inputs: whole items (frames, windows of sound) on one rank each, by cost (`tower_split.assign_items`). Parameters
    are sharded over dp * cp by `data_parallel`, whose reduce-scatter sums their gradients; nothing else is reduced.

    | kind | communication of one attention | segments | recurrent layers |
    |---|---|---|---|
    | ulysses | heads for tokens: two all-to-alls, and two in the backward | any | yes |
    | ring | keys and values shifted around the ring, under way while blocks are computed | padded by the packer | no |
    | usp | ulysses inside, ring outside | padded by the packer | no |
    | gather | keys and values all-gathered, their gradients reduce-scattered | any | yes |

    What is not causal stays whole on its rank, or takes ulysses. Recurrent layers pass states of any number of heads
    (`mmfn.parallel.context.delta`). `num_heads`, `num_kv_heads`: of the text model's attention; `is_recurrent`: whether
    it has layers that carry a state through a row. `towers`: how the model's encoders read (`Family.towers`). The
    identity where cp is 1.

    Raises ValueError for an unknown kind, sizes of the layout it does not use, heads it cannot divide, and recurrent
    layers of a kind that cuts segments (if not told here, then where one is run); and, when a batch is split, for
    tokens or segments that cannot be divided.
    """
    if kind not in CP_KINDS:
        raise UserError(f"context_parallel kind {kind!r} is unknown; use one of {', '.join(CP_KINDS)}")

    def transform(program: Program) -> Program:
        mesh, layout = program.mesh, program.mesh.layout
        if layout.cp == 1:
            return program
        check_kind(kind, layout)
        _check_heads(kind, layout, num_heads, num_kv_heads)
        if is_recurrent:
            check_recurrent(kind)
        ops, before = program.ops, program.split
        place = partial(spread_features, axis=mesh["cp"])

        def split(batch: Batch) -> Batch:
            own = split_tokens(before(batch), kind, mesh)
            return split_towers(own, dict(towers), mesh)

        ops = spread_recurrence(
            replace(ops, attention=_attention(ops, kind, mesh), place_features=place), kind, mesh["cp"]
        )
        done = replace(program, ops=ops)
        return noted(uses(replace(done, split=split), "cp", "ulysses"), _note(kind, layout, num_kv_heads))

    return transform


def _attention(ops: Ops, kind: str, mesh: Mesh) -> Attention:
    """Packed attention of tokens that are spread over cp; what is whole on a rank goes to the table's own."""
    whole, block, block_grad = ops.attention, ops.attention_block, ops.attention_block_grad
    ring = partial(ring_attention, axis=mesh["ring"], block=block, block_grad=block_grad)
    kinds: dict[str, Attention] = {
        "ulysses": partial(ulysses_attention, axis=mesh["ulysses"], inner=whole),
        "ring": ring,
        "usp": partial(ulysses_attention, axis=mesh["ulysses"], inner=ring),
        "gather": partial(key_gather_attention, axis=mesh["cp"], block=block, block_grad=block_grad),
    }
    spread = kinds[kind]

    def attention(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
        attend = spread if segments.spread == "cp" else whole
        return attend(q_THC, k_SKC, v_SKC, segments, is_causal=is_causal)

    return wrapping(attention, whole, block, block_grad)


def check_kind(kind: str, layout: Layout) -> None:
    """Raise ValueError for sizes of a layout of several cp ranks that a kind does not use."""
    allowed = {"ulysses": layout.ring == 1, "usp": layout.ulysses > 1 < layout.ring}.get(kind, layout.ulysses == 1)
    if not allowed:
        rules = {
            "ulysses": f"ulysses = cp; set layout.ulysses to {layout.cp}",
            "usp": "1 < ulysses < cp; change layout.ulysses, or use kind 'ulysses' or 'ring'",
        }
        rule = rules.get(kind, "ulysses = 1; set layout.ulysses to 1, or use kind 'ulysses' or 'usp'")
        raise UserError(f"context_parallel({kind!r}) over {layout} (ulysses {layout.ulysses}) needs {rule}")


def _check_heads(kind: str, layout: Layout, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % layout.ulysses:
        raise UserError(
            f"context_parallel({kind!r}) over {layout}: the model has {num_heads} query heads, which ulysses "
            f"{layout.ulysses} does not divide; use an ulysses that divides them, or kind 'gather' or 'ring'"
        )
    if num_heads % num_kv_heads:
        raise UserError(f"{num_kv_heads} kv heads do not divide {num_heads} query heads; pass those of the text model")


def _note(kind: str, layout: Layout, num_kv_heads: int) -> str:
    note = f"context_parallel({kind!r}): tokens over {layout.cp} ranks, in multiples of {token_multiple(kind, layout)}"
    if (multiple := segment_multiple(kind, layout)) > 1:
        note += f", segments of {multiple}"
    if (repeats := kv_repeats(num_kv_heads, layout.ulysses)) > 1:
        note += f"; every kv head {repeats} times"
    return note
