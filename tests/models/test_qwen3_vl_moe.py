"""Qwen3-VL with experts: the load-balancing loss, layouts of layers, the published configuration, compiled blocks."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfn
from mmfn import spec, tree
from mmfn.batch import Sample
from mmfn.models import family, qwen3_vl_moe
from mmfn.models.layers import moe
from mmfn.models.layers.balance import balance
from mmfn.ops import portable
from mmfn.packing import Sizes
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.train.objective import loss_fn, weigh
from tests import oracles
from tests.batches import packed
from tests.oracles import ATOL, RTOL

FAMILY = "qwen3_vl_moe"
# As published: 235 billion parameters, 22 of them active.
PUBLISHED = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl_moe",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def oracle_gradients(oracle, value):
    oracle.zero_grad()
    value.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}


def assert_named_close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    oracle = oracles.build(
        oracles.config(
            family=FAMILY, text={"num_hidden_layers": 3, "router_aux_loss_coef": 0.2, "output_router_logits": True}
        )
    )
    return oracle, mmfn.load_hf(oracles.save(oracle, tmp_path_factory.mktemp("pair")))


def pooled(params, batch, model):
    """The load-balancing loss alone."""
    return model.family.apply(params, batch, model.cfg, portable()).losses["aux_loss"]()


def statistics(model, batch):
    """What the routers of a model report of a batch."""
    found = []

    def layer(block, params, *xs):
        x, out = block(params, *xs)
        found.append(out["router"] if isinstance(out, dict) else None)
        return x, out

    model.family.apply(model.params, batch, model.cfg, replace(portable(), layer=layer))
    return moe.total(found)


@pytest.mark.parametrize("seed", range(15))
def test_losses_and_their_gradients_equal_transformers(seed, tmp_path):
    config = oracles.random_config(seed + 200, FAMILY)
    config.text_config.output_router_logits = True  # else the balance of routers does not count
    oracle = oracles.build(config, seed)
    inputs = oracles.labelled(oracle.config, seed, rows=1 + seed % 3, pad=("right", "left")[seed % 2])
    model = mmfn.load_hf(oracles.save(oracle, tmp_path))
    batch = mmfn.batch_from_hf(inputs, model)
    out = oracle(**inputs, use_cache=False, output_router_logits=True)
    (value, metrics), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(model.params, batch, model)
    torch.testing.assert_close(value, out.loss.detach(), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(metrics["aux_loss"], out.aux_loss.detach(), rtol=RTOL, atol=ATOL)
    assert metrics["dropped"].item() == 0
    assert_named_close(mmfn.to_hf(grads, model, "transformers"), oracle_gradients(oracle, out.loss))
    again = oracle(**inputs, use_cache=False, output_router_logits=True)
    aux, aux_grads = mmfn.value_and_grad(pooled)(model.params, batch, model)
    torch.testing.assert_close(aux, again.aux_loss.detach(), rtol=RTOL, atol=ATOL)
    want = oracle_gradients(oracle, again.aux_loss)
    assert any(grad.any() for name, grad in want.items() if name.endswith("mlp.gate.weight"))
    assert_named_close(mmfn.to_hf(aux_grads, model, "transformers"), want)


def test_equal_loads_give_the_experts_per_token(pair):
    _, model = pair
    even_E = torch.full((6,), 4.0)
    aux = {"judged_E": even_E, "probs_E": even_E / 2, "rows": torch.tensor(12.0)}
    assert balance(aux, portable()).item() == pytest.approx(model.cfg.moe.num_chosen)
    nothing = {"judged_E": 0 * even_E, "probs_E": 0 * even_E, "rows": torch.tensor(0.0)}
    assert balance(nothing, portable()).item() == 0.0


def test_shares_of_ranks_add_up_with_one_sum(pair):
    """Statistics of two ranks: each adds the other's counts, and the shares and their gradients make up the whole."""
    oracle, model = pair
    parts = [
        statistics(model, mmfn.batch_from_hf(row, model))
        for row in oracles.rows_of(oracles.inputs(oracle.config, 4, rows=2))
    ]
    stacked = torch.stack([torch.cat([p["judged_E"], p["rows"][None]]) for p in parts])
    sums = []

    def psum(x):
        sums.append(x)
        return stacked.sum(0)

    shares = [balance(part, replace(portable(), psum=psum)) for part in parts]
    whole = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    torch.testing.assert_close(sum(shares), balance(whole, portable()))
    assert torch.equal(torch.stack(sums), stacked)
    assert not stacked.requires_grad


