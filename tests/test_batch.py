"""Packing of samples into static shapes."""

from dataclasses import replace

import pytest
import torch

from mmfn import tree
from mmfn.batch import (
    AUDIO,
    IGNORE,
    IMAGE,
    TEXT,
    VIDEO,
    Laid,
    Levels,
    Media,
    Sample,
    Segments,
    TowerKind,
    in_floats,
    to,
)
from mmfn.models.layers.patches import lay_frames, tower_kind
from mmfn.packing import Sizes, num_units, pack, read_alike

F = 5


def media(t, h, w, start=0.0):
    return Media(inputs_UF=start + torch.arange(t * h * w * F).reshape(-1, F).float(), grid=(t, h, w))


def sample(kinds, *, images=(), videos=(), first=10, id="s"):
    T = len(kinds)
    tokens_T = torch.arange(first, first + T)
    labels_T = torch.where(torch.arange(T) < 2, IGNORE, tokens_T)
    return Sample(
        tokens_T=tokens_T, labels_T=labels_T, kinds_T=torch.tensor(kinds), images=images, videos=videos, id=id
    )


KINDS = {"vision": tower_kind(merge_size=2, num_values=F, matmul_patches=1)}


def positions_of(samples):
    return [torch.arange(s.tokens_T.numel()).expand(3, -1) + 100.0 * i for i, s in enumerate(samples)]


def packed(*samples, num_patches=None, num_ahead=0, **sizes):
    laid = [{"vision": lay_frames(s, 2, F)} for s in samples]
    units = {} if num_patches is None else {"vision": num_patches // 4}
    return pack(samples, positions_of(samples), laid, KINDS, Sizes(units=units, **sizes), num_ahead)


@pytest.fixture
def two():
    """A text sample, and one with a video of two frames before an image."""
    mixed = [TEXT, VIDEO, TEXT, VIDEO, TEXT, IMAGE, IMAGE, TEXT]
    return sample([TEXT] * 3), sample(mixed, images=(media(1, 2, 4),), videos=(media(2, 2, 2, 1000.0),), first=50)


def test_everything_lies_end_to_end(two):
    batch = packed(*two)
    assert batch.tokens_T.tolist() == [10, 11, 12, *range(50, 58)]
    assert batch.positions_3T[0].tolist() == [0, 1, 2, *range(100, 108)]
    assert batch.segments.offsets_N.tolist() == [0, 3, 11]
    assert batch.segments.offsets_N.dtype == torch.int32
    assert batch.towers["vision"].inputs_UF.shape == (16, F)


def test_labels_are_shifted_within_their_segment(two):
    batch = packed(*two)
    assert batch.labels_T.tolist() == [IGNORE, 12, IGNORE, IGNORE, *range(52, 58), IGNORE]
    assert batch.weights_T.tolist() == [0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]


def test_features_are_numbered_images_before_videos(two):
    batch = packed(*two)
    # 16 patches form 4 features: the image has 0 and 1, the frames 2 and 3
    assert batch.towers["vision"].index_T.tolist() == [-1, -1, -1, -1, 2, -1, 3, -1, 0, 1, -1]
    assert batch.towers["vision"].inputs_UF[0, 0] == 0.0
    assert batch.towers["vision"].inputs_UF[8, 0] == 1000.0
    assert batch.towers["vision"].segments[0].offsets_N.tolist() == [0, 8, 12, 16]


def test_only_images_and_videos_take_features():
    batch = packed(sample([TEXT, 3, IMAGE, TEXT], images=(media(1, 2, 2),)))
    assert batch.towers["vision"].index_T.tolist() == [-1, -1, 0, -1]


def test_ids_say_which_token_and_which_patch_it_is(two):
    """Wherever it lies: by the number of its sample, by default its place in the pack."""
    batch = packed(*two)
    assert batch.token_ids_T.dtype == batch.towers["vision"].ids_P.dtype == torch.int64
    assert batch.token_ids_T.tolist() == [0, 1, 2, *range(2**32, 2**32 + 8)]
    assert batch.towers["vision"].ids_P.tolist() == list(range(2**32, 2**32 + 16))
    text, mixed = replace(two[0], number=2**31 - 1), replace(two[1], number=7)
    other = packed(mixed, text, tokens=20, num_patches=24, segment_multiple=3)
    mine = [7 * 2**32 + i for i in range(16)]
    last = (2**31 - 1) * 2**32
    assert other.token_ids_T.tolist() == [*mine[:8], -1, last, last + 1, last + 2, *[-1] * 8]
    assert other.towers["vision"].ids_P.tolist() == [*mine, *[-1] * 8]
    for number in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"sample 's' has number {number} but it must be in \[0, 2\*\*31\)"):
            replace(text, number=number)


