"""What Qwen3.5 alone has: a block that predicts one token further ahead, memories of segments, names of experts."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen3_5 import modeling_qwen3_5

import mmfn
from mmfn import lora, tree
from mmfn import ops as op_tables
from mmfn.models import ahead_loss
from mmfn.train.evidence.float64 import float64
from mmfn.train.objective import Objective, loss_terms
from tests import oracles
from tests.batches import packed, wide
from tests.tiny import TINY, model_of, random_samples

Params = dict[str, Tensor]
NAMES = ("delta", "delta_moe")
EPS = 1e-6


# ---- the block ahead, written a second time: by names of the checkpoint, row by row, one token after the other


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Over the last dim, weighed by 1 + w."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight)


def rotate(x_TC: Tensor, angles_TR: Tensor) -> Tensor:
    """The first 2 R channels of a head, channel i with R + i."""
    R = angles_TR.shape[1]
    turned = torch.complex(x_TC[:, :R], x_TC[:, R : 2 * R])
    turned = turned * torch.complex(angles_TR.cos().double(), angles_TR.sin().double())
    return torch.cat([turned.real, turned.imag, x_TC[:, 2 * R :]], 1)


def angles_of(model: mmfn.Model, positions_3T: Tensor) -> Tensor:
    """Every third pair follows the height, every third the width, as far as the sections reach; the rest time.

    In float32, as everywhere.
    """
    _, height, width = model.cfg.rope_sections
    R, columns = sum(model.cfg.rope_sections), []
    frequencies = 1 / model.cfg.rope_theta ** (torch.arange(0, 2 * R, 2, dtype=torch.float32) / (2 * R))
    for i in range(R):
        axis = 1 if i % 3 == 1 and i < 3 * height else 2 if i % 3 == 2 and i < 3 * width else 0
        columns.append(positions_3T[axis].float() * frequencies[i])
    return torch.stack(columns, 1)


def attend(p: Params, x_TD: Tensor, angles_TR: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Head by head; behind a head's queries stand its gates."""
    T, outs = len(x_TD), []
    C, group = len(p["q_norm.weight"]), num_heads // num_kv_heads
    q = (x_TD @ p["q_proj.weight"].T).view(T, num_heads, 2, C)
    k, v = ((x_TD @ p[f"{name}_proj.weight"].T).view(T, num_kv_heads, C) for name in "kv")
    for h in range(num_heads):
        q_TC = rotate(rms(q[:, h, 0], p["q_norm.weight"]), angles_TR)
        k_TC = rotate(rms(k[:, h // group], p["k_norm.weight"]), angles_TR)
        scores_TT = q_TC @ k_TC.T / C**0.5 + torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        outs.append(scores_TT.softmax(1) @ v[:, h // group] / (1 + (-q[:, h, 1]).exp()))
    return torch.cat(outs, 1) @ p["o_proj.weight"].T


def feed(p: Params, x_TD: Tensor, num_chosen: int) -> Tensor:
    """Dense, or the experts of each token one by one, beside the shared one."""

    def swiglu(name: str, x: Tensor) -> Tensor:
        gate, up = (x @ p[f"{name}{part}_proj.weight"].T for part in ("gate", "up"))
        return (silu(gate) * up) @ p[f"{name}down_proj.weight"].T

    if "gate.weight" not in p:
        return swiglu("", x_TD)
    out = torch.sigmoid(x_TD @ p["shared_expert_gate.weight"].T) * swiglu("shared_expert.", x_TD)
    rows = []
    for x_D, shared_D in zip(x_TD, out, strict=True):
        weights, experts = (p["gate.weight"] @ x_D).softmax(0).topk(num_chosen)
        parts = [
            w * swiglu(f"experts.{e}.", x_D) for w, e in zip(weights / weights.sum(), experts.tolist(), strict=True)
        ]
        rows.append(shared_D + torch.stack(parts).sum(0))
    return torch.stack(rows)


def under(p: Params, prefix: str) -> Params:
    """What lies under a name."""
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def ahead_reference(
    model: mmfn.Model, p: Params, hidden_TD: Tensor, embedded_TD: Tensor, positions_3T: Tensor
) -> Tensor:
    """Of one row: what is scored for the token behind the next, at all tokens but the last."""
    own, layer, cfg = under(p, "mtp."), under(p, "mtp.layers.0."), model.cfg
    pair = [
        rms(embedded_TD[1:], own["pre_fc_norm_embedding.weight"]),
        rms(hidden_TD[:-1], own["pre_fc_norm_hidden.weight"]),
    ]
    x_TD = torch.cat(pair, 1) @ own["fc.weight"].T
    heads = (cfg.decoder.num_heads, cfg.decoder.num_kv_heads)
    angles_TR = angles_of(model, positions_3T)[:-1]
    x_TD = x_TD + attend(under(layer, "self_attn."), rms(x_TD, layer["input_layernorm.weight"]), angles_TR, *heads)
    normed_TD = rms(x_TD, layer["post_attention_layernorm.weight"])
    x_TD = x_TD + feed(under(layer, "mlp."), normed_TD, cfg.moe.num_chosen if cfg.moe else 0)
    return rms(x_TD, own["norm.weight"])


def embedded(model: mmfn.Model, batch: Any) -> Tensor:
    """What enters the first text block."""
    seen: list[Tensor] = []

    def layer(block: Any, params: Any, x: Tensor, *xs: Any) -> Any:
        if "mlp_norm" in params and "patch_embed" not in params and x.shape[0] == batch.tokens_T.numel():
            seen.append(x)
        return block(params, x, *xs)

    table = replace(op_tables.portable(), layer=layer)
    model.family.apply(model.params, replace(batch, ahead=()), model.cfg, table)
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_block_ahead_equals_a_second_writing_of_it(name: str) -> None:
    """Hidden states, and the loss, with media among the rows; targets are two places on in the same row alone."""
    model = model_of(name)
    rows = random_samples(model, seed=11, num=5)
    assert any(row.images for row in rows)
    batch, p = wide(packed(model, rows)), mmfn.to_hf(model.params, model)
    out = model.family.apply(model.params, batch, model.cfg, op_tables.portable())
    got_TD, x_TD = out.ahead[0](), embedded(model, batch)
    weight_VD, labels, scored, start = p.get("lm_head.weight", p["model.language_model.embed_tokens.weight"]), [], [], 0
    for row in rows:
        own = slice(start, start + (T := row.tokens_T.numel()))
        want_TD = ahead_reference(model, p, out.hidden_TD[own], x_TD[own], batch.positions_3T[:, own])
        torch.testing.assert_close(got_TD[own][:-1], want_TD, rtol=0, atol=1e-12)
        labels.append(row.labels_T[2:])
        scored.append(want_TD[: T - 2] @ weight_VD.T)
        start += T
    _, metrics = mmfn.loss(model.params, batch, model)
    want = cross_entropy(torch.cat(scored), torch.cat(labels), ignore_index=-100, reduction="sum") / metrics["tokens"]
    torch.testing.assert_close(metrics[ahead_loss(0)], want, rtol=1e-12, atol=0)


def test_the_block_ahead_equals_the_layer_of_transformers() -> None:
    """`MtpLayer` around the library's own block; it feeds a Qwen3.5 nowhere."""
    model = model_of("delta")
    text = TINY["delta"](2)["text_config"]
    cfg = oracles.config(family="qwen3_5", sections=(1, 1, 0), text={**text, "rotary": 0.5}).text_config
    cfg = copy.deepcopy(cfg)
    cfg.layer_types, cfg.num_hidden_layers, cfg._attn_implementation = ["full_attention"], 1, "eager"
    layer = MtpLayer(cfg, modeling_qwen3_5.Qwen3_5DecoderLayer, modeling_qwen3_5.Qwen3_5RMSNorm, 0).double()
    renamed = {"fc": "eh_proj", "norm": "post_norm", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    stored = under(mmfn.to_hf(model.params, model), "mtp.")
    own = {name.replace("layers.0.", "mtp_block."): x for name, x in stored.items()}
    layer.load_state_dict(
        {renamed.get(n.removesuffix(".weight"), n.removesuffix(".weight")) + ".weight": x for n, x in own.items()}
    )
    row = next(row for row in random_samples(model, seed=11, num=9) if row.images)
    batch = wide(packed(model, [row]))
    out = model.family.apply(model.params, batch, model.cfg, op_tables.portable())
    x_TD, angles_TR = embedded(model, batch), angles_of(model, batch.positions_3T)
    tables = [torch.cat([f(angles_TR).double()] * 2, 1)[None, :-1] for f in (torch.cos, torch.sin)]
    mask = torch.full((len(x_TD) - 1,) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad(), float64():
        want_TD = layer(x_TD[None, 1:], out.hidden_TD[None, :-1], tables, mask, None, None)[0]
    torch.testing.assert_close(out.ahead[0]()[:-1], want_TD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_ahead_sees_its_segment_up_to_the_next_token(name: str) -> None:
    """By gradients of the embedding, a row of its own for every token."""
    model = model_of(name)
    rows = [replace(row, images=(), videos=()) for row in random_samples(model, seed=2, num=3, kinds=[1])]
    rows = [replace(r, tokens_T=r.tokens_T[:6], labels_T=r.labels_T[:6], kinds_T=r.kinds_T[:6] * 0) for r in rows]
    batch = wide(packed(model, rows))
    T = batch.tokens_T.numel()
    ids_T, segment_T = torch.arange(T), batch.segment_T
    last_T = torch.cat([segment_T[1:] != segment_T[:-1], torch.tensor([True])])
    ahead = replace(batch.ahead[0], tokens_T=torch.where(last_T, 0, ids_T + 1))
    alone = replace(batch, tokens_T=ids_T, ahead=(ahead,))

    def scored(params: Any, t: int) -> Tensor:
        return model.family.apply(params, alone, model.cfg, op_tables.portable()).ahead[0]()[t].square().sum()

    for t in range(T - 1):
        if last_T[t]:
            continue
        _, grads = mmfn.value_and_grad(scored)(model.params, t)
        seen_T = grads["text"]["embed"]["weight"][:T].abs().sum(1) > 0
        assert torch.equal(seen_T, (segment_T == segment_T[t]) & (ids_T <= t + 1)), t


# ---- what it weighs, and what becomes of it where it is not trained


def test_the_weight_is_that_of_the_config_or_the_objective() -> None:
    model = model_of("delta")
    batch, name = wide(packed(model, random_samples(model, seed=3, num=4))), ahead_loss(0)
    found = {}
    for weight in (None, 0.0, 2.0):
        objective = Objective(loss_weights={} if weight is None else {name: weight})
        found[weight] = mmfn.loss(model.params, batch, model, objective=objective)
        assert loss_terms(objective, model.family, model.cfg) == (() if weight == 0 else ("ce", name))
    (whole, metrics), (without, others), (heavy, _) = found.values()
    assert name not in others
    assert float(whole - without) == pytest.approx(0.3 * float(metrics[name]), rel=1e-9)
    assert float(heavy - without) == pytest.approx(2.0 * float(metrics[name]), rel=1e-9)


def tiny_config(name: str, **text: Any) -> dict[str, Any]:
    """The config.json of a tiny model with other values of its text."""
    config = TINY[name](2)
    return {**config, "text_config": {**config["text_config"], **text}}


def read(folder: Path) -> Params:
    """All tensors of a checkpoint."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [{"mtp_loss_scaling_factor": 0}, {"mtp_num_hidden_layers": 0}], ids=str)
def test_a_block_ahead_that_is_not_trained_is_saved_as_it_was(name: str, text: dict[str, Any], tmp_path: Path) -> None:
    mmfn.save_hf(tmp_path / "a", mmfn.init(tiny_config(name), seed=1, dtype=torch.bfloat16))
    stored, config = read(tmp_path / "a"), json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"].update(text)
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    model = mmfn.load_hf(tmp_path / "a")
    assert "mtp" not in model.params
    assert model.family.num_ahead(model.cfg) == 0
    assert not packed(model, random_samples(model, seed=3, num=1)).ahead
    changed = replace(model, params=tree.map(lambda x: x + 1, model.params))
    mmfn.save_hf(tmp_path / "b", changed, assets=tmp_path / "a")
    saved = read(tmp_path / "b")
    assert saved.keys() == stored.keys()
    ahead = [key for key in stored if key.startswith("mtp.")]
    assert len(ahead) == (15 if name == "delta" else 41)
    assert all(torch.equal(saved[key], stored[key]) and saved[key].dtype == stored[key].dtype for key in ahead)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_may_lack_the_block_that_its_config_names(name: str, tmp_path: Path) -> None:
    """As one that transformers saved does, which drops it."""
    mmfn.save_hf(tmp_path / "a", mmfn.init(tiny_config(name), seed=1))
    file = tmp_path / "a" / "model.safetensors"
    save_file({key: x for key, x in load_file(file).items() if not key.startswith("mtp.")}, file)
    model = mmfn.load_hf(tmp_path / "a")
    assert "mtp" not in model.params
    assert model.family.loss_weights(model.cfg).keys() == ({"aux_loss"} if name == "delta_moe" else set())
    some = tmp_path / "a" / "model.safetensors"
    save_file({**load_file(some), "mtp.norm.weight": torch.zeros(20)}, some)
    with pytest.raises(ValueError, match=r"lacks tensor 'mtp\."):
        mmfn.load_hf(tmp_path / "a")


def test_a_checkpoint_comes_back_in_every_layout_of_experts(tmp_path: Path) -> None:
    """Qwen3.5 stores those of the block ahead one by one, Qwen3.6 and memory fused, transformers saves all apart."""
    model = mmfn.init(tiny_config("delta_moe"), seed=1, dtype=torch.bfloat16)
    numbers = {"hub": (0, 24), "transformers": (0, 0), "apart": (48, 24)}
    for layout, count in numbers.items():
        mmfn.save_hf(tmp_path / layout, model, layout=layout)
        names = [key for key in read(tmp_path / layout) if ".experts." in key and key.endswith("_proj.weight")]
        assert (
            len([n for n in names if n.startswith("model.")]),
            len([n for n in names if n.startswith("mtp.")]),
        ) == count
        again = mmfn.load_hf(tmp_path / layout)
        pairs = zip(tree.leaves(again.params), tree.leaves(model.params), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_dtypes_are_those_of_published_files(tmp_path: Path) -> None:
    """`A_log` and the norm behind the memory in float32, all else, the bias of decay too, in bfloat16."""
    mmfn.save_hf(tmp_path / "a", mmfn.init(tiny_config("delta"), seed=1, dtype=torch.bfloat16))
    stored = read(tmp_path / "a")
    wide_names = {key for key, x in stored.items() if x.dtype == torch.float32}
    assert wide_names == {key for key in stored if key.endswith(("A_log", "linear_attn.norm.weight"))} != set()
    mmfn.save_hf(tmp_path / "b", mmfn.load_hf(tmp_path / "a"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_adapters_leave_the_block_ahead_and_are_merged_beside_it(tmp_path: Path) -> None:
    model = mmfn.init(tiny_config("delta"), seed=1)
    specs = lora.lora(model.family.specs(model.cfg), rank=2, alpha=2.0, targets=model.family.lora_targets)
    assert not any(path.startswith("mtp/") and "/lora/" in path for path in tree.paths(specs))
    adapted = tree.map_with_path(
        lambda path, x: x + 0.1 if "/lora/" in path else x, lora.add_adapters(model.params, specs, 0)
    )
    mmfn.save_hf(tmp_path / "a", replace(model, params=lora.merge(adapted)))
    again = mmfn.load_hf(tmp_path / "a")
    assert all(
        torch.equal(a, b)
        for a, b in zip(tree.leaves(again.params["mtp"]), tree.leaves(model.params["mtp"]), strict=True)
    )
    batch = packed(model, random_samples(model, seed=7, num=2))
    found = [mmfn.loss(params, batch, model)[1][ahead_loss(0)] for params in (adapted, again.params)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# ---- configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers is 2 but must be 1: one token further ahead"),
        ({"mtp_use_dedicated_embeddings": True}, "embedding and head are shared"),
        ({"attn_output_gate": False}, "attention has a gate"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads is 6 but must be a multiple of linear_num_key_heads 4"),
        ({"layer_types": ["linear_attention"]}, "layer_types is .* but must be a list of 2 of"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(text: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmfn.init(tiny_config("delta", **text))


def test_kinds_of_blocks_follow_from_either_setting() -> None:
    family = model_of("delta").family
    every = {"num_hidden_layers": 9, "full_attention_interval": 4}
    kinds = family.config_from_hf(tiny_config("delta", **every)).layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [3, 7]
    listed = ["full_attention", "linear_attention"]
    specs = family.specs(family.config_from_hf(tiny_config("delta", layer_types=listed)))
    assert ["delta" in block for block in specs["text"]["layers"]] == [False, True]
