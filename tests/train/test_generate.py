"""Greedy generation against transformers, and the cached steps against the whole sequence."""

from dataclasses import replace

import pytest
import torch

import mmfn
from mmfn import ops as op_tables
from mmfn import tree
from mmfn.batch import Segments
from mmfn.lora import add_adapters, lora
from mmfn.train import generate as generation
from mmfn.train.sampling import Sampling
from tests import oracles


@pytest.fixture(scope="module", params=oracles.TYPES)
def pair(request, tmp_path_factory):
    vision = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
    oracle = oracles.build(oracles.config(family=request.param, vision=vision), 2)
    return oracle, mmfn.load_hf(oracles.save(oracle, tmp_path_factory.mktemp("pair")))


def continued(oracle, inputs, count, **kwargs):
    """New ids of every row as transformers generates them from left-padded rows.

    Without its cache where no layer attends: that of the library asks a layer of attention for its length.
    """
    layer_types = oracle.config.text_config.to_dict().get("layer_types") or ["full_attention"]
    arguments = {**oracles.arguments(oracle, inputs), "use_cache": "full_attention" in layer_types}
    ids = oracle.generate(**arguments, do_sample=False, max_new_tokens=count, pad_token_id=oracles.PAD_ID, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", oracles.TYPES)
def test_ids_equal_transformers(family, seed, tmp_path):
    oracle = oracles.build(oracles.random_config(seed + 500, family), seed)
    limits = [{}, {"images": 3, "videos": 0}, {"images": 0, "videos": 0}][seed % 3]
    inputs = oracles.inputs(oracle.config, seed, rows=1 + seed % 4, pad="left", **limits)
    model = mmfn.load_hf(oracles.save(oracle, tmp_path))
    got = mmfn.generate(model, mmfn.batch_from_hf(inputs, model), max_new_tokens=10)
    assert got == continued(oracle, inputs, 10)


MEDIA = {  # what the rows of a call have, and whether videos are heard
    "videos": {"images": 0, "videos": 3, "audios": 0, "sound": False},
    "images and videos": {"images": 2, "videos": 2, "audios": 0, "sound": False},
    "sound": {"images": 0, "videos": 0, "audios": 3},
    "heard videos": {"images": 0, "videos": 2, "audios": 0, "sound": True},
    "all": {"images": 2, "videos": 2, "audios": 2, "sound": True},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("media", MEDIA)
def test_ids_of_every_kind_of_media_equal_transformers(pair, media, seed):
    """Greedy, and with the penalty for what stands there already: of one row, as the library counts padding in."""
    oracle, model = pair
    is_heard = "audio_config" in oracle.config.sub_configs
    limits = MEDIA[media] if is_heard or not MEDIA[media].get("sound") else {**MEDIA[media], "sound": False}
    rows = 1 if seed else 3
    inputs = oracles.inputs(oracle.config, 40 + seed, rows=rows, pad="left", **limits)
    batch = mmfn.batch_from_hf(inputs, model)
    assert mmfn.generate(model, batch, 12) == continued(oracle, inputs, 12)
    if rows == 1:
        got = mmfn.generate(model, batch, 12, sampling=Sampling(repetition_penalty=1.4))
        assert got == continued(oracle, inputs, 12, repetition_penalty=1.4)


def test_rows_stop_at_an_end_token(pair):
    oracle, model = pair
    inputs = oracles.inputs(oracle.config, 5, rows=4, pad="left")
    batch = mmfn.batch_from_hf(inputs, model)
    free = mmfn.generate(model, batch, 12)

    def until(stop):
        """The rows, each up to its first `stop`."""
        return [row[: row.index(stop) + 1] if stop in row else row for row in free]

    stops = [next(token for row in free for token in row if len({len(cut) for cut in until(token)}) > 1)]
    got = mmfn.generate(model, batch, 12, eos_token_ids=stops)
    assert got == until(*stops)
    padded = continued(oracle, inputs, 12, eos_token_id=stops)
    assert [row[: len(own)] for row, own in zip(padded, got, strict=True)] == got


def test_generation_stops_when_every_row_is_done(pair):
    oracle, model = pair
    calls = []

    def counted(params, batch, cfg, ops, cache=None):
        calls.append(cache.slots.is_prefill)
        return model.family.apply(params, batch, cfg, ops, cache)

    counting = replace(model, family=replace(model.family, apply=counted))
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 5, rows=2), model)
    everything = range(model.cfg.vocab_size)
    assert [len(row) for row in mmfn.generate(counting, batch, 12, eos_token_ids=everything)] == [1, 1]
    assert calls == [True]
    calls.clear()
    mmfn.generate(counting, batch, 4)
    assert calls == [True, False, False, False]


