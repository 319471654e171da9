"""`Kernel`: an op of the table with what others must know of it: its torch operators, their FLOPs, what remat may keep.

An op that runs torch's own operators alone declares nothing: `Kernel(fn)`. One with an operator of its own says so:

    Kernel(attention, operators={"mine::attention": flops, "mine::attention_grad": None}, results=("mine::attention",))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Formula = Callable[..., int]
"""FLOPs of one call of an operator, from its arguments and, as `out_val`, its result (`torch.utils.flop_counter`)."""
Operators = Mapping[str, Formula | None]
"""Name of a torch operator -> its FLOPs; None: it multiplies no matrices."""


@dataclass(frozen=True, eq=False)
class Whole:
    """The formula of an operator that a plan counts as one (`mmfn.ops.custom.Operator.is_whole`), or one of torch.

    `body`: what it runs; of one that is no Python, a function that makes the same buffers. A plan runs it once for all
    calls of the same shapes and offsets, on tensors without values, to learn its workspace: the bytes alive beside
    arguments and results. `flops`: None where it multiplies no matrices.
    """

    body: Callable[..., Any]
    flops: Formula | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        """FLOPs of one call."""
        return self.flops(*args, **kwargs) if self.flops is not None else 0


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function, called as it is, and its declaration.

    `operators`: those it appears as besides torch's own.
    `results`: operators whose results are those of the op; selective remat keeps them when it is told to save the op.
    """

    fn: Callable[..., Any]
    operators: Operators = field(default_factory=dict)
    results: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        return self.fn(*args, **kwargs)


def wrapping(
    fn: Callable[..., Any], *inner: Callable[..., Any], operators: Operators | None = None
) -> Callable[..., Any]:
    """`fn`, which calls the ops `inner`, with their declarations and `operators` of its own.

    `wrapping(exchanged, ops.experts)` computes and keeps what `ops.experts` does. Where one of `inner` is not declared,
    nor is the result.
    """
    kernels = [op for op in inner if isinstance(op, Kernel)]
    if len(kernels) < len(inner):
        return fn
    own = {name: flops for kernel in kernels for name, flops in kernel.operators.items()}
    results = dict.fromkeys(name for kernel in kernels for name in kernel.results)
    return Kernel(fn, operators={**own, **(operators or {})}, results=tuple(results))


def declaration(name: str, op: Callable[..., Any]) -> Kernel:
    """The op of the table's entry `name`. Raises ValueError where it is a function that declares nothing."""
    if isinstance(op, Kernel):
        return op
    raise ValueError(
        f"ops.{name} is a function without a declaration, so its torch operators are unknown; put Kernel(fn) into the "
        "table if it runs torch's own alone, else Kernel(fn, operators={name: FLOPs of a call}, results=(name,))"
    )
