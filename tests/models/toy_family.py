"""A family that only tests have, unlike all others, to show that the rest of the package asks for nothing else.

Two towers: "vision", whose blocks attend within windows and within frames by turns, laid window by window; and "audio",
2 inputs and 3 rows a unit, of which the last row is junk that nobody reads. Positions of sound are fractions. A block
of experts routes by sigmoids, within groups, with a bias of the choice that no gradient trains, kept in float32 and
updated from loads. A second head predicts one token further ahead. Experts are stored one by one, gate and up apart.

Legend: T tokens, U inputs, P rows, N features, D width, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import AUDIO, IGNORE, IMAGE, TEXT, Ahead, Batch, Laid, Media, Sample, Tower, TowerKind
from mmfn.models import Output, ahead_loss, work
from mmfn.models.keymap import Entry, KeyMap
from mmfn.models.layers import balance, decoder, linear, moe, norm, rope, text
from mmfn.models.layers import cache as layer_cache
from mmfn.models.layers.decoder import DecoderConfig
from mmfn.models.layers.moe import MoeConfig
from mmfn.models.layers.positions import mrope
from mmfn.models.work import Stage
from mmfn.ops import Ops
from mmfn.spec import normal, spec
from mmfn.tree import Tree
from tests.models import toy_data

D, WINDOW, VALUES = 16, 2, {"vision": 3, "audio": 5}
SAME = {"inputs": 2, "matmul_rows": 40}
KINDS = {
    "vision": TowerKind(media=(IMAGE,), rows=2, features=1, values=VALUES["vision"], segments_per_unit=(1, 1), **SAME),
    "audio": TowerKind(media=(AUDIO,), rows=3, features=2, values=VALUES["audio"], segments_per_unit=(2,), **SAME),
}
RATE = 0.01
data = toy_data.SIDE
lora_targets = (r"text/layers/\d+/attention/(q|v)",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What shared code reads, and the sizes of the text."""

    vocab_size: int
    num_layers: int
    decoder: DecoderConfig
    moe: MoeConfig


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """Sizes that fit 8 experts and any layout of up to 4 ranks."""
    sizes = {"d_model": D, "d_ff": 20, "init_std": 0.3}
    text = DecoderConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=4, norm_eps=1e-6)
    chosen = {"num_chosen": 2, "scores": "sigmoid", "num_groups": 4, "num_chosen_groups": 2, "scale": 1.5}
    moe = MoeConfig(**{**sizes, "d_ff": 6}, num_experts=8, **chosen)
    return Config(vocab_size=hf.get("vocab_size", 61), num_layers=hf.get("num_layers", 2), decoder=text, moe=moe)


def specs(cfg: Config) -> Tree:
    """The first text block is dense, the others have experts."""
    sparse = moe.specs(cfg.moe)
    bias = spec((cfg.moe.num_experts,), "router", normal(0.1))
    sparse["router"]["choice_bias"] = replace(bias, dtype=torch.float32, is_frozen=True, rule="loads")
    attention = decoder.attention_specs(cfg.decoder)
    blocks = [decoder.dense_specs(cfg.decoder)]
    blocks += [decoder.specs(cfg.decoder, attention=attention, moe=sparse)] * (cfg.num_layers - 1)
    table = spec((cfg.vocab_size, D), "vocab embed", normal(0.3))
    return {
        "text": {"embed": {"weight": table}, "layers": blocks[: cfg.num_layers], "norm": norm.rms_specs(D, "embed")},
        "head": {"weight": table},
        "mtp": {"join": linear.specs(D, 2 * D, "embed merged", std=0.3), "norm": norm.rms_specs(D, "embed")},
        **{name: _tower_specs(values) for name, values in VALUES.items()},
    }


def _tower_specs(values: int) -> Tree:
    block = {"qkv": linear.specs(3 * D, D, "vision_heads vision_embed", std=0.3, parts=3)}
    entry = linear.specs(D, values, "vision_embed tower_inputs", std=0.3, bias=True)
    return {"entry": entry, "layers": [block] * 2, "exit": linear.specs(D, D, "embed merged", std=0.3)}


