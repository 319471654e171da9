"""Calls of packages against the signatures of their releases, which `signatures.txt` records.

A line is `DISTRIBUTION VERSION MODULE.FUNCTION(PARAMETERS)`, as the release's source has it, without annotations.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn.ops.packages import PACKAGES
from tests.ops.delta_cases import draw, pack
from tests.packages.fakes import FUNCTIONS, installed
from tests.packages.table import laid_over

LINE = re.compile(r"(\S+) (\S+) ([\w.]+)\.(\w+)(\(.*\))")


def recorded() -> Iterator[tuple[str, str, str, str, inspect.Signature]]:
    """Distribution, version, module, function and signature of every line."""
    for line in (Path(__file__).parent / "signatures.txt").read_text(encoding="utf-8").splitlines():
        found = LINE.fullmatch(line)
        assert found is not None, line
        scope: dict[str, Any] = {}
        exec(f"def function{found[5]}: ...", scope)
        yield found[1], found[2], found[3], found[4], inspect.signature(scope["function"])


RECORDED = list(recorded())


def test_every_function_is_recorded_in_versions_that_are_taken() -> None:
    taken = {package.distribution: package.checked for package in PACKAGES.values()}
    assert all(taken[distribution].has(version) for distribution, version, *_ in RECORDED)
    names = {(module, name) for _, _, module, name, _ in RECORDED}
    assert names == {(module, name) for module, functions in FUNCTIONS.items() for name in functions}


@pytest.mark.parametrize("name", [name for functions in FUNCTIONS.values() for name in functions])
def test_fakes_are_called_as_the_newest_release_is(name: str) -> None:
    (fake,) = (functions[name] for functions in FUNCTIONS.values() if name in functions)
    newest = [signature for *_, function, signature in RECORDED if function == name][-1]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(fake).parameters.values()]
    assert str(inspect.Signature(plain)) == str(newest)


def test_every_call_is_one_of_every_release(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[Any, Any]] = {}

    def spied(name: str, fn: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen[name] = args, kwargs
            return fn(*args, **kwargs)

        return run

    with installed() as modules:
        for module, functions in FUNCTIONS.items():
            for name, fn in functions.items():
                monkeypatch.setattr(modules[module], name, spied(name, fn))
        ops, segments = laid_over(), pack([3, 2])
        leaves, do = draw(5, (1, 2, 4, 4))
        q_TKC, _, v_THV, *_ = leaves
        ops.gated_delta_rule(*leaves, segments).backward(do)
        ops.causal_conv1d(v_THV[:, 0], torch.ones(4, 2, dtype=torch.float64), segments).sum().backward()
        ops.attention(v_THV, q_TKC, q_TKC, segments, is_causal=True).backward(do)
    assert len(seen) == sum(map(len, FUNCTIONS.values()))
    for distribution, version, _, name, signature in RECORDED:
        args, kwargs = seen[name]
        assert signature.bind(*args, **kwargs), (distribution, version, name)
