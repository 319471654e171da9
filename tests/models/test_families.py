"""Every family: what holds for any model, and comparisons with transformers beside those of `test_parity.py`."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmfn
from mmfn import ops as op_tables
from mmfn import tree
from mmfn.batch import IMAGE, TEXT, VIDEO, Media, Sample, to
from mmfn.interop.inputs import samples_from_hf
from tests import oracles
from tests.batches import packed, wide
from tests.oracles import ATOL, RTOL

ROOM = {"tokens": 1024, "segments": 4, "units": 128}  # for every batch of a test that compiles once


def packed_logits(params, model, batch, ops=None):
    return mmfn.logits(replace(model, params=params), batch, ops)


def projected(params, model, batch, weights_TV, ops=None):
    """A scalar in which every logit counts."""
    return (packed_logits(params, model, batch, ops) * weights_TV).sum()


def gradients(model, batch, weights_TV, ops=None):
    """`{Hugging Face name: gradient}` of `projected`, as transformers holds it."""
    _, grads = mmfn.value_and_grad(projected)(model.params, model, batch, weights_TV, ops)
    return mmfn.to_hf(grads, model, layout="transformers")


def oracle_gradients(oracle, logits_TV, weights_TV):
    oracle.zero_grad()
    (logits_TV * weights_TV).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}


def projection(logits_TV: Tensor) -> Tensor:
    return torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(7)) / logits_TV.shape[0]


def assert_trees_close(got, want, rtol=RTOL, atol=ATOL):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module", params=oracles.TYPES)
def pair(request, tmp_path_factory):
    """An oracle and the same model here, with 2 deepstack taps and 3 text layers of all kinds that the family has."""
    text = oracles.RECIPES[request.param].mixed
    vision = {"depth": 3, "deepstack_visual_indexes": [0, 2]}
    oracle = oracles.build(oracles.config(family=request.param, text=text, vision=vision))
    return oracle, mmfn.load_hf(oracles.save(oracle, tmp_path_factory.mktemp("pair")))


def test_a_packed_call_of_transformers_agrees_too(pair):
    oracle, model = pair
    if "linear_attention" in (oracle.config.text_config.to_dict().get("layer_types") or ()):
        pytest.skip("the library's packed call leaks through delta layers: test_library_faults.py shows it")
    batch = oracles.inputs(oracle.config, 3, rows=3)
    packed = mmfn.batch_from_hf(batch, model)
    lengths = packed.segments.offsets_N.diff().tolist()
    text_positions_T = torch.cat([torch.arange(n) for n in lengths])
    positions_41T = torch.cat([text_positions_T[None], packed.positions_3T])[:, None]
    text = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")
    media = {k: v for k, v in oracles.arguments(oracle, batch).items() if k not in text}
    out = oracle(input_ids=packed.tokens_T[None], position_ids=positions_41T, use_cache=False, **media)
    torch.testing.assert_close(mmfn.logits(model, packed), out.logits[0].detach(), rtol=RTOL, atol=ATOL)


def test_positions_equal_transformers(pair):
    oracle, model = pair
    for seed in range(6):
        batch = oracles.inputs(oracle.config, seed, rows=3, images=4, videos=2)
        mask = batch["attention_mask"].bool()
        want_3T = oracles.positions(oracle, batch)[:, mask]
        assert torch.equal(mmfn.batch_from_hf(batch, model).positions_3T, want_3T.float())


def test_positions_of_adjacent_images_are_split_by_their_grids(pair):
    _, model = pair
    grids = [(1, 4, 2), (1, 2, 2)]
    values = model.family.towers(model.cfg)["vision"].values
    media = tuple(Media(inputs_UF=torch.zeros(h * w, values), grid=(t, h, w)) for t, h, w in grids)
    kinds_T = torch.tensor([TEXT, IMAGE, IMAGE, IMAGE, TEXT])
    sample = Sample(tokens_T=torch.full((5,), 9), labels_T=torch.full((5,), -100), kinds_T=kinds_T, images=media)
    positions_3T = model.family.positions(sample, model.cfg)
    assert positions_3T.tolist() == [[0, 1, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 1, 3, 4]]
    for kinds in ([IMAGE, TEXT, IMAGE, IMAGE, TEXT], [IMAGE, IMAGE, TEXT, VIDEO, VIDEO]):
        with pytest.raises(ValueError, match=r"tokens with \d left where the next"):
            model.family.positions(replace(sample, kinds_T=torch.tensor(kinds)), model.cfg)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_packed_equals_separate_rows(pair, seed):
    """Positions, logits and gradients, in float64: text, images, videos and sound of a row know of no other."""
    oracle, narrow = pair
    model = replace(narrow, params=tree.map(Tensor.double, narrow.params))
    batch = oracles.inputs(oracle.config, seed, rows=4)
    together = wide(mmfn.batch_from_hf(batch, model))
    alone = [wide(mmfn.batch_from_hf(row, model)) for row in oracles.rows_of(batch)]
    assert torch.equal(together.positions_3T, torch.cat([one.positions_3T for one in alone], 1))
    want_TV = torch.cat([mmfn.logits(model, one) for one in alone])
    torch.testing.assert_close(mmfn.logits(model, together), want_TV, rtol=1e-11, atol=1e-11)
    weights_TV = projection(want_TV).double()
    parts, start = [], 0
    for one in alone:
        stop = start + one.tokens_T.numel()
        parts.append(gradients(model, one, weights_TV[start:stop]))
        start = stop
    summed = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert_trees_close(gradients(model, together, weights_TV), summed, rtol=1e-11, atol=1e-11)


def test_static_padding_changes_nothing(pair):
    oracle, model = pair
    inputs = oracles.inputs(oracle.config, 6, rows=2)
    batch, samples = mmfn.batch_from_hf(inputs, model), samples_from_hf(inputs, model)
    exact = packed(model, samples)
    assert torch.equal(exact.tokens_T, batch.tokens_T)
    num_tokens, num_patches = exact.tokens_T.numel(), exact.towers["vision"].inputs_UF.shape[0]
    roomy = packed(model, samples, tokens=num_tokens + 13, patches=num_patches + 8, segments=5)
    want_TV = mmfn.logits(model, exact)
    torch.testing.assert_close(mmfn.logits(model, roomy), want_TV, rtol=RTOL, atol=1e-5)
    weights_TV = projection(want_TV)
    assert_trees_close(gradients(model, roomy, weights_TV), gradients(model, exact, weights_TV))


def test_a_batch_without_media_runs_the_same_program(pair):
    oracle, model = pair
    inputs = oracles.inputs(oracle.config, 8, rows=2, images=0, videos=0, audios=0)
    empty = mmfn.batch_from_hf(inputs, model)
    assert all(tower.inputs_UF.shape[0] == 0 for tower in empty.towers.values())
    padded = packed(model, samples_from_hf(inputs, model), units=3, tokens=empty.tokens_T.numel() + 4)
    torch.testing.assert_close(mmfn.logits(model, padded), mmfn.logits(model, empty), rtol=RTOL, atol=1e-5)
    weights_TV = projection(mmfn.logits(model, empty))
    want = gradients(model, empty, weights_TV)
    got = gradients(model, padded, weights_TV)
    assert_trees_close(got, want)
    towers = [name for name in want if ".visual." in name or ".audio_tower." in name]
    assert len(towers) > 20
    assert all(not got[name].any() and not want[name].any() for name in towers)


def test_segments_are_isolated_and_attention_is_causal(pair):
    oracle, model = pair
    whole = mmfn.batch_from_hf(oracles.inputs(oracle.config, 9, rows=3, images=0, videos=0, audios=0), model)
    T, V = whole.tokens_T.numel(), model.cfg.vocab_size
    # Each token gets a vocabulary entry of its own, so the gradient of an embedding row is that of one token.
    assert T <= V
    alone = replace(whole, tokens_T=torch.arange(T))
    text = oracles.RECIPES[model.family.name].mixed
    untied = mmfn.init(oracles.to_dict(oracles.config(family=model.family.name, text=text, tie_word_embeddings=False)))
    segment_T = torch.searchsorted(alone.segments.offsets_N, torch.arange(T), right=True)
    for t in (0, T // 2, T - 1):
        _, grads = mmfn.value_and_grad(lambda p, t=t: packed_logits(p, untied, alone)[t].square().sum())(untied.params)
        influences_T = grads["text"]["embed"]["weight"][:T].abs().sum(1) > 0
        assert torch.equal(influences_T, (segment_T == segment_T[t]) & (torch.arange(T) <= t))


def test_patches_reach_only_tokens_of_their_own_row(pair):
    oracle, model = pair
    batch = oracles.inputs(oracle.config, 11, rows=3, images=2, videos=1, audios=0)
    whole = mmfn.batch_from_hf(batch, model)
    vision = whole.towers["vision"]
    patches, index_T = vision.inputs_UF.clone().requires_grad_(), vision.index_T
    seen = replace(whole, towers={**whole.towers, "vision": replace(vision, inputs_UF=patches)})
    logits_TV = mmfn.logits(model, seen)
    owner_N = torch.searchsorted(whole.segments.offsets_N, torch.arange(whole.tokens_T.numel()), right=True) - 1
    owner_P = torch.full((patches.shape[0],), -1)
    for token in (index_T >= 0).nonzero()[:, 0].tolist():
        first = 4 * int(index_T[token])
        owner_P[first : first + 4] = owner_N[token]
    assert (owner_P >= 0).all()
    for row in owner_P.unique().tolist():
        last = int(whole.segments.offsets_N[row + 1]) - 1
        (grad,) = torch.autograd.grad(logits_TV[last].square().sum(), patches, retain_graph=True)
        assert torch.equal(grad.abs().sum(1) > 0, owner_P == row)


@pytest.mark.parametrize("seed", [0, 1])
def test_tables_agree_in_float64(pair, seed):
    oracle, model = pair
    exact = replace(model, params=tree.map(Tensor.double, model.params))
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, seed, rows=3), exact)
    want_TV = mmfn.logits(exact, batch, op_tables.reference())
    torch.testing.assert_close(mmfn.logits(exact, batch, op_tables.portable()), want_TV, rtol=1e-10, atol=1e-11)
    weights_TV = projection(want_TV).double()
    want = gradients(exact, batch, weights_TV, op_tables.reference())
    assert_trees_close(gradients(exact, batch, weights_TV, op_tables.portable()), want, rtol=1e-9, atol=1e-11)


def test_bfloat16_follows_transformers(pair):
    oracle, model = pair
    narrow = replace(model, params=tree.map(lambda p: p.bfloat16(), model.params))
    assert_rounds_alike(oracle, copy.deepcopy(oracle).bfloat16(), narrow, torch.bfloat16)


def assert_rounds_alike(oracle, rounded, model, dtype, **limits):
    """Both sides round in other places; here the logits are no further from the exact ones than bfloat16 explains.

    By the median over inputs: in a few a rounding sends tokens to other experts, here or there, and decides all.
    """
    errors = []
    for seed in range(7):
        inputs = oracles.inputs(oracle.config, seed, rows=1, images=1, videos=0, **limits)
        got_TV, want_TV = mmfn.logits(model, mmfn.batch_from_hf(inputs, model)), oracles.real_logits(rounded, inputs)
        assert got_TV.dtype == want_TV.dtype == dtype
        exact_TV = oracles.real_logits(oracle, inputs)
        errors.append([(x - exact_TV).detach().abs().mean() for x in (got_TV, want_TV)])
    own, their = torch.tensor(errors).median(0).values
    assert own < 1.5 * their + 1e-3


@pytest.mark.parametrize(("text", "vision"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
def test_tower_and_text_may_differ_in_dtype(pair, text, vision):
    oracle, model = pair
    dtypes = {"text": getattr(torch, text), "vision": getattr(torch, vision), "audio": getattr(torch, text)}
    params = {key: tree.map(lambda p, key=key: p.to(dtypes[key]), value) for key, value in model.params.items()}
    mixed_oracle = copy.deepcopy(oracle).to(dtypes["text"])
    mixed_oracle.model.visual.to(dtypes["vision"])
    mixed_oracle.tie_weights()
    mixed = replace(model, params=params)
    if vision != "float64":
        assert_rounds_alike(oracle, mixed_oracle, mixed, dtypes["text"], audios=0)
        return
    inputs = oracles.inputs(oracle.config, 2, rows=1, images=1, videos=0, audios=0)
    got_TV = mmfn.logits(mixed, mmfn.batch_from_hf(inputs, model))
    want_TV = oracles.real_logits(mixed_oracle, inputs).detach()
    assert got_TV.dtype == want_TV.dtype == dtypes["text"]
    torch.testing.assert_close(got_TV, want_TV, rtol=RTOL, atol=ATOL)


def test_the_same_call_twice_is_bitwise_equal_and_changes_no_input(pair):
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 1, rows=2), model)
    before = [x.clone() for x in tree.leaves((model.params, batch))]
    weights_TV = projection(mmfn.logits(model, batch))
    first, second = gradients(model, batch, weights_TV), gradients(model, batch, weights_TV)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((model.params, batch)), strict=True))


def test_every_block_gathers_its_parameters_once(pair):
    oracle, model = pair
    seen = []

    def gather(params):
        seen.extend(id(leaf) for leaf in tree.leaves(params))
        return params

    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 0, rows=1), model)
    ops = replace(op_tables.portable(), gather=gather, gather_head=gather)
    model.family.apply(model.params, batch, model.cfg, ops)
    assert sorted(seen) == sorted(id(leaf) for leaf in tree.leaves(model.params))
    seen.clear()
    model.family.head(model.params, model.cfg, ops)
    assert len(seen) == 1


def test_one_graph_serves_all_blocks_of_a_stack(pair):
    oracle, narrow = pair
    model, graphs = replace(narrow, params=tree.map(Tensor.double, narrow.params)), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    table = op_tables.portable()
    ops = replace(table, layer=torch.compile(op_tables.call_layer, backend=backend, fullgraph=True, dynamic=False))
    for seed in range(3):
        batch = wide(packed(model, samples_from_hf(oracles.inputs(oracle.config, seed, rows=2), model), **ROOM))
        torch.testing.assert_close(mmfn.logits(model, batch, ops), mmfn.logits(model, batch), rtol=1e-11, atol=1e-11)
    kinds = set()

    def layer(block, params, *xs):
        kinds.add(tuple(tree.paths(params)))
        return block(params, *xs)

    mmfn.logits(model, batch, replace(table, layer=layer))
    assert len(kinds) > len(model.family.towers(model.cfg))
    assert len(graphs) == len(kinds)  # one for each kind of block
    torch._dynamo.reset()


def test_the_whole_forward_is_one_graph(pair):
    oracle, narrow = pair
    model, graphs = replace(narrow, params=tree.map(Tensor.double, narrow.params)), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def hidden(params, batch):
        return model.family.apply(params, batch, model.cfg, op_tables.portable()).hidden_TD

    torch._dynamo.reset()
    run = torch.compile(hidden, backend=backend, fullgraph=True, dynamic=False)
    for seed in range(2):
        batch = wide(packed(model, samples_from_hf(oracles.inputs(oracle.config, seed, rows=2), model), **ROOM))
        torch.testing.assert_close(run(model.params, batch), hidden(model.params, batch), rtol=1e-11, atol=1e-11)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_blocks_may_be_recomputed(pair):
    oracle, model = pair

    def recomputed(block, params, *xs):
        return checkpoint(op_tables.call_layer, block, params, *xs, use_reentrant=False)

    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 2, rows=2), model)
    weights_TV = projection(mmfn.logits(model, batch))
    want = gradients(model, batch, weights_TV)
    got = gradients(model, batch, weights_TV, replace(op_tables.portable(), layer=recomputed))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_padding_token_gets_no_input_gradient(tmp_path):
    oracle = oracles.build(oracles.config(text={"pad_token_id": 9}, tie_word_embeddings=False))
    model = mmfn.load_hf(oracles.save(oracle, tmp_path))
    batch = oracles.inputs(oracle.config, 0, rows=1)
    batch["input_ids"][0, 0] = 9
    want_TV = oracles.real_logits(oracle, batch)
    weights_TV = projection(want_TV)
    want = oracle_gradients(oracle, want_TV, weights_TV)
    got = gradients(model, mmfn.batch_from_hf(batch, model), weights_TV)
    assert_trees_close(got, want)
    assert not got["model.language_model.embed_tokens.weight"][9].any()


def test_batches_move_and_cast(pair):
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 1, rows=2), model)
    moved = to(batch, "cpu", torch.float64)
    assert moved.towers["vision"].inputs_UF.dtype == torch.float64
    assert moved.weights_T.dtype == torch.float32
    torch.testing.assert_close(mmfn.logits(model, moved), mmfn.logits(model, batch), rtol=0, atol=0)