def apply(params: Tree, batch: Batch, cfg: Config, ops: Ops, cache: layer_cache.Cache | None = None) -> Output:
    """Embed, place the features of both towers, decode, and join every token with the next one for the second head."""
    embed = partial(text.embed, params["text"]["embed"], ops=ops, pad_token_id=None)
    x_TD, features = embed(batch.tokens_T), {}
    for name, tower in batch.towers.items():
        features[name] = _encode(params[name], tower, name, ops)
        x_TD = text.replace_by_features(x_TD, features[name], tower.index_T, ops)
    angles = rope.interleaved(batch.positions_3T, (1, 1, 0), 100.0)
    layers, feed = params["text"]["layers"], partial(moe.mixed, cfg=cfg.moe, ops=ops)
    holes = {"mixer": partial(decoder.attend, cfg=cfg.decoder, ops=ops), "feed_forward": feed}
    x_TD, routers, cache = text.decode(layers, x_TD, angles, batch, cfg.decoder, ops, **holes, cache=cache)
    hidden_TD = norm.rms(ops.gather(params["text"]["norm"]), x_TD, 1e-6, ops)

    def further(ahead: Ahead) -> Tensor:
        next_TD, own = embed(ahead.tokens_T), ops.gather(params["mtp"])
        for name, index_T in ahead.index_T.items():
            next_TD = text.replace_by_features(next_TD, features[name], index_T, ops)
        joined_TD = linear.apply(own["join"], torch.cat([next_TD, hidden_TD], 1), ops)
        return norm.rms(own["norm"], joined_TD, 1e-6, ops)

    ahead = tuple(partial(further, tokens) for tokens in batch.ahead)
    counts = {f"text/layers/{i}/moe/router/choice_bias": r["counts_E"] for i, r in enumerate(routers) if r is not None}
    losses, stats = balance.router_losses(routers, ops), balance.router_stats(routers)
    return Output(hidden_TD=hidden_TD, ahead=ahead, losses=losses, stats=stats, counts=counts, cache=cache)


def _encode(params: Tree, tower: Tower, name: str, ops: Ops) -> Tensor:
    """Features: of vision the mean of two rows, of sound the two rows of a unit that are no junk."""
    entry, kind = ops.gather(params["entry"]), KINDS[name]
    units_UF = tower.inputs_UF.unflatten(0, (-1, kind.inputs))
    rows = units_UF if name == "vision" else torch.cat([units_UF, units_UF[:, :1]], 1)
    x_PD = linear.apply(entry, rows.flatten(0, 1).to(entry["weight"].dtype), ops)
    lists = [tower.segments[min(i, len(tower.segments) - 1)] for i in range(len(params["layers"]))]
    x_PD, _, _ = ops.stack(ops.layer, partial(_block, ops=ops), params["layers"], x_PD, name=name, each=lists)
    units_ND = x_PD.unflatten(0, (-1, kind.rows))
    x_ND = units_ND.mean(1) if name == "vision" else units_ND[:, :2].flatten(0, 1)
    return linear.apply(ops.gather(params["exit"]), x_ND, ops)


