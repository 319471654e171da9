"""From a config to data: data sets, loader, and the checks that find broken samples before training."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmfn.batch import Batch, Sample
from mmfn.model import Model
from mmfn.models import Family
from mmfn.packing import Sizes
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.program import Program
from mmfn.train.build.step import build_objective
from mmfn.train.config.changes import FREE
from mmfn.train.config.schema import Config, DataSection
from mmfn.train.config.sets import SetSection, list_sets
from mmfn.train.data import Dataset, Loader, Processor, Workers, prefetch
from mmfn.train.data.agree import gather_skips
from mmfn.train.data.cursor import digest_of
from mmfn.train.data.dataset import Subset
from mmfn.train.data.sizes import flop_rates
from mmfn.train.data.skips import KINDS, SHOWN, Skip, check_share
from mmfn.train.flops import model_work

STEP_SETTINGS = {"eval", "batch_samples", "batch_tokens", "window_samples", "max_bad_share"}  # not of a sample
CHECKED_AHEAD = 64  # samples of a check that are under way


def open_dataset(
    section: DataSection, data: str | Sequence[SetSection], processor: Processor, max_samples: int | None = None
) -> Dataset:
    """A config's training or held-out data, or its first entries; none of them is read yet."""
    subsets = [
        Subset(
            path=one.path,
            root=one.root or section.root,
            dialect=section.dialect_of(one),
            max_samples=one.max_samples or max_samples,
            weight=one.weight,
        )
        for one in list_sets(data)
    ]
    return Dataset(
        subsets,
        processor,
        cache_bytes=section.cache_mib * 2**20,
        limits=section.limits,
        audio_rate=section.audio_sampling_rate,
        is_heard=section.use_audio_in_video,
        index_folder=section.index_folder,
    )


def build_loader(
    config: Config,
    dataset: Dataset,
    model: Model,
    program: Program,
    axis: Axis | None = None,
    world: Axis | None = None,
) -> Loader:
    """The loader of a data set for a model and the share of it that a program computes.

    `axis`: the ranks with their own data, and `world`: all of them, on the CPU; by default the program's mesh.
    """
    data, kind, layout = config.data, config.layout.kind, program.mesh.layout
    family, cfg = model.family, model.cfg
    towers = family.towers(cfg)
    return Loader(
        dataset,
        partial(_pack, family=family, cfg=cfg),
        towers,
        batch_samples=data.batch_samples if data.batch_tokens is None else None,
        batch_tokens=data.batch_tokens,
        window_samples=data.window_samples,
        token_buckets=data.token_buckets,
        tower_buckets=data.tower_buckets,
        seed=config.train.seed,
        axis=axis or program.mesh["batch"],
        world=world or program.mesh["world"],
        split=program.split,
        segment_multiple=segment_multiple(kind, layout),
        max_tokens=data.max_tokens,
        rates=flop_rates(family.specs(cfg), towers, family.experts_per_token(cfg)),
        long_samples=data.long_samples,
        max_bad_share=data.max_bad_share,
        workers=Workers(number=data.workers, ahead=data.ahead, kind=data.worker_kind),
        work=model_work(family, cfg, program.specs, build_objective(config.objective)),
    )


def _pack(samples: Sequence[Sample], sizes: Sizes, *, family: Family, cfg: Any) -> Batch:
    return family.pack_bytes(samples, cfg, sizes)


def check_data(
    config: Config, loader: Loader, held_out: Dataset | None, place: Place, say: Callable[[str], None]
) -> None:
    """Prepare samples once, as `data.check` says, so that broken files are found before training and not in the middle.

    Of all samples each rank prepares its part, and a run that goes on does not do so again. The prepared samples stay
    in the cache. What cannot be used is said at once, counted, and the first of it named.
    Raises ValueError when it is more than `data.max_bad_share` allows, and for held-out data that cannot be answered.
    """
    if config.data.check == "first":
        for agreed in loader.steps(1, workers=Workers(number=0)):
            loader.check_share(agreed)
        if held_out is not None:
            held_out.prompt(0)
        return
    world, size = place.host["world"], len(loader.dataset)
    num_held_out = len(held_out) if held_out is not None else 0
    workers = Workers(number=max(1, config.data.workers), ahead=CHECKED_AHEAD)
    digest = _digest_of_use(config.data)
    if loader.has_checked(digest):
        say(f"checking {num_held_out} held-out samples; the {size} training samples were checked when the run began")
    else:
        say(f"checking {size} training and {num_held_out} held-out samples")
        counts, first = _check_samples(loader, world, workers)
        if num_bad := sum(counts.values()):
            kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
            say(f"{num_bad} of {size} training samples cannot be used ({kinds}):")
            for skip in first:
                say(f"  {skip}")
        check_share(first, num_bad, size, size, config.data.max_bad_share)
    loader.note_checked(digest)
    if held_out is not None:
        for _ in prefetch(held_out.prompt, range(world.index, num_held_out, world.size), workers):
            pass


def _digest_of_use(data: DataSection) -> str:
    """Of the settings that decide which samples can be used, and how they are read."""
    values = data.model_dump(mode="json")
    idle = {name.removeprefix("data.") for name in FREE} | STEP_SETTINGS
    return digest_of([(name, values[name]) for name in sorted(values.keys() - idle)])


def _check_samples(loader: Loader, world: Axis, workers: Workers) -> tuple[Counter[str], list[Skip]]:
    """How many samples of each kind all ranks leave out, and the first few of them: no rank holds all."""
    counts, first = Counter[str](), list[Skip]()
    for skip in prefetch(loader.reader.check, range(world.index, len(loader.dataset), world.size), workers):
        if skip is not None:
            counts[skip.kind] += 1
            first += [skip][: SHOWN - len(first)]
    total = sum((Counter(one) for one in gather_values(counts, world, "skips")), Counter[str]())
    return total, list(gather_skips(first, world)[:SHOWN])
