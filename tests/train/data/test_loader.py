import threading
import time
from collections import Counter

import pytest
import torch

from mmfn import rng, tree
from mmfn.batch import IGNORE, IMAGE, Media, Sample
from mmfn.models.layers.patches import lay_frames, tower_kind
from mmfn.packing import pack
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.data.agree import Stats, stats
from mmfn.train.data.loader import Loader
from mmfn.train.data.sources.mixing import Epochs
from mmfn.train.data.workers import Workers, prefetch

VALUES = 8


class Made:
    """Samples of given token and patch counts; tokens carry the sample's index."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.asked = []

    def __len__(self):
        return len(self.sizes)

    fingerprints = ("made",)

    def order(self, seed):
        return Epochs(len(self), seed)

    def place(self, index):
        return f"'made', entry {index}"

    def measure(self, index):
        return self.sample(index)

    def sample(self, index):
        self.asked.append(index)
        num_tokens, num_patches = self.sizes[index]
        generator = rng.generator(0, index)
        tokens_T = torch.full((num_tokens,), index)
        kinds_T = torch.zeros(num_tokens, dtype=torch.int64)
        kinds_T[1 : 1 + num_patches // 4] = IMAGE
        labels_T = torch.where(torch.arange(num_tokens) >= num_tokens - 2, tokens_T, IGNORE)
        patches_PF = torch.randn(num_patches, VALUES, generator=generator)
        images = (Media(inputs_UF=patches_PF, grid=(1, 2, num_patches // 2)),) if num_patches else ()
        return Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, images=images, id=f"s{index}")


TOWERS = {"vision": tower_kind(merge_size=2, num_values=VALUES, matmul_patches=1)}


def pack_samples(samples, sizes):
    positions = [torch.arange(s.tokens_T.numel()).expand(3, -1).float() for s in samples]
    return pack(samples, positions, [{"vision": lay_frames(s, 2, VALUES)} for s in samples], TOWERS, sizes)


def make(sizes=None, **change):
    sizes = sizes if sizes is not None else [(8 + 3 * i % 17, 4 * (i % 3)) for i in range(10)]
    options = {"batch_samples": 4, "token_buckets": [32, 64], "tower_buckets": {"vision": [8, 16]}, "seed": 3}
    dataset = sizes if isinstance(sizes, Made) else Made(sizes)
    return Loader(dataset, pack_samples, TOWERS, **{**options, **change})


def contents(microbatches):
    return Counter(
        int(b.tokens_T[start])
        for b in microbatches
        for start, end in zip(b.segments.offsets_N[:-1].tolist(), b.segments.offsets_N[1:].tolist(), strict=True)
        if end > start
    )


def equal(one, two):
    a, b = tree.leaves(one), tree.leaves(two)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_steps_walk_the_permutations_of_the_epochs():
    loader = make()
    expected = rng.Permutation(10, 3, "epoch").walk(torch.arange(40)).tolist()
    assert [i for step in range(10) for i in loader.indices(step)] == expected
    assert make(seed=4).indices(0) != loader.indices(0)
    assert expected[:10] != expected[10:20]


def test_a_step_depends_on_nothing_asked_before():
    loader = make()
    late = loader.microbatches(7)
    for step in range(7):
        loader.microbatches(step)
    assert equal(late, loader.microbatches(7))
    assert equal(late, make().microbatches(7))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_sample_is_numbered_by_its_place_in_the_order_of_data(num_ranks):
    """On every rank, in every micro-batch; a sample that comes again in another epoch is another."""
    for step in (0, 2, 7):
        found = {}
        for rank in range(num_ranks):
            loader = make(axis=Axis(name="batch", size=num_ranks, index=rank))
            for batch in loader.microbatches(step):
                starts = batch.token_ids_T[(batch.token_ids_T & (2**32 - 1)) == 0]
                tokens = batch.tokens_T[(batch.token_ids_T & (2**32 - 1)) == 0]
                found |= dict(zip((starts >> 32).tolist(), tokens.tolist(), strict=True))
                used = int(batch.towers["vision"].segments[0].offsets_N[-1])
                assert set((batch.towers["vision"].ids_P[:used] >> 32).tolist()) <= set((starts >> 32).tolist())
        assert found == dict(zip(range(4 * step, 4 * step + 4), make().indices(step), strict=True))


def test_every_sample_of_a_step_is_packed_once():
    loader = make()
    for step in range(12):
        assert contents(loader.microbatches(step)) == Counter(loader.indices(step))


def test_shapes_come_from_the_buckets_alone():
    loader, seen = make(), set()
    for step in range(12):
        for batch in loader.microbatches(step):
            T, P = batch.tokens_T.numel(), batch.towers["vision"].inputs_UF.shape[0]
            assert T in (32, 64)
            assert P in (8, 16)
            seen.add((T, P, tuple(tuple(leaf.shape) for leaf in tree.leaves(batch))))
            assert batch.segments.offsets_N.numel() == 5
            assert batch.towers["vision"].segments[0].offsets_N.numel() == P // 4 + 1
    assert len(seen) == len({(T, P) for T, P, _ in seen}) > 1


def test_smallest_buckets_that_fit():
    loader = make([(8, 4)] * 4)
    (batch,) = loader.microbatches(0)
    assert (batch.tokens_T.numel(), batch.towers["vision"].inputs_UF.shape[0]) == (32, 16)
    (batch,) = make([(8, 0)] * 4).microbatches(0)
    assert (batch.tokens_T.numel(), batch.towers["vision"].inputs_UF.shape[0]) == (32, 8)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([(40, 0), (24, 0), (40, 0), (24, 0)], 2),  # in the order given, first fit would still find two
        ([(20, 0), (40, 0), (20, 0), (40, 0)], 2),  # longest first: 40 + 20 twice, not 20 + 20 and two of 40
        ([(8, 16), (8, 16), (8, 0), (8, 0)], 2),  # patches bind
        ([(64, 16)] * 4, 4),
    ],
)
def test_few_microbatches(sizes, groups):
    assert len(make(sizes).microbatches(0)) == groups


def test_packing_keeps_the_order_of_the_step():
    loader = make([(5 + i, 0) for i in range(4)])
    (batch,) = loader.microbatches(0)
    starts = batch.segments.offsets_N[:4].tolist()
    assert batch.tokens_T[starts].tolist() == loader.indices(0)


def test_stats_count():
    loader = make([(8, 4), (9, 8), (10, 0), (40, 16)])
    microbatches = loader.microbatches(0)
    counted = stats(microbatches)
    assert counted == Stats(
        samples=4,
        tokens=67,
        padded_tokens=64 + 32,
        supervised_tokens=8,
        media_tokens=7,
        inputs=28,
        padded_inputs=32,
    )
    assert counted.padding_share == pytest.approx(1 - 67 / 96)
    assert stats(make([(8, 0)]).microbatches(0)).media_tokens == 0


@pytest.mark.parametrize(("workers", "ahead"), [(0, 1), (1, 1), (1, 5), (4, 2), (4, 50)])
def test_prefetch_gives_the_same_steps(workers, ahead):
    expected = [make().microbatches(step) for step in range(3, 15)]
    got = list(prefetch(make().microbatches, range(3, 15), Workers(number=workers, ahead=ahead)))
    assert len(got) == len(expected)
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


def test_prefetch_looks_ahead_no_further_than_asked():
    loader = make(batch_samples=1)
    steps = prefetch(loader.microbatches, range(100), Workers(number=2, ahead=3))
    next(steps)
    time.sleep(0.1)
    assert len(loader.dataset.asked) <= 4
    steps.close()


def workers_but(others: set[threading.Thread]) -> list[threading.Thread]:
    """Threads of workers of these tests: one before may have left some, held by the traceback of its end."""
    return [t for t in threading.enumerate() if t.name.startswith("mmfn-data") and t not in others]


def test_prefetch_raises_where_the_step_is_due():
    others = set(threading.enumerate())
    sizes = [(8, 0)] * 6
    sizes[make(sizes, batch_samples=1).indices(2)[0]] = (65, 0)
    loader = make(sizes, batch_samples=1, long_samples="stop")
    steps = prefetch(loader.microbatches, range(6), Workers(number=2, ahead=4))
    assert len(next(steps)) == len(next(steps)) == 1
    with pytest.raises(ValueError, match="has 65 tokens but the largest bucket holds 64"):
        next(steps)
    assert not workers_but(others)


def test_prefetch_closes_its_threads():
    others = set(threading.enumerate())
    steps = prefetch(make().microbatches, range(1000), Workers(number=3, ahead=8))
    next(steps)
    assert workers_but(others)
    steps.close()
    assert not workers_but(others)
    assert list(prefetch(make().microbatches, range(0), Workers())) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            [(65, 0)],
            "sample 's0' of 'made', entry 0 has 65 tokens but the largest bucket holds 64; add a larger",
        ),
        (
            [(30, 20)],
            "sample 's0' of 'made', entry 0 has 20 inputs of vision but the largest bucket holds 16; add a larger",
        ),
    ],
)
def test_samples_larger_than_the_largest_bucket(sizes, message):
    with pytest.raises(ValueError, match=message):
        make(sizes, long_samples="stop").microbatches(0)
    with pytest.raises(ValueError, match=r"sample 's0' has .* but the largest bucket holds"):
        make(sizes).pack([make(sizes).dataset.sample(0)])


def test_a_sample_without_tokens_is_refused():
    """Samples are counted by the segments that are not empty: the third would take the second's weights."""
    loader = make([(5, 0), (0, 0), (3, 0)], batch_samples=3)
    assert [skip.id for skip in loader.share(0).skips] == ["s1"]
    with pytest.raises(ValueError, match="sample 's1' has no tokens; leave it out"):
        loader.pack([loader.dataset.sample(i) for i in range(3)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_samples": 0}, "batch_samples must be at least 1, one for each rank with its own data, got 0"),
        ({"token_buckets": []}, r"token_buckets must be positive and strictly increasing, got \[\]"),
        ({"token_buckets": [64, 32]}, "token_buckets must be positive and strictly increasing"),
        ({"tower_buckets": {"vision": [0, 8]}}, "tower_buckets of 'vision' must be positive"),
        ({"tower_buckets": {"vision": [6]}}, "tower_buckets of 'vision' must be multiples of 4, what makes a feature"),
        ({"tower_buckets": {}}, "has sizes for nothing but the model's towers are vision; add 'vision'"),
        ({"tower_buckets": {"vision": [8], "audio": [2]}}, "towers are vision; remove 'audio'"),
        ({"sizes": []}, "the dataset is empty"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_bad_steps_and_workers():
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        make().indices(-1)
    with pytest.raises(ValueError, match="workers >= 0 and ahead >= 1, got -1 and 2"):
        prefetch(make().microbatches, range(1), Workers(number=-1))