def test_coordinates_follow_merge_blocks(two):
    coords = packed(*two).towers["vision"].coords_P4.tolist()
    assert [c[:2] for c in coords[:8]] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert {tuple(c[2:]) for c in coords[:8]} == {(2, 4)}
    assert coords[8:12] == coords[12:] == [[0, 0, 2, 2], [0, 1, 2, 2], [1, 0, 2, 2], [1, 1, 2, 2]]


def test_sizes_pad_at_the_end(two):
    exact = packed(*two)
    roomy = packed(*two, tokens=20, num_patches=24, segments=4)
    assert torch.equal(roomy.tokens_T[:11], exact.tokens_T)
    assert roomy.tokens_T.shape == (20,)
    assert roomy.labels_T[11:].tolist() == [IGNORE] * 9
    assert roomy.weights_T.sum() == exact.weights_T.sum()
    assert roomy.segments.offsets_N.tolist() == [0, 3, 11, 11, 11]
    assert roomy.towers["vision"].segments[0].offsets_N.tolist() == [0, 8, 12, 16, 16, 16, 16]
    assert roomy.towers["vision"].coords_P4[16:].tolist() == [[0, 0, 1, 1]] * 8
    assert not roomy.towers["vision"].inputs_UF[16:].any()
    assert set(roomy.towers["vision"].index_T[11:].tolist()) == {-1}
    assert exact.segment_T.tolist() == [0] * 3 + [1] * 8
    assert roomy.segment_T.tolist() == [0] * 3 + [1] * 8 + [4] * 9
    assert [x.shape for x in tree.leaves(packed(two[0], tokens=20, num_patches=24, segments=4))] == [
        x.shape for x in tree.leaves(roomy)
    ]


def test_no_sample_is_all_padding():
    batch = packed(tokens=4, num_patches=4)
    assert batch.segments.offsets_N.tolist() == [0]
    assert batch.weights_T.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": 10}, "hold 11 tokens but the batch has room for 10"),
        ({"num_patches": 12}, "hold 4 units of vision but the batch has room for 3"),
        ({"segments": 1}, "hold 2 segments but the batch has room for 1"),
    ],
)
def test_sizes_too_small_are_refused(two, sizes, message):
    with pytest.raises(ValueError, match=message):
        packed(*two, **sizes)


def test_media_must_match_placeholders(two):
    text, mixed = two
    with pytest.raises(ValueError, match="'s' has 2 image placeholder tokens but its 0 images give 0 features"):
        packed(text, replace(mixed, images=()))
    with pytest.raises(ValueError, match="0 video placeholder tokens but its 1 videos give 2 features"):
        packed(replace(text, videos=mixed.videos))


