"""transformers' side of a comparison: its model of a checkpoint, its inputs, its logits and greedy answers.

Samples are handed over as its processors return them, one row at a time. Legend: T tokens, V vocabulary, N media.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import IMAGE, VIDEO, Batch, Sample, to
from mmfn.errors import UserError
from mmfn.interop.hf import load_hf
from mmfn.interop.inputs import samples_from_hf
from mmfn.model import Model, logits
from mmfn.ops import Ops
from mmfn.train.evidence.float64 import float64

PIXELS = ((IMAGE, "pixel_values", "image_grid_thw"), (VIDEO, "pixel_values_videos", "video_grid_thw"))
SECONDS = ("second_per_grid_ts", "video_second_per_grid")
SOUND, LENGTHS = "input_features", "feature_attention_mask"
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Logits of mmfn and of transformers. `largest`: their largest difference, relative to the largest logit.

    `tokens_apart`: of `tokens` places those whose most likely next token is another. `keys`: tensors that transformers
    misses, does not expect or finds of another shape.
    """

    largest: float
    tokens_apart: int
    tokens: int
    keys: int


def compare(
    path: str | Path, samples: Sequence[Sample], dtype: torch.dtype, device: torch.device, ops: Ops
) -> Comparison:
    """The checkpoint `path` in mmfn, all samples in one pack, and in transformers, one at a time, computed in `dtype`.

    In float64 transformers computes in float64 what it would cast to float32 as well. Raises ValueError where the
    installed transformers has no such model.
    """
    is_wide = dtype == torch.float64
    model = load_hf(path, dtype=torch.float32 if is_wide else dtype, device=device)
    if is_wide:
        model = replace(model, params=tree.map(lambda leaf: leaf.double(), model.params))
    rows = [inputs_of(sample, model) for sample in samples]
    both_ways = [row for inputs in rows for row in samples_from_hf(inputs, model)]
    batch = widen(to(model.family.pack(both_ways, model.cfg), device), dtype)
    library_class = class_of(model)
    with float64() if is_wide else nullcontext(), torch.no_grad():
        library, info = load(library_class, path, dtype, device)
        want_TV = torch.cat([library(**arguments(library, row), use_cache=False).logits[0] for row in rows]).double()
        got_TV = logits(model, batch, ops).double()
    return Comparison(
        largest=((got_TV - want_TV).abs().max() / want_TV.abs().max()).item(),
        tokens_apart=int((got_TV.argmax(-1) != want_TV.argmax(-1)).sum()),
        tokens=len(want_TV),
        keys=sum(len(keys) for keys in info.values()),
    )


@torch.no_grad()
def answer(
    path: str | Path, prompts: Sequence[Sample], dtype: torch.dtype, device: torch.device, max_new_tokens: int
) -> list[list[int]]:
    """The tokens that transformers' greedy generation writes behind each prompt."""
    model = load_hf(path, dtype=dtype, device=device)
    library, _ = load(class_of(model), path, dtype, device)
    found = []
    for prompt in prompts:
        row = arguments(library, inputs_of(prompt, model))
        ids = library.generate(**row, max_new_tokens=max_new_tokens, do_sample=False)
        found.append(ids[0, prompt.tokens_T.numel() :].tolist())
    return found


def class_of(model: Model) -> Any:
    """transformers' class of a model. Raises ValueError where the installed one has none."""
    import transformers

    name = model.family.key_map(model.cfg).architecture
    if not hasattr(transformers, name):
        raise UserError(f"transformers {transformers.__version__} has no {name}; install a newer one")
    return getattr(transformers, name)


def load(library_class: Any, path: str | Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, with plain attention and experts, and the keys that do not fit, by what is wrong."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    model, info = library_class.from_pretrained(path, **settings)
    model.set_experts_implementation("eager")
    return model.eval().to(device), info


def inputs_of(sample: Sample, model: Model) -> Inputs:
    """What the processor of the model's family would have returned for a sample, as a batch of one row."""
    inputs: Inputs = {
        "input_ids": sample.tokens_T[None],
        "attention_mask": torch.ones_like(sample.tokens_T)[None],
        "mm_token_type_ids": sample.kinds_T[None],
    }
    for kind, values, grids in PIXELS:
        if media := sample.media(kind):
            inputs[values] = torch.cat([medium.in_floats().inputs_UF for medium in media])
            inputs[grids] = torch.tensor([medium.grid for medium in media])
    if sample.videos:
        seconds = torch.tensor([video.seconds_per_grid for video in sample.videos])
        inputs |= {key: seconds for key in SECONDS if key in model.family.data.input_keys}
    if sample.audios:
        lengths_N = torch.tensor([clip.grid[0] for clip in sample.audios])
        frames_NUF = torch.nn.utils.rnn.pad_sequence(
            [clip.inputs_UF[:length] for clip, length in zip(sample.audios, lengths_N.tolist(), strict=True)],
            batch_first=True,
        )
        inputs[SOUND] = frames_NUF.transpose(1, 2)
        inputs[LENGTHS] = (torch.arange(frames_NUF.shape[1]) < lengths_N[:, None]).long()
    return inputs


def arguments(library: Any, inputs: Inputs) -> dict[str, Any]:
    """What transformers' model is called with: on its device, in its dtype, without keys that it does not take."""
    takes = inspect.signature(library.forward).parameters
    cast = {
        key: x.to(library.dtype) if x.is_floating_point() and key not in SECONDS else x for key, x in inputs.items()
    }
    return {key: x.to(library.device) for key, x in cast.items() if key in takes}


def widen(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with what encoders read in a dtype, and in float64 the weights of tokens too."""
    cast = to(batch, batch.tokens_T.device, dtype)
    return replace(cast, weights_T=batch.weights_T.double()) if dtype == torch.float64 else cast
