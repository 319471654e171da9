"""`on_owners`: a function of whole matrices, of which every rank holds some rows, computed once for each.

What cannot be computed on a shard (an orthogonalisation) is computed by one rank for all: each of W ranks gives the
others its rows of their matrices and gets theirs of its own, and the results travel back the same way.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from mmfn.parallel.mesh.axis import Axis


def on_owners(
    fn: Callable[[Tensor], Tensor], x_local_NRC: Tensor, num_rows: int, rows: Axis, copies: Axis, site: str
) -> Tensor:
    """`fn(x_NRC)` of N whole matrices with `num_rows` rows, given and returned as this rank's rows of them.

    `rows`: the axis that cuts them, ceil(num_rows / ranks) each; `copies`: the axis of ranks with equal shards, which
    share the work too. Two exchanges over `rows` and a gather over `copies`, each of ceil(N / ranks) matrices: least is
    lost when N is a multiple of the ranks of both. `fn` treats matrices one by one and zeros as any others.
    """
    N, num_local, C = x_local_NRC.shape
    W, each, own = rows.size, -(-num_rows // rows.size), -(-N // rows.size)
    padded = pad(x_local_NRC, (0, 0, 0, each - num_local, 0, W * own - N))
    met = rows.all_to_all(padded, site).view(W, own, each, C)
    whole = met.transpose(0, 1).reshape(own, W * each, C)[:, :num_rows]
    done = pad(_shared(fn, whole, copies, site), (0, 0, 0, W * each - num_rows)).view(own, W, each, C)
    back = rows.all_to_all(done.transpose(0, 1).reshape(W * own, each, C), site)
    return back[:N, :num_local]


def _shared(fn: Callable[[Tensor], Tensor], x_NRC: Tensor, copies: Axis, site: str) -> Tensor:
    """`fn(x_NRC)`, a part of it on each of the ranks that all hold the same."""
    if copies.size == 1:
        return fn(x_NRC)
    N, own = x_NRC.shape[0], -(-x_NRC.shape[0] // copies.size)
    padded = pad(x_NRC, (0, 0, 0, 0, 0, own * copies.size - N))
    return copies.all_gather(fn(padded.narrow(0, copies.index * own, own)), site)[:N]
