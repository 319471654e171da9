"""The settings of a run: one declaration each, with its type, default and meaning.

A section refuses unknown keys and never converts between types. What settings mean to each other is said by the list
of rules (`mmfn.train.config.rules`).
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mmfn.train.config.layout import LayoutSection
from mmfn.train.config.learning import (
    FreezeSection,
    LoraSection,
    ObjectiveSection,
    OptimizerSection,
    ScheduleSection,
)
from mmfn.train.config.section import Buckets, ConfigSection, Different, Dtype, Patterns
from mmfn.train.dialect import Dialect
from mmfn.train.limits import LIMITS, PILLOWS_PIXELS


class ModelSection(ConfigSection):
    """What is trained."""

    path: str = Field(description="folder with config.json, tokenizer, image settings and (to load) safetensors")
    init: Literal["load", "random"] = Field(
        default="load", description="load the weights of `path`, or draw them at random"
    )
    dtype: Dtype = Field(default="float32", description="dtype of the parameters and, by default, of the compute")
    device: str = Field(default="cpu", description="torch device: cpu, cuda, cuda:1, npu, ...")
    kernels: Literal["portable", "reference", "cuda", "npu"] = Field(
        default="portable", description="which table of ops computes, in training, evaluation, generation and plans"
    )
    adapter: str | None = Field(
        default=None, description="folder of a LoRA adapter in peft's format that is trained on; null: none"
    )


class DataSection(ConfigSection):
    """What it is trained on."""

    train: str = Field(description="training set, JSON or JSONL (docs/data.md)")
    eval: str | None = Field(default=None, description="held-out set in the same format; null: no evaluation")
    format: Literal["auto", "messages", "openai", "llava", "sharegpt", "multimodal_tool", "alpaca"] = Field(
        default="auto", description="what entries look like (docs/data.md); auto: found out for each"
    )
    columns: dict[str, str] = Field(
        default={}, description="keys of an entry that are called otherwise than in the format: {messages: turns}"
    )
    tags: dict[str, str] = Field(
        default={}, description="the same of turns and their speakers: {role_tag: role, user_tag: user}"
    )
    ignore: Annotated[Patterns, Different] = Field(
        default=(), description="keys of entries and turns that are left out; any other unknown key is refused"
    )
    max_samples: PositiveInt | None = Field(
        default=None, description="how many entries of `train` are used, from the first on; null: all"
    )
    root: str | None = Field(
        default=None, description="folder that media paths resolve in; null: the data file's own folder"
    )
    batch_samples: PositiveInt = Field(default=8, description="samples per step, over all micro-batches and ranks")
    token_buckets: Buckets = Field(description="sizes in tokens a packed micro-batch is padded to")
    tower_buckets: dict[str, Buckets] = Field(
        description="the same in what an encoder reads, by tower of the model: {NAME: [8192]}"
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="refuse longer samples; null: the largest token bucket"
    )
    template: str | None = Field(
        default=None, description="jinja file with a chat template, saved with the checkpoint; null: the model's own"
    )
    check: Literal["all", "first"] = Field(
        default="all", description="before training, prepare every sample once, or only the first step's"
    )
    workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=1, description="threads that prepare batches ahead, at most 64; 0: none"
    )
    ahead: PositiveInt = Field(default=4, description="steps prepared ahead, at most")
    cache_mib: Annotated[int, Field(ge=0)] = Field(
        default=256, description="memory for prepared samples, in MiB; 0: no cache"
    )
    max_image_pixels: Annotated[int, Field(ge=1, le=PILLOWS_PIXELS)] = Field(
        default=LIMITS.image_pixels,
        description="refuse images of more pixels before they are decoded, at most 178956970",
    )
    max_audio_seconds: Annotated[float, Field(gt=0)] = Field(
        default=LIMITS.audio_seconds, description="refuse longer sounds before they are decoded"
    )

    @property
    def dialect(self) -> Dialect:
        """How entries are to be read."""
        return Dialect(format=self.format, columns=self.columns, tags=self.tags, ignore=self.ignore)


class TrainSection(ConfigSection):
    """How long and how."""

    steps: PositiveInt = Field(description="optimizer steps")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="decides the initial weights, the order of the data and what is dropped"
    )
    compile: Literal["none", "layer", "step"] = Field(
        default="none", description="torch.compile: each block, the whole step; on the CPU so far"
    )
    allocator: Literal["default", "retained"] = Field(
        default="default", description="retained: glibc keeps freed memory (faster on CPU; for the whole process)"
    )
    log_every: PositiveInt = Field(default=10, description="steps between printed lines (metrics.jsonl has every step)")
    max_skips: PositiveInt = Field(default=10, description="so many skipped steps in a row end the run")
    spike_window: Annotated[int, Field(ge=0)] = Field(
        default=0, description="skip steps whose gradient norm is far above that of so many before; 0: none"
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        default=10.0, description="far above: times the median of spike_window"
    )


class EvalSection(ConfigSection):
    """Held-out evaluation by greedy generation, at the end."""

    batch_samples: PositiveInt = Field(default=32, description="prompts generated at once")
    max_new_tokens: PositiveInt = Field(default=32, description="longest answer")


class OutputSection(ConfigSection):
    """Where results go."""

    path: str = Field(description="run folder: config, metrics, evaluation, report, checkpoint")
    overwrite: bool = Field(
        default=False,
        description="replace an earlier run in that folder; it is kept in `previous` until the new one is complete",
    )
    report_images: Annotated[int, Field(ge=0)] = Field(default=60, description="held-out images shown in report.html")
    experts: Literal["hub", "transformers"] = Field(
        default="hub", description="layout of experts in the checkpoint: as published, or as transformers saves them"
    )
    weights: Literal["last", "ema"] = Field(
        default="last", description="what is evaluated and saved: the last parameters or their average (ema_decay)"
    )
    adapter: Literal["merged", "separate", "both"] = Field(
        default="both", description="with LoRA: a merged checkpoint, an adapter in peft's format, or both"
    )


class Config(ConfigSection):
    """All settings of a run."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    freeze: FreezeSection = FreezeSection()
    lora: LoraSection = LoraSection()
    train: TrainSection
    layout: LayoutSection = LayoutSection()
    eval: EvalSection = EvalSection()
    output: OutputSection

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.lora.rank is not None or self.model.adapter is not None

    def is_changed(self, name: str) -> bool:
        """Whether a dotted setting differs from its default."""
        section, _, setting = name.partition(".")
        return bool(getattr(self, section).is_changed(setting))
