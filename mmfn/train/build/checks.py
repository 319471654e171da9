"""What can be checked of a config before a weight is read. All raise ValueError, one sentence, for what is wrong."""

from pathlib import Path
from typing import Any

from mmfn.interop import adapter, export
from mmfn.interop.checkpoint import open_weights, read_config, stored_names
from mmfn.interop.hf import blank
from mmfn.models import Family
from mmfn.train.build.data import open_dataset
from mmfn.train.build.match import check_match
from mmfn.train.build.model import check_model, model_specs
from mmfn.train.build.optimizer import build_guard, build_optimizer, build_schedule
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.build.step import build_objective
from mmfn.train.config.schema import Config
from mmfn.train.data import Processor
from mmfn.tree import Tree


def check_training(config: Config, family: Family, cfg: Any) -> Tree:
    """The parameters of a run, once what is trained and how is found right: parts, patterns, adapters, schedule."""
    specs, counted = model_specs(config, family, cfg), with_any_steps(config)
    check_model(config, family, cfg)
    build_objective(config.objective)
    build_optimizer(counted, specs)
    build_schedule(counted)
    build_guard(config)
    export.check_layout(family.specs(cfg), family.key_map(cfg), config.output.experts)
    if config.has_adapters and config.output.adapter != "merged":
        adapter.disk_tensors(specs, family.specs(cfg), family.key_map(cfg))
    return specs


def with_any_steps(config: Config) -> Config:
    """The config with enough steps for its warmups in place of `train.epochs`: the data say how many they are."""
    if config.train.steps is not None:
        return config
    warmups = [shape.warmup_steps for shape in (config.schedule, *config.schedule.groups.values())]
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": 1 + max(warmups)})})


def check_weights(config: Config, family: Family, cfg: Any) -> str:
    """Names and shapes, from the headers of the files."""
    folder = Path(config.model.path)
    if stored_names(folder) is None:
        return "not here, so not checked"
    with open_weights(folder, family.specs(cfg), family.key_map(cfg)) as weights:
        return f"{len(weights.account.leaves):,} parameters have the shapes of the model"


def read_processor(config: Config) -> Processor:
    """The processor of the model's folder, which belongs to the model."""
    folder = Path(config.model.path)
    processor = load_model_processor(config.model.path, config.data.chat, config.data.media_settings)
    model = blank(read_config(folder))
    check_match(model, processor)
    eos_token_ids(folder, processor, model.cfg.vocab_size)
    return processor


def measure_first(config: Config, name: str, processor: Processor) -> str:
    """The first entry of `data.train` or `data.eval`, without decoding its media, and how many there are."""
    data = config.data
    dataset = open_dataset(data, getattr(data, name), processor, data.max_samples if name == "train" else None)
    return f"{len(dataset):,} entries, the first of {dataset.measure(0).tokens_T.numel():,} tokens"
