"""`run`: operators without their values, so that a program of any size runs on a laptop.

Floating-point tensors live on torch's meta device: they have shapes and storages but no memory.
Integers and what is computed from them alone (tokens, offsets, labels, counts of rows) stay real, so a program takes
every branch, and makes every tensor, that it would with these tokens. A meta tensor is a plain tensor to Python, so
hand-written Functions run as they do in eager execution. Only a value that depends on a parameter is unknown, and
reading one is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfn.torch_private import READ_ONE, UNSAFE_VIEW
from mmfn.torch_private import schema as schema_of

_aten = torch.ops.aten
_META, _HOST = torch.device("meta"), torch.device("cpu")
_EMPTY = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
_CREATE = _EMPTY | {
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
}
_BAGS = {_aten._embedding_bag, _aten._embedding_bag_forward_only}
_READ = {READ_ONE, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal}


def run(func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operator, under a dispatch mode, on a mixture of meta and real tensors.

    Raises ValueError where a program reads a value that it does not have.
    """
    if types:  # a DTensor: its own rules, on meta shards
        return func(*args, **kwargs)
    kind = _kind(func)
    unknown = _unknown(args, kwargs)
    if True not in unknown:
        return _known(func, kind, args, kwargs)
    if kind.reads:
        raise ValueError(
            f"the program reads a value that depends on parameters ({kind.packet}), which a plan does not have; "
            "give the plan an op that decides without reading"
        )
    if kind.makes_nothing:  # writes its arguments
        return None
    if kind.creates and not _dtype_of(args, kwargs).is_floating_point:
        return func(*_swap(args, _stand_in), **_at(kwargs, _HOST))
    if kind.is_functional:
        return _outputs(func, args, _at(kwargs, _META))
    if kind.written is not None and (written := _written(kind.written, args, kwargs)) is not None:
        if not written.is_meta and not written.dtype.is_floating_point:
            raise ValueError(f"the program writes a value that depends on parameters into integers ({kind.packet})")
        return written
    if False in unknown:
        args = _swap(args, _to_meta)
    return func(*args, **_at(kwargs, _META))


class _Kind(NamedTuple):
    """What is known of an operator, by its schema and by the lists above."""

    packet: Any
    makes_empty: bool
    creates: bool
    reads: bool
    is_functional: bool  # makes new tensors from its arguments and writes none of them
    makes_nothing: bool
    written: tuple[int, str] | None  # the one argument that it writes and returns, its shape kept


@cache
def _kind(func: Any) -> _Kind:
    schema = schema_of(func)
    is_view = func.overloadpacket is UNSAFE_VIEW  # which its schema does not declare
    named = [(i, x.name, x.alias_info) for i, x in enumerate(schema.arguments)]
    written = [(i, name) for i, name, alias in named if alias is not None and alias.is_write]
    keeps_shape = len(written) == 1 == len(schema.returns) and torch.Tag.inplace_view not in func.tags
    return _Kind(
        packet=func.overloadpacket,
        makes_empty=func.overloadpacket in _EMPTY,
        creates=func.overloadpacket in _CREATE,
        reads=func.overloadpacket in _READ,
        is_functional=not is_view and all(x.alias_info is None for x in (*schema.arguments, *schema.returns)),
        makes_nothing=not schema.returns,
        written=written[0] if keeps_shape else None,
    )


def _known(func: Any, kind: _Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Every tensor is real, or there is none: compute, but make floating tensors without values on the meta device."""
    if kind.makes_empty:
        device = _META if _dtype_of(args, kwargs).is_floating_point else _HOST
        return func(*_swap(args, _to_meta) if device == _META else args, **{**kwargs, "device": device})
    out = func(*args, **kwargs)
    is_lost = isinstance(out, Tensor) and out.is_meta and not out.dtype.is_floating_point
    return func(*args, **_at(kwargs, _HOST)) if is_lost else out


def _written(argument: tuple[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    place, name = argument
    value = kwargs[name] if name in kwargs else args[place]
    return value if isinstance(value, Tensor) else None


class _Like(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """A meta tensor."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=_META)


class _Values(NamedTuple):
    """Integers that are known, such as offsets."""

    values: Any
    dtype: torch.dtype

    def make(self) -> Tensor:
        """A tensor of them on the host."""
        return torch.tensor(self.values, dtype=self.dtype)


def freeze(args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments as a key: floating-point tensors by shape, integers in vectors by value."""
    return tuple(
        _Values(tuple(x.tolist()), x.dtype)
        if isinstance(x, Tensor) and not x.dtype.is_floating_point
        else _freeze([x])[0]
        for x in args
    )


def thaw(key: Sequence[Any]) -> list[Any]:
    """The arguments of `freeze`, floating-point tensors on the meta device."""
    return _thaw(key)


def _outputs(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """New meta tensors, of shapes that are worked out once for each kind of call."""
    made = _shapes_of(func, _freeze(args), tuple(kwargs), _freeze(list(kwargs.values())))
    if isinstance(made, _Like):
        return made.make()
    return type(made)(x.make() if isinstance(x, _Like) else x for x in made)


@lru_cache(maxsize=2**16)
def _shapes_of(func: Any, args: tuple[Any, ...], names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    out = func(*_thaw(args), **dict(zip(names, _thaw(values), strict=True)))
    if func.overloadpacket in _BAGS:  # beside the sums, kernels return a size and an index per bag, shapes alone more
        sums, _, sizes, _ = out
        out = (sums, sizes.new_empty(0), sizes, torch.empty_like(sizes))
    return _like(out) if isinstance(out, Tensor) else type(out)(_like(x) for x in out)


def _like(x: Any) -> Any:
    return _Like(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _freeze(values: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments as a key: tensors by shape, numbers by type as well (1 and 1.0 give different dtypes)."""
    return tuple(
        _like(v) if isinstance(v, Tensor) else (list, _freeze(v)) if isinstance(v, list | tuple) else (type(v), v)
        for v in values
    )


def _thaw(values: Sequence[Any]) -> list[Any]:
    return [v.make() if isinstance(v, _Like | _Values) else _thaw(v[1]) if v[0] is list else v[1] for v in values]


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)


def _stand_in(x: Tensor) -> Tensor:
    """A real tensor of x's shape."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_HOST) if x.is_meta else x


def _dtype_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype:
    """The dtype an operator that makes a tensor will give it."""
    like = args[0] if args and isinstance(args[0], Tensor) else None
    dtype: torch.dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
    return dtype


def _at(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {**kwargs, "device": device} if kwargs.get("device") is not None else kwargs


def _unknown(args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[bool]:
    """For the tensors among arguments, whether they are without values."""
    found = set()
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.add(value.is_meta)
        elif isinstance(value, list | tuple):
            found.update(x.is_meta for x in value if isinstance(x, Tensor))
    return found


def _swap(values: Sequence[Any], fn: Callable[[Tensor], Tensor]) -> list[Any]:
    """`fn` of every tensor among arguments; operators nest tensors in flat lists at most."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fn(value)
        if isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
            return [fn(x) if isinstance(x, Tensor) else x for x in value]
        return value

    return [one(value) for value in values]
