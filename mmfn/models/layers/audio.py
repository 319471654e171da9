"""An audio tower that reads sound by the second: convolutions over chunks, then blocks that attend within windows.

A clip is log-mel frames, cut into chunks of `CHUNK` frames, the last one filled up with zeros. Three convolutions of
stride 2 make `ROWS` rows of each chunk, which never sees another; then rows attend to those of their window, some
chunks of one clip. Chunks have one size, so a tail's last rows stand for nothing: they are a segment of their own that
nobody reads. Source: `Qwen3OmniMoeAudioEncoder` in transformers 5.23, which fills a tail up to the longest chunk of the
call instead, so that there a clip alone and one beside others give different features.

Legend: U frames, F mel bins, N chunks, P rows, D width, H heads, T tokens.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import log, prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mmfn.batch import AUDIO, Laid, Media, Sample, Segments, Tower, TowerKind
from mmfn.errors import UserError
from mmfn.models.hf_config import ConfigReader
from mmfn.models.layers import linear, norm
from mmfn.models.work import Stage, attention, block, pairs, rows
from mmfn.ops import Ops
from mmfn.spec import ZEROS, normal, spec
from mmfn.tree import Tree

CHUNK, ROWS = 100, 13  # frames of a chunk, and the rows it becomes: 100, 50, 25, 13
CONVOLUTIONS = ("conv1", "conv2", "conv3")
PIECE = 128  # chunks convolved at once; of 480 channels each takes 8 MiB in bfloat16 until its gradient is there
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Sizes of the tower. `window`: chunks of a clip that attend to each other; `d_conv`: channels of convolutions."""

    depth: int
    d_model: int
    d_ff: int
    num_heads: int
    d_out: int
    num_mels: int
    d_conv: int
    window: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads or self.d_model % 2 or self.d_model < 4:
            raise UserError(
                f"audio_config.d_model is {self.d_model} but must be an even multiple, 4 or more, of "
                f"encoder_attention_heads {self.num_heads}; correct the model's config.json"
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.d_model // self.num_heads

    @property
    def row_values(self) -> int:
        """What the convolutions give for a row: all channels at each of the mel bins that are left."""
        return self.d_conv * _halved(self.num_mels)


def config_from_hf(hf: ConfigReader) -> AudioConfig:
    """The `audio_config` of a `config.json`, a family's defaults filled in.

    Raises ValueError for settings mmfn does not implement.
    """
    hf.only("n_window", CHUNK // 2, f"a chunk of {CHUNK} frames gives {ROWS} tokens")
    hf.only("activation_function", "gelu", "the blocks have exact GELUs, as the convolutions")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        hf.only(name, 0.0, "there is no dropout")
    return AudioConfig(
        depth=hf.integer("encoder_layers"),
        d_model=hf.integer("d_model"),
        d_ff=hf.integer("encoder_ffn_dim"),
        num_heads=hf.integer("encoder_attention_heads"),
        d_out=hf.integer("output_dim"),
        num_mels=hf.integer("num_mel_bins"),
        d_conv=hf.integer("downsample_hidden_size"),
        window=hf.integer("n_window_infer", minimum=CHUNK) // CHUNK,
        init_std=hf.number("initializer_range", 0.02),
    )


def specs(cfg: AudioConfig) -> Tree:
    """The parameters of the tower.

    What makes the rows is drawn by its fan-in: drawn as small as the rest, rows drown in the sinusoids added to them,
    and a model that is trained from the start does not learn to hear.
    """
    D, std = cfg.d_model, cfg.init_std
    return {
        "convolutions": {
            name: _convolution_specs(1 if name == CONVOLUTIONS[0] else cfg.d_conv, cfg) for name in CONVOLUTIONS
        },
        "entry": linear.specs(D, cfg.row_values, "audio_embed audio_channels", std=cfg.row_values**-0.5),
        "layers": [block_specs(cfg) for _ in range(cfg.depth)],
        "projector": {
            "norm": norm.layer_specs(D, "audio_embed"),
            "up": linear.specs(D, D, "audio_mlp audio_embed", std=std, bias=True),
            "down": linear.specs(cfg.d_out, D, "embed audio_mlp", std=std, bias=True),
        },
    }


def _convolution_specs(channels: int, cfg: AudioConfig) -> Tree:
    shape = (cfg.d_conv, channels, 3, 3)
    return {
        "weight": spec(shape, "audio_channels tower_inputs kernel kernel", normal(prod(shape[1:]) ** -0.5)),
        "bias": spec((cfg.d_conv,), "audio_channels", ZEROS),
    }


def encode(params: Tree, tower: Tower, cfg: AudioConfig, ops: Ops) -> Tensor:
    """`features_PD`: one for every row, `ROWS` of each chunk; no token is given those that stand for nothing."""
    run, rows = partial(ops.stack, ops.layer, name="audio"), []
    for piece_UF in torch.split(tower.inputs_UF, PIECE * CHUNK):
        x, _, _ = run(partial(convolve, ops=ops), [params["convolutions"]], piece_UF)
        rows.append(x)
    x_PD = linear.apply(ops.gather(params["entry"]), torch.cat(rows), ops)
    x_PD = (x_PD.view(-1, ROWS, cfg.d_model) + sinusoids(cfg.d_model, x_PD.device).to(x_PD.dtype)).flatten(0, 1)
    block, windows = partial(audio_block, cfg=cfg, ops=ops), [tower.segments[0]] * cfg.depth
    x_PD, _, _ = run(block, params["layers"], x_PD, each=windows)
    projector = ops.gather(params["projector"])
    normed_PD = norm.layer(projector["norm"], x_PD, NORM_EPS, ops)
    return linear.apply(projector["down"], ops.gelu(linear.apply(projector["up"], normed_PD, ops)), ops)


def convolve(params: Tree, frames_UF: Tensor, *, ops: Ops) -> tuple[Tensor, None]:
    """Frames of whole chunks -> their rows [P, d_conv * bins], in the weights' dtype.

    Channels lie last in memory, as libraries of convolutions want them: they would copy otherwise, unseen by a plan.
    """
    params = ops.gather(params)
    x = frames_UF.view(-1, CHUNK, frames_UF.shape[1]).transpose(1, 2)[:, None]
    x = x.to(params[CONVOLUTIONS[0]]["weight"].dtype)
    for name in CONVOLUTIONS:
        x, weight = channels_last(x), channels_last(params[name]["weight"])
        x = ops.gelu(conv2d(x, weight, params[name]["bias"], stride=2, padding=1))
    return x.permute(0, 3, 1, 2).flatten(2).flatten(0, 1), None


def channels_last(x: Tensor) -> Tensor:
    """The same values so laid in memory; written out, as NPUs do not know torch's memory format."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def sinusoids(width: int, device: torch.device) -> Tensor:
    """float32[ROWS, D]: sines and cosines of a row's place in its chunk. Source: Vaswani et al. 2017, section 3.5."""
    half = width // 2
    step = log(10_000.0) / max(1, half - 1)
    angles = torch.arange(ROWS, device=device)[:, None] * torch.exp(-step * torch.arange(half, device=device).float())
    return torch.cat([angles.sin(), angles.cos()], 1)


def block_specs(cfg: AudioConfig) -> Tree:
    """Parameters of one block."""
    D, F, std = cfg.d_model, cfg.d_ff, cfg.init_std
    into = {name: linear.specs(D, D, "audio_heads audio_embed", std=std, bias=True) for name in "qkv"}
    return {
        "attention": {**into, "o": linear.specs(D, D, "audio_embed audio_heads", std=std, bias=True)},
        "attention_norm": norm.layer_specs(D, "audio_embed"),
        "mlp": {
            "up": linear.specs(F, D, "audio_mlp audio_embed", std=std, bias=True),
            "down": linear.specs(D, F, "audio_embed audio_mlp", std=std, bias=True),
        },
        "mlp_norm": norm.layer_specs(D, "audio_embed"),
    }


def audio_block(params: Tree, x_PD: Tensor, windows: Segments, *, cfg: AudioConfig, ops: Ops) -> tuple[Tensor, None]:
    """One pre-norm block; a row attends to its whole window. Where a row lies its first layer was told."""
    params = ops.gather(params)
    attention, mlp = params["attention"], params["mlp"]
    normed_PD = norm.layer(params["attention_norm"], x_PD, NORM_EPS, ops)
    q_PHC, k_PHC, v_PHC = (
        linear.apply(attention[name], normed_PD, ops).view(-1, cfg.num_heads, cfg.head_dim) for name in "qkv"
    )
    out_PHC = ops.attention(q_PHC, k_PHC, v_PHC, windows, is_causal=False)
    x_PD = x_PD + linear.apply(attention["o"], out_PHC.flatten(1), ops)
    normed_PD = norm.layer(params["mlp_norm"], x_PD, NORM_EPS, ops)
    return x_PD + linear.apply(mlp["down"], ops.gelu(linear.apply(mlp["up"], normed_PD, ops)), ops), None


def tower_kind(cfg: AudioConfig) -> TowerKind:
    """Sound by the chunk. A row costs a block what a patch costs one of vision (`vision_language.towers`)."""
    return TowerKind(
        media=(AUDIO,),
        inputs=CHUNK,
        rows=ROWS,
        features=ROWS,
        values=cfg.num_mels,
        segments_per_unit=(2,),  # of a chunk that is a window: what is sound, and the rest
        matmul_rows=2 * cfg.d_model + cfg.d_ff,
    )


def flow(cfg: AudioConfig) -> list[Stage]:
    """The stages of the tower. A convolution multiplies with its weight once for every value of a channel it gives."""
    frames, mels, convolutions = CHUNK, cfg.num_mels, []
    for name in CONVOLUTIONS:
        frames, mels = (frames + 1) // 2, (mels + 1) // 2
        path, share = f"audio/convolutions/{name}", Fraction(frames * mels, ROWS)
        convolutions.append(Stage(parameters=(path,), count=rows("audio"), share=share))
    paths = [f"audio/layers/{i}" for i in range(cfg.depth)]
    mixers = [attention(f"{path}/attention", cfg.d_model, pairs("audio"), rows("audio")) for path in paths]
    return [
        *convolutions,
        Stage(parameters=("audio/entry",), count=rows("audio")),
        *(stage for path, mixer in zip(paths, mixers, strict=True) for stage in block(path, mixer, rows("audio"))),
        *(Stage(parameters=(f"audio/projector/{name}",), count=rows("audio")) for name in ("norm", "up", "down")),
    ]


def lay(sample: Sample, cfg: AudioConfig) -> Laid:
    """The frames of a sample's clips, in order; an item is a window.

    A clip of 230 frames, of which a window takes 2 chunks: items of 2 chunks and 1, segments of 26, 4 and 9 rows, and
    tokens of the rows 0 ... 29. Raises ValueError for clips that do not fit the tower, and placeholders that do not fit
    the clips.
    """
    segments: list[int] = []
    items: list[int] = []
    rows, start = [torch.zeros(0, dtype=torch.int64)], 0
    for clip in sample.audios:
        _check(sample, clip, cfg)
        chunks, valid = clip.inputs_UF.shape[0] // CHUNK, num_rows(clip.grid[0])
        rows.append(torch.arange(start, start + valid))
        for first in range(0, chunks, cfg.window):
            items.append(min(cfg.window, chunks - first))
            sound = min(valid - first * ROWS, items[-1] * ROWS)
            segments += [n for n in (sound, items[-1] * ROWS - sound) if n]
        start += chunks * ROWS
    return Laid(
        inputs=tuple(clip.inputs_UF for clip in sample.audios),
        coords_P4=torch.zeros(start, 4, dtype=torch.int32),
        segments=(tuple(segments),),
        items=tuple(items),
        index_T=_index(sample, torch.cat(rows)),
    )


def num_rows(num_frames: int) -> int:
    """Rows, and so tokens, of so many frames: 13 of each whole chunk and what three halvings leave of the rest."""
    return num_frames // CHUNK * ROWS + _halved(num_frames % CHUNK)


def clip_of(frames_UF: Tensor) -> Media:
    """float32[U, F] log-mel frames -> `Media`, filled up to whole chunks; its grid says how many frames are sound."""
    num = frames_UF.shape[0]
    zeros = frames_UF.new_zeros(-num % CHUNK, frames_UF.shape[1])
    return Media(inputs_UF=torch.cat([frames_UF, zeros]), grid=(num, 1, 1))


def names(name: str) -> list[tuple[str, str]]:
    """`(path, Hugging Face name)` of the tower's leaves, there under `name`."""
    pairs = {
        **{f"convolutions/{own}": f"conv2d{i}" for i, own in enumerate(CONVOLUTIONS, start=1)},
        "entry": "conv_out",
        "layers/{i}/attention_norm": "layers.{i}.self_attn_layer_norm",
        "layers/{i}/attention/o": "layers.{i}.self_attn.out_proj",
        "layers/{i}/attention/{proj}": "layers.{i}.self_attn.{proj}_proj",
        "layers/{i}/mlp_norm": "layers.{i}.final_layer_norm",
        "layers/{i}/mlp/up": "layers.{i}.fc1",
        "layers/{i}/mlp/down": "layers.{i}.fc2",
        "projector/norm": "ln_post",
        "projector/up": "proj1",
        "projector/down": "proj2",
    }
    return [(f"audio/{own}/{{leaf}}", f"{name}.{their}.{{leaf}}") for own, their in pairs.items()]


def _halved(num: int) -> int:
    for _ in CONVOLUTIONS:
        num = (num + 1) // 2
    return num


def _index(sample: Sample, rows_N: Tensor) -> Tensor:
    is_sound_T = sample.kinds_T == AUDIO
    places = int(is_sound_T.sum())
    if places != rows_N.numel():
        raise UserError(
            f"sample {sample.id!r} has {places} audio placeholder tokens but its {len(sample.audios)} clips give "
            f"{rows_N.numel()} features; make the text and the media agree"
        )
    index_T = torch.full_like(sample.kinds_T, -1)
    index_T[is_sound_T] = rows_N
    return index_T


def _check(sample: Sample, clip: Media, cfg: AudioConfig) -> None:
    num, shape = clip.grid[0], list(clip.inputs_UF.shape)
    expected = [-(-num // CHUNK) * CHUNK, cfg.num_mels]
    if num < 1 or shape != expected:
        raise UserError(
            f"sample {sample.id!r} has a clip of {num} frames and inputs of shape {shape}, not {expected}; preprocess "
            "it for this model"
        )