def test_a_step_takes_the_mean_over_micro_batches(pair):
    oracle, model = pair
    batches = [mmfn.batch_from_hf(oracles.labelled(oracle.config, seed, rows=2), model) for seed in range(3)]
    weighed = weigh(batches, "per_token_loss")
    alone = [pooled(model.params, b, model).item() for b in batches]
    metrics = [loss_fn(model.params, b, model.family, model.cfg, portable())[1] for b in weighed]
    assert sum(m["aux_loss"].item() for m in metrics) == pytest.approx(sum(alone) / 3, rel=1e-6)
    silent = replace(model, cfg=replace(model.cfg, router_aux_coef=0.0))
    without = [loss_fn(model.params, b, model.family, silent.cfg, portable())[1]["loss"].item() for b in weighed]
    gain = sum(m["loss"].item() for m in metrics) - sum(without)
    assert gain == pytest.approx(0.2 * sum(alone) / 3, rel=1e-4)
    # a batch that no step has weighed is a sum of cross entropies alone
    value, unweighed = loss_fn(model.params, batches[0], model.family, model.cfg, portable())
    want, _ = loss_fn(model.params, batches[0], model.family, silent.cfg, portable())
    assert (value.item(), unweighed["aux_loss"].item()) == (want.item(), 0.0)


def test_a_model_without_experts_has_no_router_loss(tmp_path):
    oracle = oracles.build(oracles.config(family=FAMILY, text={"mlp_only_layers": [0, 1]}))
    model = mmfn.load_hf(oracles.save(oracle, tmp_path))
    inputs = oracles.labelled(oracle.config, 0)
    value, metrics = mmfn.loss(model.params, mmfn.batch_from_hf(inputs, model), model)
    torch.testing.assert_close(value, oracle(**inputs, use_cache=False).loss.detach(), rtol=RTOL, atol=ATOL)
    assert metrics.keys() == {"loss", "tokens"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
def test_compiled_blocks_are_one_graph_and_equal_eager(pair):
    """One graph per kind of block, forward and backward, whatever the routing of a batch of these shapes."""
    oracle, model = pair
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    program = lower(pipe(Program.of(model.family.specs(model.cfg)), compiled("layer", backend=backend)))
    for seed in range(3):
        samples = texts(oracles.labelled(oracle.config, seed, rows=2, images=0, videos=0))
        batch = packed(model, samples, tokens=64, segments=3, patches=8)
        differentiate = mmfn.value_and_grad(mmfn.loss, has_aux=True)
        (want, want_metrics), want_grads = differentiate(model.params, batch, model)
        with program.compiling():
            (got, metrics), grads = differentiate(model.params, batch, model, ops=program.ops)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(metrics["aux_loss"], want_metrics["aux_loss"])
        assert_named_close(mmfn.to_hf(grads, model), mmfn.to_hf(want_grads, model))
    assert len(graphs) == 2  # a vision block and a text block
    torch._dynamo.reset()


def texts(inputs):
    """The rows of a batch without media, as samples."""
    rows = zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), strict=True)
    return [
        Sample(tokens_T=ids[mask], labels_T=labels[mask], kinds_T=torch.zeros_like(ids[mask]))
        for ids, labels, mask in rows
    ]


