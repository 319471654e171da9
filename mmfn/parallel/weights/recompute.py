"""`Recomputed`: a block that keeps its arguments instead of its activations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmfn.tree import Tree


@dataclass(frozen=True)
class Recomputed:
    """A block that keeps its arguments and runs again when its gradient is wanted.

    `policy` decides for every torch operator whether its result is kept nevertheless. None: no result is.
    """

    block: Callable[..., Any]
    policy: Callable[..., Any] | None = None

    def __call__(self, params: Tree, *xs: Any) -> Any:
        """As the block. Models draw no random numbers, so none are restored."""
        run = partial(checkpoint, self.block, params, *xs, use_reentrant=False, preserve_rng_state=False)
        if self.policy is None:
            return run()
        # the compiler wants this partial made here, where it can see that it is constant
        return run(context_fn=partial(create_selective_checkpoint_contexts, self.policy))
