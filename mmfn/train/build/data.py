"""From a config to data: processor, data sets, loader, and the checks that find broken samples before training."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmfn.batch import IGNORE
from mmfn.errors import UserError
from mmfn.interop.checkpoint import read_config
from mmfn.model import Model
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.program import Program
from mmfn.train.config.schema import Config
from mmfn.train.data import Dataset, Limits, Loader, Processor, load_processor
from mmfn.train.data.tokenizer import read_json


def load_model_processor(path: str, template: str | None = None) -> Processor:
    """Tokenizer, chat template and image settings of a model's folder; `template` names a jinja file to use instead.

    Raises ValueError for a folder that is missing or incomplete, first of all one without a readable config.json.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model.path {path!r} is no folder; give the folder of a Hugging Face checkpoint")
    read_config(folder)  # before the tokenizer, whose loader reads the file too and blames itself
    if template is None:
        return load_processor(folder)
    try:
        source = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template {template!r} cannot be read ({error}); give a text file") from error
    return load_processor(folder, source)


def open_dataset(config: Config, path: str, processor: Processor, max_samples: int | None = None) -> Dataset:
    """One of the config's data files, or its first entries, checked as far as it can be without opening media."""
    return Dataset(
        path,
        processor,
        media_root=config.data.root,
        max_tokens=config.data.max_tokens,
        max_samples=max_samples,
        dialect=config.data.dialect,
        cache_bytes=config.data.cache_mib * 2**20,
        limits=Limits(image_pixels=config.data.max_image_pixels, audio_seconds=config.data.max_audio_seconds),
    )


def build_loader(config: Config, dataset: Dataset, model: Model, program: Program) -> Loader:
    """The loader of a data set for a model and the share of it that a program computes."""
    kind, layout = config.layout.kind, program.mesh.layout
    return Loader(
        dataset,
        lambda samples, sizes: model.family.pack(samples, model.cfg, sizes),
        model.family.towers(model.cfg),
        batch_samples=config.data.batch_samples,
        token_buckets=config.data.token_buckets,
        tower_buckets=config.data.tower_buckets,
        seed=config.train.seed,
        axis=program.mesh["batch"],
        split=program.split,
        segment_multiple=segment_multiple(kind, layout),
    )


def check_data(
    config: Config,
    loader: Loader,
    train_set: Dataset,
    held_out: Dataset | None,
    place: Place,
    say: Callable[[str], None],
) -> None:
    """Prepare samples once, as `data.check` says, so that a broken file is found before training and not in the middle.

    Of all samples each rank prepares its part. The prepared samples stay in the cache. Raises ValueError for the first
    sample of the data that fails.
    """

    def check_sample(index: int) -> None:
        sample = train_set.sample(index)
        if not bool((sample.labels_T != IGNORE).any()):
            raise UserError(
                f"sample {sample.id!r} of {str(train_set.path)!r} has nothing to learn; give it a turn of the "
                "assistant or remove it"
            )
        loader.check_fits(sample)

    def check_prompt(index: int) -> None:
        if held_out is not None:
            held_out.prompt(index)

    if config.data.check == "first":
        _drain(map(check_sample, loader.own(0)))
        loader.share(0)
        check_prompt(0)
        return
    world = place.host["world"]
    num_held_out = len(held_out) if held_out is not None else 0
    say(f"checking {len(train_set)} training and {num_held_out} held-out samples")
    with ThreadPoolExecutor(max_workers=max(1, config.data.workers), thread_name_prefix="mmfn-check") as pool:
        try:
            _drain(pool.map(check_sample, range(world.index, len(train_set), world.size)))
            _drain(pool.map(check_prompt, range(world.index, num_held_out, world.size)))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


def eos_token_ids(folder: Path, processor: Processor, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, or else the tokenizer's own.

    Raises ValueError for a file that is no JSON object, or ids that are no tokens of the model.
    """
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = processor.chat.tokenizer.eos_token_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise UserError(
            f"eos_token_id is {eos!r} in {str(path)!r} but must be a token id below vocab_size {vocab_size}, or a "
            "list of them; correct the file"
        )
    return tuple(ids)


def _drain(results: Iterable[Any]) -> None:
    for _ in results:
        pass
