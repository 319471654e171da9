"""Multi-token prediction: one more block that reads hidden states beside the next token, to predict the one after.

    x_t = fc [norm(embedding of token t + 1) | norm(hidden state of token t)],  then a block,  then a norm

The hidden state is what the head scores, behind the last norm of the text. The embedding is a feature where token t + 1
stands for one. Positions are those of token t, and what is seen lies in its segment. Head and embedding are the text's.

Legend: T tokens, D width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfn.models.layers import decoder, linear, norm
from mmfn.models.layers.decoder import DecoderConfig
from mmfn.models.work import Stage, block
from mmfn.ops import Ops
from mmfn.tree import Tree


def specs(cfg: DecoderConfig, block: Tree) -> Tree:
    """Parameters around one `block`, which are its own; embedding and head are the text's."""
    return {
        "embedding_norm": decoder.norm_specs(cfg),
        "hidden_norm": decoder.norm_specs(cfg),
        "fc": linear.specs(cfg.d_model, 2 * cfg.d_model, "embed merged", std=cfg.init_std),
        "layers": [block],
        "norm": decoder.norm_specs(cfg),
    }


def hidden(
    params: Tree,
    next_TD: Tensor,
    hidden_TD: Tensor,
    cfg: DecoderConfig,
    ops: Ops,
    *,
    decode: Callable[[list[Tree], Tensor], Tensor],
) -> Tensor:
    """What the head scores for the token behind the next. `next_TD`: embeddings of next tokens; `decode`: the blocks.

    Source: `MtpLayer` in transformers 5.23; vLLM's `qwen3_5_mtp`, whose draft is given features too.
    """
    own = ops.gather({name: part for name, part in params.items() if name != "layers"})
    next_TD = norm.rms(own["embedding_norm"], next_TD, cfg.norm_eps, ops)
    hidden_TD = norm.rms(own["hidden_norm"], hidden_TD, cfg.norm_eps, ops)
    x_TD = linear.apply(own["fc"], torch.cat([next_TD, hidden_TD], 1), ops)
    return norm.rms(own["norm"], decode(params["layers"], x_TD), cfg.norm_eps, ops)


def flow(path: str, mixer: Sequence[Stage]) -> list[Stage]:
    """The stages of what predicts ahead, `mixer` those of its block's."""
    return [
        Stage(parameters=(f"{path}/embedding_norm", f"{path}/hidden_norm")),
        Stage(parameters=(f"{path}/fc",)),
        *block(f"{path}/layers/0", mixer),
        Stage(parameters=(f"{path}/norm",)),
    ]


def names(path: str, name: str) -> list[tuple[str, str]]:
    """`(path, Hugging Face name)` of what lies around the block: `names("mtp", "mtp")`."""
    norms = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "norm": "norm"}
    pairs = [(f"{path}/{own}/{{weight}}", f"{name}.{their}.weight") for own, their in norms.items()]
    return [*pairs, (f"{path}/fc/weight", f"{name}.fc.weight")]
