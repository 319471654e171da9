"""What the processors of transformers return for random conversations, of any type.

Media of a row stand between words in any order; every type writes videos in its own way.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.oracles.recipes import (
    AUDIO_END_ID,
    AUDIO_ID,
    AUDIO_START_ID,
    END_ID,
    IMAGE_ID,
    RECIPES,
    START_ID,
    VIDEO_END_ID,
    VIDEO_ID,
    VIDEO_START_ID,
    model_type,
)

TEXT, IMAGE, VIDEO, AUDIO = range(4)
SECONDS = (1.0, 0.5, 2.0, 0.25)  # per step of a video: positions made of them are exact in float32
PIXELS = ((IMAGE, "pixel_values", "image_grid_thw"), (VIDEO, "pixel_values_videos", "video_grid_thw"))
TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
SOUND_KEYS = ("input_features", "feature_attention_mask")
PER_VIDEO = ("second_per_grid_ts", "video_second_per_grid")
CHUNK, CHUNK_TOKENS = 100, 13  # frames of sound that are encoded together, and what they become


@dataclass
class Row:
    """One conversation: its tokens, their kinds, and its media in order."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    grids: dict[int, list[tuple[int, int, int]]] = field(default_factory=lambda: {IMAGE: [], VIDEO: []})
    seconds: list[float] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)  # frames of sound of each

    def write(self, ids: Iterable[int], kind: int = TEXT) -> None:
        ids = list(ids)
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def enclose(self, before: list[int], start: int, ids: list[int], kind: int, end: int) -> None:
        """Words, then placeholders between their marks."""
        self.write([*before, start])
        self.write(ids, kind)
        self.write([end])


def num_audio_tokens(num_frames: int) -> int:
    """Tokens of a clip: 13 per 100 frames, and what three convolutions of stride 2 leave of the rest."""
    rest = num_frames % CHUNK
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return CHUNK_TOKENS * (num_frames // CHUNK) + rest


def inputs(
    cfg: Any,
    seed: int,
    *,
    rows: int = 2,
    pad: str = "right",
    images: int = 2,
    videos: int = 1,
    audios: int = 2,
    sound: bool | None = None,
) -> dict[str, Tensor]:
    """What a processor returns for `rows` random conversations: text and media of all kinds of the type in any order.

    `images`, `videos`, `audios`: the most of a kind in one row. `sound`: whether videos come with their sound, one
    answer for all of a call; None draws it.
    """
    r = random.Random(f"inputs {seed}")
    has_sound = "audio_config" in cfg.sub_configs and (r.random() < 0.5 if sound is None else sound)
    conversations = [_row(cfg, r, images, videos, audios, has_sound) for _ in range(rows)]
    longest = max(len(row.ids) for row in conversations)
    names = ["input_ids", "attention_mask", "mm_token_type_ids"]
    out = {key: torch.zeros(rows, longest, dtype=torch.int64) for key in names}
    for i, row in enumerate(conversations):
        place = slice(0, len(row.ids)) if pad == "right" else slice(longest - len(row.ids), longest)
        for key, value in zip(names, (row.ids, [1] * len(row.ids), row.kinds), strict=True):
            out[key][i, place] = torch.tensor(value)
    if "audio_config" in cfg.sub_configs:
        del out["mm_token_type_ids"]  # a processor that does not tell kinds
    return out | _media(cfg, conversations, torch.Generator().manual_seed(seed))


def labelled(cfg: Any, seed: int, **limits: Any) -> dict[str, Tensor]:
    """Inputs of which about half the tokens are supervised, but not the first of a row: padding would predict it."""
    out = inputs(cfg, seed, **limits)
    is_token = out["attention_mask"].bool()
    draws = torch.rand(int(is_token.sum()), generator=torch.Generator().manual_seed(seed))  # padding on any side
    is_label = torch.zeros_like(is_token).masked_scatter(is_token, draws < 0.5) & (out["attention_mask"].cumsum(1) > 1)
    return {**out, "labels": torch.where(is_label, out["input_ids"], -100)}


def _media(cfg: Any, rows: list[Row], g: torch.Generator) -> dict[str, Tensor]:
    vision, out = cfg.vision_config, {}
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for kind, pixels, grids in PIXELS:
        if media_grids := [grid for row in rows for grid in row.grids[kind]]:
            out[grids] = torch.tensor(media_grids)
            out[pixels] = torch.randn(int(out[grids].prod(-1).sum()), width, generator=g)
    name = model_type(cfg)
    seconds = {"qwen2_5_vl": "second_per_grid_ts", "qwen3_omni_moe": "video_second_per_grid"}.get(name)
    if seconds and (values := [value for row in rows for value in row.seconds]):
        out[seconds] = torch.tensor(values)
    if clips := [clip for row in rows for clip in row.clips]:
        frames = torch.arange(max(clips))
        out["feature_attention_mask"] = (frames < torch.tensor(clips)[:, None]).long()
        features = torch.randn(len(clips), cfg.audio_config.num_mel_bins, max(clips), generator=g)
        out["input_features"] = features * out["feature_attention_mask"][:, None]
    return out


def _row(cfg: Any, r: random.Random, images: int, videos: int, audios: int, has_sound: bool) -> Row:
    merge, name, row = cfg.vision_config.spatial_merge_size, model_type(cfg), Row()
    has_audio = "audio_config" in cfg.sub_configs

    def words(least: int, most: int) -> list[int]:
        return [
            r.randrange(RECIPES[name].first_word, cfg.text_config.vocab_size) for _ in range(r.randint(least, most))
        ]

    def clip() -> int:
        """Tokens of a clip; the first of a row has a whole chunk, as the library pads to the longest of its call."""
        row.clips.append(r.randint(1 if row.clips else CHUNK, 430))
        return num_audio_tokens(row.clips[-1])

    row.write(words(1, 6))
    todo = [IMAGE] * r.randint(0, images) + [VIDEO] * r.randint(0, videos)
    todo += [AUDIO] * r.randint(0, audios) if has_audio else []
    r.shuffle(todo)
    for kind in todo:
        if kind == AUDIO:
            row.write([*words(0, 3), AUDIO_START_ID])
            row.write([AUDIO_ID] * clip(), AUDIO)
            row.write([AUDIO_END_ID])
            continue
        t, height, width = (1 if kind == IMAGE else r.randint(1, 3)), r.randint(1, 4), r.randint(1, 4)
        row.grids[kind].append((t, height * merge, width * merge))
        if kind == IMAGE:
            row.enclose(words(0, 3), START_ID, [IMAGE_ID] * (height * width), IMAGE, END_ID)
        elif name == "qwen2_5_vl" or (has_audio and not has_sound):
            row.seconds.append(r.choice(SECONDS))
            row.enclose(words(0, 3), START_ID, [VIDEO_ID] * (t * height * width), VIDEO, END_ID)
        elif has_sound:
            row.seconds.append(r.choice(SECONDS))
            row.write([*words(0, 3), START_ID, AUDIO_START_ID])
            per_step = row.seconds[-1] * cfg.position_id_per_seconds
            for kind_of_token in interleave([i * per_step for i in range(t) for _ in range(height * width)], clip()):
                row.write([VIDEO_ID if kind_of_token == VIDEO else AUDIO_ID], kind_of_token)
            row.write([AUDIO_END_ID, END_ID])
        else:
            is_marked = name == "glm4v_moe"  # a video as a whole, whose frames are written as images are
            row.write([VIDEO_START_ID] * is_marked)
            for _ in range(t):
                token = IMAGE_ID if is_marked else VIDEO_ID
                row.enclose(words(0, 3), START_ID, [token] * (height * width), VIDEO, END_ID)
            row.write([VIDEO_END_ID] * is_marked)
    row.write(words(1, 7))
    return row


def interleave(times: list[float], num_sounds: int) -> Iterator[int]:
    """Kinds of the tokens of a video and its sound: by their place in time, the video first where they are equal."""
    frame = sound = 0
    while frame < len(times) or sound < num_sounds:
        if sound == num_sounds or (frame < len(times) and times[frame] <= sound):
            frame += 1
            yield VIDEO
        else:
            sound += 1
            yield AUDIO


# ---- taking inputs apart


def kinds_of(inputs: dict[str, Tensor]) -> Tensor:
    """int64[rows, columns]: kinds of tokens, also of the type whose processor does not tell them."""
    if "mm_token_type_ids" in inputs:
        return inputs["mm_token_type_ids"]
    ids = inputs["input_ids"]
    return IMAGE * (ids == IMAGE_ID) + VIDEO * (ids == VIDEO_ID) + AUDIO * (ids == AUDIO_ID)


def groups(kinds_S: Tensor) -> list[tuple[int, int]]:
    """(kind, length) of the runs of equal kinds."""
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds_S.tolist())]