def test_cached_steps_equal_the_whole_sequence(pair):
    oracle, model = pair
    row = oracles.inputs(oracle.config, 7, rows=1, images=2, videos=0)
    new = mmfn.generate(model, mmfn.batch_from_hf(row, model), 6)[0]
    for count in range(6):
        ids = torch.cat([row["input_ids"], torch.tensor([new[:count]], dtype=torch.int64)], dim=1)
        grown = {**{k: v for k, v in row.items() if k not in oracles.TEXT_KEYS}, "input_ids": ids}
        assert mmfn.logits(model, mmfn.batch_from_hf(grown, model))[-1].argmax().item() == new[count]


def test_rows_do_not_depend_on_their_neighbours(pair):
    oracle, model = pair
    inputs = oracles.inputs(oracle.config, 8, rows=4)
    together = mmfn.generate(model, mmfn.batch_from_hf(inputs, model), 8)
    alone = [mmfn.generate(model, mmfn.batch_from_hf(row, model), 8)[0] for row in oracles.rows_of(inputs)]
    assert together == alone


def test_padding_and_empty_segments_are_left_out(pair):
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 9, rows=2, images=0, videos=0), model)
    tail = 5
    offsets_N = torch.cat([batch.segments.offsets_N, batch.segments.offsets_N[-1:].expand(2)])
    padded = replace(
        batch,
        tokens_T=torch.cat([batch.tokens_T, torch.zeros(tail, dtype=torch.int64)]),
        positions_3T=torch.cat([batch.positions_3T, torch.full((3, tail), 999.0)], dim=1),
        towers={
            n: replace(x, index_T=torch.cat([x.index_T, torch.full((tail,), -1)])) for n, x in batch.towers.items()
        },
        segments=Segments.of(offsets_N),
        segment_T=torch.cat([batch.segment_T, torch.full((tail,), offsets_N.numel() - 1)]),
    )
    assert mmfn.generate(model, padded, 6) == mmfn.generate(model, batch, 6)


def test_tables_agree_and_inputs_are_unchanged(pair):
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 3, rows=3), model)
    before = [x.clone() for x in tree.leaves((model.params, batch))]
    got = mmfn.generate(model, batch, 5)
    assert got == mmfn.generate(model, batch, 5, ops=op_tables.reference())
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((model.params, batch)), strict=True))


def test_bfloat16_runs(pair):
    oracle, model = pair
    narrow = replace(model, params=tree.map(lambda p: p.bfloat16(), model.params))
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 3, rows=2), narrow)
    assert [len(row) for row in mmfn.generate(narrow, batch, 3)] == [3, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(pair, bad):
    oracle, model = pair
    specs = lora(model.family.specs(model.cfg), rank=2, alpha=2.0, targets=[r"text/layers/\d+/attention/q"])
    params = add_adapters(model.params, specs, seed=0)
    attention = next(layer["attention"] for layer in params["text"]["layers"] if "attention" in layer)
    attention["q"]["lora"]["weight"].b[0] = bad
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 3, rows=2), model)
    with pytest.raises(ValueError, match=r"the logits are not finite; the model's weights .* are damaged or diverged"):
        mmfn.generate(replace(model, params=params), batch, 2)