def test_the_published_model_parses_and_counts():
    cfg = qwen3_vl_moe.config_from_hf(PUBLISHED)
    assert (cfg.num_layers, cfg.moe.num_experts, cfg.moe.num_chosen, cfg.moe.d_ff) == (94, 128, 8, 1536)
    assert (cfg.decoder.num_heads, cfg.decoder.num_kv_heads, cfg.decoder.head_dim) == (64, 4, 128)
    assert (cfg.rope_theta, cfg.is_tied, cfg.router_aux_coef) == (5_000_000.0, False, 0.0)
    assert cfg.moe_layers == frozenset(range(94))
    specs = qwen3_vl_moe.specs(cfg)
    hf = transformers.Qwen3VLMoeConfig.from_dict(PUBLISHED)
    with torch.device("meta"):
        oracle = transformers.Qwen3VLMoeForConditionalGeneration(hf)
    stored = qwen3_vl_moe.key_map(cfg).disk_tensors(specs, "transformers")
    assert {n: s.shape for n, s in stored.items()} == {n: tuple(p.shape) for n, p in oracle.named_parameters()}
    assert spec.num_params(specs) == sum(p.numel() for p in oracle.parameters()) == 235_670_022_896


def test_fake_parameters_run_shapes_alone():
    """Forward and backward of the published widths, cut to two layers, without memory for its 6 billion parameters."""
    text = PUBLISHED["text_config"] | {"num_hidden_layers": 2, "output_router_logits": True}
    vision = PUBLISHED["vision_config"] | {"depth": 1, "deepstack_visual_indexes": [0]}
    cfg = qwen3_vl_moe.config_from_hf(PUBLISHED | {"text_config": text, "vision_config": vision})
    sample = Sample(tokens_T=torch.arange(40), labels_T=torch.arange(40), kinds_T=torch.zeros(40, dtype=torch.int64))
    batch = family(FAMILY).pack([sample], cfg, Sizes(tokens=64, units={"vision": 2}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = tree.map(lambda s: torch.empty(s.shape, dtype=torch.bfloat16), qwen3_vl_moe.specs(cfg))
        differentiate = mmfn.value_and_grad(loss_fn, has_aux=True)
        (value, metrics), grads = differentiate(params, batch, family(FAMILY), cfg, portable())
    assert (value.shape, metrics["aux_loss"].shape) == ((), ())
    assert [g.shape for g in tree.leaves(grads)] == [p.shape for p in tree.leaves(params)]


def test_defaults_are_those_of_transformers():
    text, vision = {"rope_parameters": {"mrope_section": [24, 20, 20]}}, {"out_hidden_size": 2048}
    got = qwen3_vl_moe.config_from_hf({"text_config": text, "vision_config": vision})
    default = transformers.Qwen3VLMoeConfig(vision_config=vision, text_config=text).to_dict()
    assert "num_experts" not in default["text_config"]  # saved under another name
    assert got == qwen3_vl_moe.config_from_hf(default)
    assert (got.moe.num_experts, got.moe.num_chosen, got.decoder.head_dim, got.is_tied) == (60, 4, 128, False)


@pytest.mark.parametrize(("step", "without"), [(1, []), (2, []), (3, [2]), (1, [0, 3, 9]), (9, [])])
def test_layers_with_experts_are_those_of_transformers(step, without):
    text = {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": without}
    cfg = oracles.config(family=FAMILY, text=text)
    with torch.device("meta"):
        layers = oracles.oracle_class(cfg)(cfg).model.language_model.layers
    sparse = {i for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
    assert qwen3_vl_moe.config_from_hf(cfg.to_dict()).moe_layers == sparse


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_topk_prob": False}, "text_config.norm_topk_prob is False but must be True: this family divides"),
        ({"num_local_experts": 1}, "num_experts_per_tok is 2 of 1 experts; correct one of them"),
        ({"num_local_experts": 0}, "num_local_experts is 0 but must be an integer of at least 1"),
        ({"decoder_sparse_step": 0}, "text_config.decoder_sparse_step is 0 but must be an integer of at least 1"),
        ({"mlp_only_layers": [-1]}, r"text_config.mlp_only_layers is \[-1\] but must be a list of integers"),
        ({"router_aux_loss_coef": -1}, "text_config.router_aux_loss_coef is -1 but must be a finite number"),
        ({"moe_intermediate_size": 0}, "text_config.moe_intermediate_size is 0 but must be an integer of at least 1"),
    ],
)
def test_what_is_not_supported_is_refused(values, message):
    hf = oracles.to_dict(oracles.config(family=FAMILY))
    hf["text_config"] |= values
    with pytest.raises(ValueError, match=message) as caught:
        qwen3_vl_moe.config_from_hf(hf)
    assert "\n" not in str(caught.value)