def _block(params: Tree, x_PD: Tensor, segments: Any, *, ops: Ops) -> tuple[Tensor, None]:
    params = ops.gather(params)
    q, k, v = linear.apply(params["qkv"], x_PD, ops).unflatten(1, (3, 2, D // 2)).unbind(1)
    return x_PD + ops.attention(q, k, v, segments, is_causal=False).flatten(1), None


def head(params: Tree, cfg: Config, ops: Ops) -> Tensor:
    """`weight_VD`."""
    weight_VD: Tensor = ops.gather_head(params["head"])["weight"]
    return weight_VD


def positions(sample: Sample, cfg: Config) -> Tensor:
    """An image is a block of rows and columns; sound advances by half a position a token."""
    return mrope(sample.tokens_T.numel(), _blocks(sample))


def _blocks(sample: Sample) -> Any:
    media = {IMAGE: iter(sample.images), AUDIO: iter(sample.audios)}
    kinds, lengths = torch.unique_consecutive(sample.kinds_T, return_counts=True)
    for kind, end, length in zip(kinds.tolist(), lengths.cumsum(0).tolist(), lengths.tolist(), strict=True):
        if kind != TEXT:
            next(media[kind])
            place_M = torch.arange(length) * (0.5 if kind == AUDIO else 1.0)
            rows_M = place_M if kind == AUDIO else torch.zeros(length)
            yield torch.arange(end - length, end), torch.stack([rows_M, rows_M, place_M])


def towers(cfg: Config) -> dict[str, TowerKind]:
    """Two of them."""
    return KINDS


def lay(sample: Sample, cfg: Config) -> dict[str, Laid]:
    """Units of an image in the order of their windows, last window first; a clip of n units is n items."""
    found = {}
    for name, kind in KINDS.items():
        inputs, places, lengths, start = [], [torch.arange(0)], [], 0
        for medium in sample.media(*kind.media):
            units_UF = medium.inputs_UF.unflatten(0, (-1, kind.inputs))
            n = units_UF.shape[0]
            order_N = torch.arange(n) if name == "audio" else torch.arange(n).flip(0)
            inputs.append(units_UF[order_N].flatten(0, 1))
            first_N1 = (start + order_N.argsort())[:, None] * kind.features
            places.append((first_N1 + torch.arange(kind.features)).flatten())
            lengths, start = [*lengths, n], start + n
        index_T = torch.full_like(sample.tokens_T, -1)
        index_T[sample.kinds_T == kind.media[0]] = torch.cat(places)
        windows = [2 * min(WINDOW, n - i) for n in lengths for i in range(0, n, WINDOW)]
        segments = ((2, 1) * start,) if name == "audio" else (tuple(windows), tuple(2 * n for n in lengths))
        items = (1,) * start if name == "audio" else tuple(lengths)
        coords_P4 = torch.zeros(start * kind.rows, 4, dtype=torch.int32)
        found[name] = Laid(inputs=tuple(inputs), coords_P4=coords_P4, segments=segments, items=items, index_T=index_T)
    return found


def flow(cfg: Config) -> dict[str, list[Stage]]:
    """The stages of both towers, the text and the second head."""
    mixer = [work.attention(f"text/layers/{i}/attention", 16, work.CAUSAL_PAIRS) for i in range(cfg.num_layers)]
    blocks = [stage for i, stages in enumerate(mixer) for stage in work.block(f"text/layers/{i}", stages)]
    text_ = [Stage(parameters=("text/embed",), share=0), *blocks, Stage(parameters=("text/norm",))]
    ahead = [Stage(parameters=("mtp/join",)), Stage(parameters=("mtp/norm",))]
    return {
        **{name: _tower_flow(name, kind) for name, kind in KINDS.items()},
        "text": [*text_, Stage(parameters=("head",), count=work.labels(0))],
        ahead_loss(0): [*ahead, Stage(parameters=("head",), count=work.labels(1))],
    }


def _tower_flow(name: str, kind: TowerKind) -> list[Stage]:
    lists, rows = [min(i, len(kind.segments_per_unit) - 1) for i in range(2)], work.rows(name)
    blocks = [work.attention(f"{name}/layers/{i}", D, work.pairs(name, k), rows) for i, k in enumerate(lists)]
    entry = Stage(parameters=(f"{name}/entry",), count=rows)
    last = Stage(parameters=(f"{name}/exit",), count=rows, share=Fraction(kind.features, kind.rows))
    return [entry, *(stage for stages in blocks for stage in stages), last]


def kinds(tokens_T: Tensor, cfg: Config) -> Tensor:
    """Token 1 stands for images, token 2 for sound."""
    return torch.where(tokens_T == 1, IMAGE, torch.where(tokens_T == 2, AUDIO, TEXT))


def example(num_tokens: int, side: int, cfg: Config) -> Sample:
    """An image of `side` units, and as much sound, before text."""
    side = min(side, (num_tokens - 2) // 3)
    kinds_T = torch.tensor([IMAGE] * side + [AUDIO] * 2 * side + [TEXT] * (num_tokens - 3 * side))
    tokens_T = torch.where(kinds_T == IMAGE, 1, torch.where(kinds_T == AUDIO, 2, 3 + torch.arange(num_tokens) % 50))
    media = [Media(inputs_UF=torch.empty(2 * side, n), grid=(2 * side, 1, 1)) for n in VALUES.values()]
    labels_T = torch.where(kinds_T == TEXT, tokens_T, IGNORE)
    images, audios = ((media[0],), (media[1],)) if side else ((), ())
    return Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, images=images, audios=audios)


def row_ids(batch: Batch, cfg: Config) -> list[tuple[str, Tensor]]:
    """Text alone has adapters that drop."""
    return [("text/", batch.token_ids_T)]


def at_depth(cfg: Config, num_layers: int) -> Config:
    """The first text blocks."""
    return replace(cfg, num_layers=num_layers)


def taps(cfg: Config) -> int:
    """The first text block is dense."""
    return 1


num_ahead = taps


def experts_per_token(cfg: Config) -> int:
    """That of its routers."""
    return cfg.moe.num_chosen


def loss_weights(cfg: Config) -> dict[str, float]:
    """Those of the load-balancing loss and the second head."""
    return {ahead_loss(0): 0.3, balance.ROUTER_LOSS: 0.1}


def rules(cfg: Config) -> dict[str, Any]:
    """A loaded expert's bias falls, an idle one's rises."""
    return {"loads": lambda counts_E: RATE * (counts_E.mean() - counts_E).sign()}


def parts(cfg: Config) -> dict[str, str]:
    """What a run can freeze."""
    return {"towers": r"(vision|audio)/.*"}


def empty_cache(cfg: Config, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> list[Tree]:
    """Keys and values."""
    return layer_cache.empty(cfg.num_layers, (num_rows, num_columns, 2, 4), dtype, device)


def key_map(cfg: Config) -> KeyMap:
    """Names of another world: an expert's matrices are apart; buffers are ignored, another part is passed through."""
    one = "model.blocks.{i}.experts.{e}"
    experts = (
        Entry(path="text/layers/{i}/moe/experts/gate_up", name=(f"{one}.gate.weight", f"{one}.up.weight"), join=1),
        Entry(path="text/layers/{i}/moe/experts/down", name=f"{one}.down.weight"),
    )
    paths, ignore = [path for path in tree.paths(specs(cfg)) if "/experts/" not in path], (r".*\.inv_freq",)
    names = [path.replace("text/layers", "model.blocks").replace("text", "model").replace("/", ".") for path in paths]
    others = [Entry(path=path, name=name) for path, name in zip(paths, names, strict=True)]
    return KeyMap(
        entries=(*experts, *others), architecture="ToyForEverything", ignore=ignore, verbatim=(r"talker\..*",)
    )