def test_shapes_must_agree(two):
    text, mixed = two
    with pytest.raises(ValueError, match=r"3 tokens but labels_T of shape \[2\]"):
        packed(replace(text, labels_T=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"positions of shape \[3, 4\]"):
        pack([text], [torch.zeros(3, 4)], [{"vision": lay_frames(text, 2, F)}], KINDS, Sizes())
    narrow = replace(mixed.images[0], inputs_UF=torch.zeros(8, F - 1))
    with pytest.raises(ValueError, match=r"grid \(1, 2, 4\) and patches of shape \[8, 4\]"):
        packed(replace(mixed, images=(narrow,)))
    uneven = Media(inputs_UF=torch.zeros(3, F), grid=(1, 1, 3))
    with pytest.raises(ValueError, match="h and w multiples of 2"):
        packed(replace(mixed, images=(uneven,)))


def test_units_of_a_sample(two):
    assert [num_units(s, KINDS["vision"]) for s in two] == [0, 4]


def test_a_batch_is_a_pytree(two):
    batch = packed(*two)
    doubled = tree.map(lambda x: 2 * x, batch)
    assert torch.equal(doubled.towers["vision"].coords_P4, 2 * batch.towers["vision"].coords_P4)
    assert "towers/vision/segments/0/offsets_N" in tree.paths(batch)
    spread = tree.map(lambda x: x, Segments.of(torch.zeros(2), spread="cp"))
    assert spread.spread == "cp"


LEVELS = Levels(mean=(0.5,) * F, std=(0.25, 0.5, 1.0, 0.3, 0.2))


def in_bytes(one, levels=LEVELS):
    """A sample whose images and videos are bytes."""
    read = {
        kind: tuple(replace(m, inputs_UF=m.inputs_UF.byte(), levels=levels) for m in getattr(one, kind))
        for kind in ("images", "videos")
    }
    return replace(one, **read)


def test_bytes_become_floats_on_the_device(two):
    text, mixed = two
    host = packed(text, in_bytes(mixed), num_patches=24)
    tower = host.towers["vision"]
    assert (tower.inputs_UF.dtype, tower.levels) == (torch.uint8, LEVELS)
    assert not tower.inputs_UF[16:].any()
    want_UF = packed(text, mixed).towers["vision"].inputs_UF.byte()
    want_UF = (want_UF.float() - 127.5) / (torch.tensor(LEVELS.std) * 255)
    for moved in (in_floats(host), to(host, "cpu")):
        assert moved.towers["vision"].levels is None
        assert torch.equal(moved.towers["vision"].inputs_UF[:16], want_UF)
    assert to(host, "cpu", torch.bfloat16).towers["vision"].inputs_UF.dtype == torch.bfloat16
    assert to(host, "meta").towers["vision"].inputs_UF.dtype == torch.float32


def test_media_that_are_read_otherwise_are_packed_in_floats(two):
    """As are those of a checkpoint that normalises videos otherwise than images, and of a processor's own result."""
    mixed = in_bytes(two[1])
    others = replace(mixed.videos[0], levels=replace(LEVELS, mean=(0.25,) * F)), mixed.videos[0].in_floats()
    for video in others:
        (own,) = read_alike([replace(mixed, videos=(video,))], KINDS)
        tower = packed(own).towers["vision"]
        assert tower.levels is None
        assert torch.equal(tower.inputs_UF[:8], mixed.images[0].in_floats().inputs_UF)
        assert torch.equal(tower.inputs_UF[8:], video.in_floats().inputs_UF)
    assert read_alike([mixed], KINDS)[0] is mixed
    with pytest.raises(ValueError, match=r"inputs of torch\.uint8 but must give torch\.uint8 of media with levels"):
        packed(in_bytes(two[1], None))


def test_moving_casts_patches_only(two):
    moved = to(packed(*two), "cpu", torch.bfloat16)
    assert moved.towers["vision"].inputs_UF.dtype == torch.bfloat16
    assert moved.weights_T.dtype == torch.float32
    assert to(packed(*two), "meta").tokens_T.device.type == "meta"


def test_segments_are_padded_at_their_end_to_a_multiple(two):
    exact, padded = packed(*two), packed(*two, tokens=16, segments=3, segment_multiple=4)
    kept = [0, 1, 2, *range(4, 12)]
    assert padded.segments.offsets_N.tolist() == [0, 4, 12, 12]
    assert padded.segment_T.tolist() == [0, 0, 0, 3] + [1] * 8 + [3] * 4
    assert padded.labels_T[[3, 12, 13, 14, 15]].tolist() == [IGNORE] * 5
    assert padded.towers["vision"].index_T[3] == -1
    assert torch.equal(padded.towers["vision"].index_T[kept], exact.towers["vision"].index_T)
    for name in ("tokens_T", "labels_T", "weights_T"):
        assert torch.equal(getattr(padded, name)[kept], getattr(exact, name))
    assert torch.equal(padded.positions_3T[:, kept], exact.positions_3T)
    assert two[0].tokens_T.numel() == 3
    with pytest.raises(ValueError, match="hold 12 tokens but the batch has room for 11"):
        packed(*two, tokens=11, segment_multiple=4)


def test_what_is_ahead_is_shifted_within_its_segment(two):
    """The next token at each token, the label behind the one that is predicted, and nothing across a boundary."""
    batch = packed(*two, tokens=16, segments=3, segment_multiple=4, num_ahead=2)
    first, second = batch.ahead
    assert first.tokens_T.tolist() == [11, 12, 0, 0, *range(51, 58), 0, *[0] * 4]
    assert second.tokens_T.tolist() == [12, 0, 0, 0, *range(52, 58), 0, 0, *[0] * 4]
    assert batch.labels_T.tolist() == [IGNORE, 12, *[IGNORE] * 3, *range(52, 58), *[IGNORE] * 5]
    assert first.labels_T.tolist() == [12, *[IGNORE] * 3, *range(52, 58), *[IGNORE] * 6]
    assert second.labels_T.tolist() == [*[IGNORE] * 4, *range(53, 58), *[IGNORE] * 7]
    assert first.weights_T.tolist() == (first.labels_T != IGNORE).float().tolist()
    assert batch.towers["vision"].index_T.tolist() == [*[-1] * 5, 2, -1, 3, -1, 0, 1, *[-1] * 5]
    assert first.index_T["vision"].tolist() == [*[-1] * 4, 2, -1, 3, -1, 0, 1, *[-1] * 6]


def test_host_copies_stay_where_they_are(two):
    batch = packed(*two)
    moved = to(batch, "meta")
    assert moved.segments.offsets_N.is_meta
    assert moved.segments.host_N is batch.segments.host_N
    assert moved.towers["vision"].segments[0].longest == 8
    assert moved.towers["vision"].items_I is batch.towers["vision"].items_I
    assert moved.segments.num == 2
    assert moved.segments.longest == 8
    assert Segments.of(torch.tensor([0], dtype=torch.int32)).longest == 0


def test_a_size_of_an_unknown_tower_is_refused(two):
    with pytest.raises(ValueError, match="there is a size for tower 'audio' but the model has vision; drop it"):
        pack([], [], [], KINDS, Sizes(units={"audio": 3}))


SOUND = TowerKind(media=(AUDIO,), inputs=2, rows=3, features=2, values=F, segments_per_unit=(2, 1), matmul_rows=1)


def pack_sound(**changes):
    """Three units in items of 1 and 2, segments of one and two rows, and whole units; five tokens."""
    laid = Laid(
        inputs=(torch.zeros(2, F), torch.zeros(4, F)),
        coords_P4=torch.zeros(9, 4, dtype=torch.int32),
        segments=((1, 2, 2, 1, 1, 2), (3, 6)),
        items=(1, 2),
        index_T=torch.tensor([-1, 0, 5, 3, -1]),
    )
    heard = replace(sample([AUDIO] * 5), audios=(media(1, 1, 2), media(1, 2, 2)))
    return pack([heard], positions_of([heard]), [{"sound": replace(laid, **changes)}], {"sound": SOUND}, Sizes())


def test_what_is_laid_right_is_taken():
    tower = pack_sound().towers["sound"]
    assert tower.items_I.tolist() == [1, 2]
    assert tower.segments[0].offsets_N.tolist() == [0, 1, 3, 5, 6, 7, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": (1, 0, 2)}, "an item of 0 units but must give items of at least 1"),
        ({"items": (4, -1)}, "an item of -1 units but"),
        ({"items": (1, 1)}, r"6 inputs but must give 4 for its items of 2 units"),
        ({"inputs": (torch.zeros(5, F),)}, "5 inputs but must give 6 for its items of 3 units"),
        ({"items": (1, 1), "inputs": (torch.zeros(4, F),)}, "2 units but must give 3, those of its media, by which"),
        ({"inputs": (torch.zeros(6, 4),)}, r"inputs of shape \[6, 4\] but must give shape \[., 5\]"),
        ({"inputs": (torch.zeros(6),)}, r"inputs of shape \[6\] but"),
        (
            {"coords_P4": torch.zeros(8, 4, dtype=torch.int32)},
            r"coords_P4 of torch.int32, \[8, 4\] but must give torch.int32, \[9, 4\] for",
        ),
        ({"coords_P4": torch.zeros(9, 4)}, r"coords_P4 of torch.float32, \[9, 4\] but"),
        ({"index_T": torch.tensor([-1, 0, 6, 3, -1])}, "index_T from -1 to 6 but must give -1 to 5 for"),
        ({"index_T": torch.tensor([-2, 0, 5, 3, -1])}, "index_T from -2 to 5 but"),
        (
            {"index_T": torch.tensor([-1, 0, 5, 3])},
            r"index_T of torch.int64, \[4\] but must give torch.int64, \[5\] for its tokens",
        ),
        ({"index_T": torch.zeros(5, dtype=torch.int32)}, r"index_T of torch.int32, \[5\] but"),
        ({"segments": ((1, 2) * 3,)}, "1 lists of segments but must give 2, as its kind says"),
        (
            {"segments": ((1, 2) * 3, (3, 0, 6))},
            r"segments\[1\] with one of 0 rows but must give segments of at least 1",
        ),
        ({"segments": ((1, 2) * 3, (3, 1, 1, 4))}, r"segments\[1\] with 4 segments but must give at most 3 for"),
        ({"segments": ((1, 2) * 3, (3, 3))}, r"segments\[1\] of 6 rows in all but must give 9 for"),
        ({"segments": ((1, 2) * 3, ())}, r"segments\[1\] of 0 rows in all but"),
        ({"segments": ((1, 2) * 3, (4, 5))}, r"segments\[1\] with one that crosses the end of item 0 but"),
    ],
)
def test_what_is_laid_otherwise_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"sample 's': its family's `lay` gives tower 'sound' {message}"):
        pack_sound(**changes)


def test_all_towers_are_laid_and_no_others(two):
    for laid in ({}, {"vision": lay_frames(two[0], 2, F), "sound": lay_frames(two[0], 2, F)}):
        with pytest.raises(ValueError, match=r"`lay` gives towers \[.*\] but the model's are \['vision'\]; lay these"):
            pack(two[:1], positions_of(two[:1]), [laid], KINDS, Sizes())
