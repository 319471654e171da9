"""Pytrees: nested dicts, lists and registered dataclasses of tensors, over optree.

A leaf's path is a slash path, `layers/0/attention/q/weight`. Dict keys are visited sorted. Masks are ordered
`(regex, value)` rules over paths; the first full match wins and a rule that matches nothing is an error.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import optree

from mmfn.errors import UserError

Tree = Any  # a nested structure of leaves; mypy has no recursive generic for it
T = TypeVar("T")
NAMESPACE = "mmfn"


def register(cls: type[T]) -> type[T]:
    """Class decorator: make a frozen dataclass a pytree node whose fields are its children, in field order.

    A field declared with `metadata={"static": True}` is kept as metadata and never mapped over.
    """
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    static = [f.name for f in fields(cls) if f.metadata.get("static")]  # type: ignore[arg-type]
    dynamic = [n for n in names if n not in static]

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...], list[str]]:
        return [getattr(node, n) for n in dynamic], tuple(getattr(node, n) for n in static), dynamic

    def unflatten(meta: tuple[Any, ...], children: Iterable[Any]) -> Any:
        return cls(**dict(zip(dynamic, children, strict=True)), **dict(zip(static, meta, strict=True)))

    optree.register_pytree_node(cls, flatten, unflatten, namespace=NAMESPACE)
    return cls


def leaves(tree: Tree) -> list[Any]:
    """The leaves in path order. None is no leaf."""
    found: list[Any] = optree.tree_leaves(tree, namespace=NAMESPACE)
    return found


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """`(leaves, structure)`; `unflatten(structure, leaves)` is the inverse."""
    found, structure = optree.tree_flatten(tree, namespace=NAMESPACE)
    return found, structure


def unflatten(structure: optree.PyTreeSpec, new_leaves: Iterable[Any]) -> Tree:
    """Inverse of `flatten`."""
    return optree.tree_unflatten(structure, new_leaves)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn(leaf, *leaves_of_rest)` for every leaf; all trees have the structure of the first."""
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def paths(tree: Tree) -> list[str]:
    """Slash paths of all leaves, in the order of `leaves`."""
    return ["/".join(str(k) for k in p) for p in optree.tree_paths(tree, namespace=NAMESPACE)]


def items(tree: Tree) -> list[tuple[str, Any]]:
    """`(path, leaf)` pairs in path order."""
    return list(zip(paths(tree), leaves(tree), strict=True))


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn(path, leaf, *leaves_of_rest)` for every leaf; all trees have the structure of the first."""
    return map(fn, unflatten(flatten(tree)[1], paths(tree)), tree, *rest)


def mask(tree: Tree, rules: Sequence[tuple[str, T]], default: T) -> Tree:
    """A tree of values, one per leaf: the value of the first rule whose regex fully matches the leaf's path.

    Raises ValueError when a rule's regex matches no path at all (a misspelt pattern must not pass silently) or is none.

    >>> mask({"norm": 0, "mlp": {"up": 0}}, [(r".*norm", False)], default=True)
    {'mlp': {'up': True}, 'norm': False}
    """
    names = paths(tree)
    compiled = [(_compile(pattern), value) for pattern, value in rules]
    for regex, _ in compiled:
        if not any(regex.fullmatch(name) for name in names):
            shown = ", ".join(names[:3])
            raise UserError(f"pattern {regex.pattern!r} matches none of {len(names)} paths (such as {shown}); fix it")
    values = [next((v for regex, v in compiled if regex.fullmatch(name)), default) for name in names]
    return unflatten(flatten(tree)[1], values)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"pattern {pattern!r} is no regular expression ({error}); fix it") from error