def is_heard_and_seen(inputs: dict[str, Tensor]) -> bool:
    """True where videos come with their sound: the marks of both begin together."""
    ids = inputs["input_ids"]
    return bool(((ids[:, :-1] == START_ID) & (ids[:, 1:] == AUDIO_START_ID)).any())


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every row of padded inputs alone, without padding."""
    kinds, text = kinds_of(batch), [k for k in TEXT_KEYS if k in batch]
    num_places = int(((kinds == IMAGE) | (kinds == VIDEO)).sum())
    num_patches = sum(int(batch[grids].prod(-1).sum()) for _, _, grids in PIXELS if grids in batch)
    merged = num_patches // max(num_places, 1)  # patches per token
    pixels = {key: batch[key] for _, key, _ in PIXELS if key in batch}
    rest = {key: list(batch[key]) for _, _, key in PIXELS if key in batch}
    rest |= {key: list(batch[key]) for key in (*PER_VIDEO, *SOUND_KEYS) if key in batch}
    out = []
    for i, mask in enumerate(batch["attention_mask"].bool()):
        row = {key: batch[key][i][mask][None] for key in text}
        for kind, values, grids in PIXELS:
            left, count = int((kinds[i][mask] == kind).sum()) * merged, 0
            while left > 0:
                left -= int(rest[grids][count].prod())
                count += 1
            if count:
                row[grids] = _take(rest[grids], count)
                row[values], pixels[values] = pixels[values].tensor_split([int(row[grids].prod(-1).sum())])
                for key in PER_VIDEO if kind == VIDEO else ():
                    row |= {key: _take(rest[key], count)} if key in batch else {}
        left, count = int((kinds[i][mask] == AUDIO).sum()), 0
        while left > 0:
            left -= num_audio_tokens(int(rest["feature_attention_mask"][count].sum()))
            count += 1
        row |= {key: _take(rest[key], count) for key in SOUND_KEYS if count}
        out.append(row)
    return out


def _take(items: list[Tensor], count: int) -> Tensor:
    """The first of the items as one tensor; removes them from the list."""
    first = torch.stack(items[:count])
    del items[:count]
    return first
