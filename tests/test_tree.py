"""Pytrees: paths, order, masks, registered dataclasses."""

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import pytest
import torch

from mmfn import tree

NESTED = {"b": [1, {"z": 2, "a": 3}], "a": 4, "none": None, "empty": {}}


@tree.register
@dataclass(frozen=True, kw_only=True)
class Node:
    """Two children in field order, and metadata that is no child."""

    second: Any
    first: Any
    name: str = field(default="", metadata={"static": True})


def test_leaves_and_paths_are_sorted_by_key_and_skip_none() -> None:
    assert tree.paths(NESTED) == ["a", "b/0", "b/1/a", "b/1/z"]
    assert tree.leaves(NESTED) == [4, 1, 3, 2]
    assert tree.items(NESTED) == [("a", 4), ("b/0", 1), ("b/1/a", 3), ("b/1/z", 2)]


def test_list_order_is_numeric() -> None:
    assert tree.paths({"l": list(range(12))})[2:11:8] == ["l/2", "l/10"]


def test_flatten_unflatten_round_trip() -> None:
    flat, structure = tree.flatten(NESTED)
    assert tree.unflatten(structure, flat) == NESTED
    assert tree.unflatten(structure, [x * 10 for x in flat])["b"][1] == {"a": 30, "z": 20}


def test_map_over_several_trees() -> None:
    assert tree.map(lambda x, y: x + y, {"a": 1, "b": [2]}, {"b": [20], "a": 10}) == {"a": 11, "b": [22]}
    assert tree.map_with_path(lambda p, x, y: f"{p}:{x + y}", {"a": [1]}, {"a": [2]}) == {"a": ["a/0:3"]}
    with pytest.raises(ValueError, match=r"(?i)mismatch|expected"):
        tree.map(lambda x, y: x, {"a": 1}, {"b": 1})
    with pytest.raises(ValueError, match=r"(?i)mismatch|expected"):
        tree.map_with_path(lambda p, x, y: x, {"a": 1}, {"b": 1})


def test_registered_dataclass() -> None:
    node = Node(second=torch.ones(2), first=[1, None], name="n")
    assert tree.paths({"n": node}) == ["n/second", "n/first/0"]
    doubled = tree.map(lambda x: x * 2, node)
    assert isinstance(doubled, Node)
    assert doubled.name == "n"
    assert doubled.first == [2, None]
    assert torch.equal(doubled.second, torch.full((2,), 2.0))
    with pytest.raises(FrozenInstanceError):
        doubled.name = "m"  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"(?i)mismatch|expected"):  # metadata is part of the structure
        tree.map(lambda x, y: x, node, Node(second=1, first=[1, None], name="other"))


def test_mask_first_full_match_wins() -> None:
    params = {"norm": 0, "mlp": {"up": 0, "norm": 0}}
    rules = [(r"mlp/norm", "inner"), (r".*norm", "outer")]
    assert tree.mask(params, rules, "none") == {"norm": "outer", "mlp": {"up": "none", "norm": "inner"}}
    assert tree.mask(params, [], True) == {"norm": True, "mlp": {"up": True, "norm": True}}
    assert tree.mask(params, [("mlp.*", 1)], 0) == {"norm": 0, "mlp": {"up": 1, "norm": 1}}


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}"])
def test_mask_refuses_what_is_no_regex(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^pattern '.*' is no regular expression \("):
        tree.mask({"norm": 0}, [(pattern, 1)], 0)


@pytest.mark.parametrize("pattern", ["nrom", "mlp", "up"])  # a prefix or a suffix of a path is no full match
def test_mask_refuses_a_pattern_without_effect(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"pattern '{pattern}' matches none of 2 paths \(such as mlp/up, norm\)"):
        tree.mask({"norm": 0, "mlp": {"up": 0}}, [(".*", 1), (pattern, 1)], 0)
