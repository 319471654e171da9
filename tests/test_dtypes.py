"""The dtype for sums, against torch's own promotion with float32."""

import itertools

import torch

from mmfn.dtypes import wide

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def test_wide_is_what_torch_promotes_to_with_float32() -> None:
    for first, second in itertools.product(FLOATING, repeat=2):
        assert wide(first) == torch.promote_types(first, torch.float32)
        assert wide(first, second) == torch.promote_types(torch.promote_types(first, second), torch.float32)
    assert wide() == torch.float32