def test_bad_arguments_are_refused(pair):
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 3, rows=2), model)
    with pytest.raises(ValueError, match="max_new_tokens is 0 but must be at least 1"):
        mmfn.generate(model, batch, 0)
    with pytest.raises(ValueError, match="no row to continue"):
        mmfn.generate(model, replace(batch, segments=Segments.of(torch.zeros(3, dtype=torch.int32))))


def test_a_cache_that_grows_and_rows_that_leave_change_nothing(pair, monkeypatch):
    """Rows end at many different steps; in the smallest steps of room, and with all room at once."""
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 11, rows=6), model)
    stops, sampling, found = range(0, model.cfg.vocab_size, 7), Sampling(temperature=2.0), {}
    for room in (1, 5, 1000):
        monkeypatch.setattr(generation, "ROOM", room)
        found[room] = mmfn.generate(model, batch, 24, eos_token_ids=stops, sampling=sampling)
    assert len({len(row) for row in found[1]}) > 2
    assert found[1] == found[5] == found[1000]
    free = mmfn.generate(model, batch, 24, sampling=sampling)
    ends = [next((i for i, token in enumerate(row) if token in stops), 23) for row in free]
    assert found[1] == [row[: end + 1] for row, end in zip(free, ends, strict=True)]


def test_rows_leave_the_batch_and_the_cache_doubles(pair, monkeypatch):
    oracle, model = pair
    monkeypatch.setattr(generation, "ROOM", 1)
    rows, columns = [], []

    def watched(params, batch, cfg, ops, cache=None):
        rows.append(batch.num_segments)
        columns.append(max(leaf.shape[1] for layer in cache.layers for name, leaf in layer.items() if name in "kv"))
        return model.family.apply(params, batch, cfg, ops, cache)

    has_attention = any("attention" in layer for layer in model.params["text"]["layers"])
    watching = replace(model, family=replace(model.family, apply=watched))
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 12, rows=4, images=0, videos=0), model)
    longest = batch.segments.longest

    def end(numbers, tokens):  # one row at every second step
        ended.append(len(ended))
        return [numbers[0]] if len(ended) % 2 == 0 else []

    ended = []
    assert has_attention
    answers = mmfn.generate(watching, batch, 2 * longest, on_step=end)
    assert [len(row) for row in answers] == [2, 4, 6, 8]
    assert rows == [4, 4, 4, 4, 2, 2, 1, 1]
    assert columns[0] == longest + 1
    assert set(columns) <= {longest + 1, 2 * (longest + 1)}


def test_what_is_drawn_for_a_row_is_its_own(pair):
    """Whatever the batch it is in, given its number."""
    oracle, model = pair
    inputs = oracles.inputs(oracle.config, 13, rows=4)
    sampling = Sampling(temperature=2.0, top_p=0.95, repetition_penalty=1.2, seed=5)
    together = mmfn.generate(model, mmfn.batch_from_hf(inputs, model), 8, sampling=sampling)
    rows = oracles.rows_of(inputs)
    alone = [
        mmfn.generate(model, mmfn.batch_from_hf(row, model), 8, sampling=sampling, rows=[i])[0]
        for i, row in enumerate(rows)
    ]
    assert together == alone
    other = mmfn.generate(model, mmfn.batch_from_hf(rows[0], model), 8, sampling=sampling, rows=[1])
    assert other[0] != alone[0]
    assert mmfn.generate(model, mmfn.batch_from_hf(inputs, model), 8, sampling=replace(sampling, seed=6)) != together


def test_the_penalty_counts_prompts_as_transformers_does(pair):
    """Without padding, which the library counts as a token that is there."""
    oracle, model = pair
    for row in oracles.rows_of(oracles.inputs(oracle.config, 14, rows=3)):
        got = mmfn.generate(model, mmfn.batch_from_hf(row, model), 8, sampling=Sampling(repetition_penalty=1.7))
        assert got == continued(oracle, row, 8, repetition_penalty=1.7)
