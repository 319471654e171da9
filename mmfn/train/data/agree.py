"""What the ranks with their own data tell each other of a step: counts, and what was left out."""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace

import torch
from torch import Tensor

from mmfn.batch import IGNORE, Batch, Tower
from mmfn.models.work import Work, counts_of, flops_of
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.data.cursor import START, Cursor
from mmfn.train.data.packing_plan import Ints
from mmfn.train.data.sizes import Size
from mmfn.train.data.skips import Skip

NO_WORK: Work = {}


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts over the micro-batches of a step.

    `inputs`: what encoders read, all towers together. `cut`: samples. `flops`: of forward and backward, and of them
    those of encoders; 0 where the loader is not told the work of a model. Tokens by kind are those of the samples.
    """

    samples: int
    tokens: int
    padded_tokens: int  # static size: tokens and padding
    supervised_tokens: int
    media_tokens: int
    inputs: int
    padded_inputs: int
    cut: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0
    flops: int = 0
    encoder_flops: int = 0

    @property
    def text_tokens(self) -> int:
        """Those that stand for no medium."""
        return self.tokens - self.image_tokens - self.video_tokens - self.audio_tokens

    @property
    def padding_share(self) -> float:
        """Part of the packed tokens that is padding, in [0, 1]."""
        return 1.0 - self.tokens / self.padded_tokens


def stats(microbatches: Sequence[Batch], work: Work = NO_WORK) -> Stats:
    """Counts over micro-batches on the host, but for what only their samples tell."""
    towers = [tower for b in microbatches for tower in b.towers.values()]
    flops = [flops_of(work, counts_of(b)) for b in microbatches] if work else []
    return Stats(
        samples=sum(_num_samples(b) for b in microbatches),
        tokens=sum(int((b.segment_T < b.num_segments).sum()) for b in microbatches),
        padded_tokens=sum(b.tokens_T.numel() for b in microbatches),
        supervised_tokens=sum(int((b.labels_T != IGNORE).sum()) for b in microbatches),
        media_tokens=sum(int((tower.index_T >= 0).sum()) for tower in towers),
        inputs=sum(_num_inputs(tower) for tower in towers),
        padded_inputs=sum(tower.inputs_UF.shape[0] for tower in towers),
        flops=sum(sum(parts.values()) for parts in flops),
        encoder_flops=sum(parts[name] for parts in flops for name in microbatches[0].towers),
    )


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank computes in one step, and the counts of the samples it is a share of.

    `labels_AN`: int64, supervised tokens of every sample of the A whole micro-batches, N places for samples in each.
    `room`: samples that any rank may have in a step, the same on all. `skips`: those of this rank. `measured`: sizes of
    samples of the next window, by place. `cursor`: where the run is behind the step.
    """

    microbatches: list[Batch]
    counts: Stats
    labels_AN: Tensor
    room: int
    skips: tuple[Skip, ...] = ()
    measured: dict[int, Size | Skip] = field(default_factory=dict)
    cursor: Cursor = START


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks with their own data know of a step: `share` of this rank, with as many micro-batches as any has.

    `counts`: of all ranks together. `encoder_imbalance`: the most that encoders of one of them compute, over the mean.
    `labels_DAN`: int64, supervised tokens of every sample of all D ranks, what `objective.weigh_by` takes. `skips`: of
    all ranks, by place. `cursor`: where the run is behind the step. `asked`: the most that any rank was asked for
    before it (`mmfn.train.watch`).
    """

    microbatches: list[Batch]
    counts: Stats
    encoder_imbalance: float
    labels_DAN: Tensor
    skips: tuple[Skip, ...] = ()
    cursor: Cursor = START
    asked: int = 0


def agree(share: Share, axis: Axis, empty: Share, *, world: Axis | None = None, asked: int = 0) -> Agreed:
    """One exchange of a few numbers per sample over `axis`, the ranks with their own data; a second one of what some of
    them left out.

    `world`: all ranks, as many with each share of the data (default: one): what any of them was `asked` counts.

    Ranks must take part in the same collectives: those with fewer micro-batches get copies of `empty` behind them.
    """
    A, N = share.labels_AN.shape
    micro_S, place_S = _samples_of(share)
    own = torch.full((2, share.room), -1)
    own[:, : micro_S.numel()] = torch.stack([micro_S, share.labels_AN[micro_S, place_S]])
    facts = torch.tensor([A, len(share.skips), *astuple(share.counts)])
    world = world or axis
    rows = world.all_gather(torch.cat([torch.tensor([asked]), facts, own.flatten()])[None], "data")
    all_DK = rows[:: world.size // axis.size, 1:]  # ranks in order: shares of the data, and the ranks of each
    most = int(all_DK[:, 0].max())
    columns = list(zip(*all_DK[:, : facts.numel()].tolist(), strict=True))
    num_all, num_skips, *totals = map(sum, columns)  # of Python's integers: FLOPs of all ranks may exceed 64 bits
    counts = Stats(**dict(zip(asdict(share.counts), totals, strict=True)))
    encoder_flops = columns[-1]
    padded = counts.padded_tokens + (most * axis.size - num_all) * empty.counts.padded_tokens
    all_D2S = all_DK[:, facts.numel() :].view(axis.size, 2, share.room)
    return Agreed(
        microbatches=share.microbatches + empty.microbatches * (most - A),
        counts=replace(counts, padded_tokens=padded),
        encoder_imbalance=max(encoder_flops) * axis.size / sum(encoder_flops) if any(encoder_flops) else 1.0,
        labels_DAN=_labels(all_D2S, most, N),
        skips=gather_skips(share.skips, axis) if num_skips else (),
        cursor=share.cursor,
        asked=int(rows[:, 0].max()),
    )


def gather_skips(skips: Sequence[Skip], axis: Axis) -> tuple[Skip, ...]:
    """The skips of all ranks, by place."""
    every = gather_values([asdict(skip) for skip in skips], axis, "skips")
    return tuple(sorted((Skip(**skip) for own in every for skip in own), key=lambda skip: skip.place))


def gather_sizes(own: Sequence[Size | None], num_sizes: int, axis: Axis) -> tuple[Ints, Ints]:
    """What ranks measured, dealt out again: value i of rank r comes i * ranks + r-th.

    sizes_WD and costs_WD, int64[W, D]: tokens and units of each tower, and FLOPs of the decoder and each tower, D being
    `num_sizes`; -1 where there is none.
    """
    most = int(axis.all_gather(torch.tensor([len(own)]), "sizes").max())
    no_size = [-1] * (2 * num_sizes)
    rows = [no_size if size is None else [*size.sizes, *size.costs] for size in own]
    rows += [no_size] * (most - len(rows))
    own_IK = torch.tensor(rows, dtype=torch.int64).view(most, 2 * num_sizes)
    every_RIK = axis.all_gather(own_IK[None], "sizes")
    every_WK: Ints = every_RIK.transpose(0, 1).reshape(-1, 2 * num_sizes).numpy()
    return every_WK[:, :num_sizes], every_WK[:, num_sizes:]


def _samples_of(share: Share) -> tuple[Tensor, Tensor]:
    """Micro-batch and place in it of every sample."""
    numbers_A = torch.tensor([_num_samples(b) for b in share.microbatches])
    micro_S = torch.repeat_interleave(numbers_A)
    return micro_S, torch.arange(micro_S.numel()) - (numbers_A.cumsum(0) - numbers_A)[micro_S]


def _labels(all_D2S: Tensor, num_microbatches: int, num_segments: int) -> Tensor:
    """labels_DAN from the micro-batch (-1: no sample) and the count of every sample of every rank, in order."""
    D, _, S = all_D2S.shape
    micro_DS, count_DS = all_D2S.unbind(1)
    is_first_DS = micro_DS.diff(dim=1, prepend=micro_DS.new_full((D, 1), -2)) != 0
    places_S = torch.arange(S)
    place_DS = places_S - torch.where(is_first_DS, places_S, 0).cummax(1).values  # in its micro-batch
    d, s = (micro_DS >= 0).nonzero(as_tuple=True)
    labels_DAN = torch.zeros(D, num_microbatches, num_segments, dtype=torch.int64)
    labels_DAN[d, micro_DS[d, s], place_DS[d, s]] = count_DS[d, s]
    return labels_DAN


def _num_samples(batch: Batch) -> int:
    return int((batch.segments.host_N.diff() > 0).sum())


def _num_inputs(tower: Tower) -> int:
    """Inputs that are not padding."""
    rows = tower.inputs_UF.shape[0] / max(1, tower.coords_P4.shape[0])
    return round(int(tower.segments[0].host_N[-1]) * rows)
