"""The settings of a run: one declaration each, with its type, default and meaning.

A section refuses unknown keys and never converts between types. What settings mean to each other is said by the list
of rules (`mmfn.train.config.rules`).
"""

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mmfn.parallel.program import gathers_in_graphs
from mmfn.train.chat_options import ChatOptions
from mmfn.train.config.layout import LayoutSection
from mmfn.train.config.learning import (
    FreezeSection,
    LoraSection,
    ObjectiveSection,
    OptimizerSection,
    ScheduleSection,
)
from mmfn.train.config.section import (
    Buckets,
    ConfigSection,
    Different,
    Dtype,
    Fraction,
    Patterns,
    Tuple,
    Window,
)
from mmfn.train.config.sets import Sets, SetSection
from mmfn.train.dialect import Dialect
from mmfn.train.limits import LIMITS, PILLOWS_PIXELS, Limits


class ModelSection(ConfigSection):
    """What is trained."""

    path: str = Field(description="folder with config.json, tokenizer, image settings and (to load) safetensors")
    init: Literal["load", "random"] = Field(
        default="load", description="load the weights of `path`, or draw them at random"
    )
    dtype: Dtype = Field(default="float32", description="dtype of the parameters and, by default, of the compute")
    device: str = Field(default="cpu", description="torch device: cpu, cuda, cuda:1, npu, ...")
    kernels: Literal["auto", "portable", "reference", "cuda", "npu"] = Field(
        default="auto", description="which table of ops computes; auto: that of the device, portable on a CPU"
    )
    kernel_packages: Annotated[tuple[Literal["fla", "flash-attn"], ...], Tuple, Different] = Field(
        default=(), description="installed packages whose kernels lie over that table (docs/kernels.md)"
    )
    adapter: str | None = Field(
        default=None, description="folder of a LoRA adapter in peft's format that is trained on; null: none"
    )

    @property
    def table(self) -> str:
        """The name of the table of ops that computes."""
        if self.kernels != "auto":
            return self.kernels
        return self.kind if self.kind in ("cuda", "npu") else "portable"

    @property
    def kind(self) -> str:
        """The type of the device, without its number."""
        return self.device.partition(":")[0]


Pixels = Annotated[int, Field(ge=0)] | None


class DataSection(ConfigSection):
    """What it is trained on."""

    train: Sets = Field(description="training set (docs/data.md): a path, or a list of paths or {path, weight, ...}")
    eval: Sets | None = Field(default=None, description="held-out set, given in the same way; null: no evaluation")
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
    batch_samples: PositiveInt | None = Field(
        default=8, description="samples per step, over all micro-batches and ranks; null: batch_tokens says them"
    )
    batch_tokens: PositiveInt | None = Field(
        default=None,
        description="in place of batch_samples: tokens per step, in micro-batches of the largest token bucket",
    )
    window_samples: PositiveInt | None = Field(
        default=None, description="with batch_tokens: samples that are packed together; null: enough for full batches"
    )
    token_buckets: Buckets = Field(description="sizes in tokens a packed micro-batch is padded to")
    tower_buckets: dict[str, Buckets] = Field(
        description="the same in what an encoder reads, by tower of the model: {NAME: [8192]}"
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="longer samples are too long; null: the largest token bucket"
    )
    long_samples: Literal["skip", "cut", "stop"] = Field(
        default="skip", description="samples too long: left out, cut behind an answer of the assistant, or an error"
    )
    max_bad_share: Fraction = Field(
        default=0.01, description="the run ends when more of the samples seen were skipped; 0: at the first, 1: never"
    )
    template: str | None = Field(
        default=None,
        description="chat template, saved with the checkpoint: a jinja file or a name (docs/data.md); null: its own",
    )
    enable_thinking: bool | None = Field(
        default=None, description="passed to the template, in training and prompts; null: the template's own default"
    )
    train_on_prompt: bool = Field(default=False, description="learn all tokens but those of media, not answers alone")
    mask_history: bool = Field(default=False, description="learn only the answers behind the last message of the user")
    train_empty_thinking: bool = Field(
        default=True, description="learn think blocks without a thought; false: only what stands behind them"
    )
    video_outer_marks: bool = Field(
        default=True,
        description="Qwen3-VL, Qwen3.5: marks around a video beside those of its frames, as transformers since 5.10",
    )
    check: Literal["all", "first"] = Field(
        default="all", description="before training, prepare every sample once, or only the first step's"
    )
    workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=1, description="threads or processes that prepare batches ahead, at most 64; 0: none"
    )
    worker_kind: Literal["threads", "processes"] = Field(
        default="threads", description="processes: where much is done in Python; each has its own cache"
    )
    ahead: PositiveInt = Field(default=4, description="steps prepared ahead, at most")
    index_folder: str | None = Field(
        default=None, description="folder for the indexes of large data files; null: beside each file"
    )
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
    max_video_seconds: Annotated[float, Field(gt=0)] = Field(
        default=LIMITS.video_seconds, description="refuse longer videos before they are decoded"
    )
    image_min_pixels: Pixels = Field(default=None, description="an image of fewer is enlarged; null: the model's own")
    image_max_pixels: Pixels = Field(default=None, description="one of more is reduced; null: the model's own")
    video_min_pixels: Pixels = Field(
        default=None, description="the same of videos, as the model counts: of each frame or of all (docs/data.md)"
    )
    video_max_pixels: Pixels = Field(default=None, description="the upper bound of it; null: the model's own")
    video_fps: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="frames read per second of a video; null: the model's own"
    )
    video_maxlen: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="frames read of a video, at most; null: the model's own"
    )
    audio_sampling_rate: PositiveInt | None = Field(
        default=None, description="sound is brought to this rate before the model's; null: to the model's at once"
    )
    use_audio_in_video: bool = Field(
        default=False, description="hear the sound of videos along with them; models that hear"
    )

    @property
    def media_settings(self) -> dict[str, dict[str, float]]:
        """What is changed of how the model's processor takes media, by kind and the names of `SETTINGS`."""
        bounds = {"min_pixels": "min_pixels", "max_pixels": "max_pixels", "fps": "fps", "max_frames": "maxlen"}
        values = {
            kind: {name: getattr(self, f"{kind}_{key}", None) for name, key in bounds.items()}
            for kind in ("image", "video")
        }
        changed = {kind: {k: v for k, v in of_kind.items() if v is not None} for kind, of_kind in values.items()}
        return {kind: of_kind for kind, of_kind in changed.items() if of_kind}

    @property
    def limits(self) -> Limits:
        """What is refused before it is decoded."""
        return Limits(
            image_pixels=self.max_image_pixels,
            audio_seconds=self.max_audio_seconds,
            video_seconds=self.max_video_seconds,
        )

    @property
    def chat(self) -> ChatOptions:
        """How conversations are rendered and learned."""
        return ChatOptions(**{field.name: getattr(self, field.name) for field in fields(ChatOptions)})

    @property
    def dialect(self) -> Dialect:
        """How entries are to be read."""
        return Dialect(format=self.format, columns=self.columns, tags=self.tags, ignore=self.ignore)

    def dialect_of(self, one: SetSection) -> Dialect:
        """The same of one of several data sets."""
        if one.format is None:
            return self.dialect
        return Dialect(format=one.format, columns=one.columns, tags=one.tags, ignore=self.ignore)


LARGEST = 2**63 - 1  # of 64 bits: what the order of the data counts in and a saved state holds


class TrainSection(ConfigSection):
    """How long and how."""

    steps: Annotated[PositiveInt, Field(le=LARGEST)] | None = Field(
        default=None, description="optimizer steps; null: as many as epochs take"
    )
    epochs: PositiveInt | None = Field(
        default=None,
        description="in place of steps: how often every sample is read (with data.batch_tokens: as many samples)",
    )
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        default=0, description="decides the initial weights, the order of the data and what is dropped"
    )
    compile: Literal["none", "layer", "step"] = Field(
        default="none", description="torch.compile: each block, the whole step; on the CPU so far"
    )
    allocator: Literal["default", "retained"] = Field(
        default="default", description="retained: glibc keeps freed memory (faster on CPU; for the whole process)"
    )
    log_every: PositiveInt = Field(default=10, description="steps between printed lines (metrics.jsonl has every step)")
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="peak of a device in TFLOP/s, for MFU; null: known devices' own, in bfloat16"
    )
    max_skips: PositiveInt = Field(default=10, description="so many skipped steps in a row end the run")
    spike_window: Annotated[int, Field(ge=0)] = Field(
        default=0, description="skip steps whose gradient norm is far above that of so many before; 0: none"
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        default=10.0, description="far above: times the median of spike_window"
    )
    gc_every: PositiveInt | None = Field(
        default=None, description="Python collects garbage behind every so many steps only; null: when it likes"
    )
    profile: Window | None = Field(
        default=None, description="[first, last] step that is traced, into profile in the run folder; null: none"
    )
    deterministic: bool = Field(
        default=False, description="only kernels that give the same bits each time; an operator without one is refused"
    )

    @property
    def num_steps(self) -> int:
        """Steps, known once the data are where `epochs` say them."""
        assert self.steps is not None, "steps follow from epochs where the data are opened"
        return self.steps


class CheckpointSection(ConfigSection):
    """State on disk from which a run goes on as if it had not ended, in `state` in the run folder."""

    every: PositiveInt | None = Field(default=None, description="steps between saves of the run's state; null: none")
    asynchronous: bool = Field(
        default=True, description="write beside the next steps, from a copy in the host's memory; false: wait"
    )
    read_back: bool = Field(
        default=False, description="read what was written from the disk again and compare, before it counts"
    )
    keep_last: PositiveInt = Field(default=2, description="saves that stay, the newest ones")
    keep_every: PositiveInt | None = Field(
        default=None, description="besides, those behind every so many steps stay for ever; null: none"
    )
    keep_best: Annotated[int, Field(ge=0)] = Field(
        default=0, description="besides, so many with the lowest held-out loss; such a state is saved when it is found"
    )
    save_optimizer: bool = Field(
        default=True, description="false: parameters alone; a run that goes on from them begins with a new optimizer"
    )
    resume: str = Field(
        default="auto",
        description="auto: go on from the newest save in the run folder, if any; none: never; or a path of a save, of "
        "a run, or of a folder of saves, that a new run begins from",
    )
    load_optimizer: bool = Field(
        default=True, description="with a path in resume; false: its optimizer is left, and a new one begins"
    )
    load_cursor: bool = Field(
        default=True, description="with a path in resume; false: steps, schedule and order of data begin at the first"
    )


class WandbSection(ConfigSection):
    """A run of Weights & Biases. `name`: of the run there; null: that of the run folder."""

    project: Annotated[str, Field(min_length=1)]
    name: str | None = None


class LogSection(ConfigSection):
    """Where the numbers of `metrics.jsonl` go besides."""

    tensorboard: bool = Field(default=False, description="event files in tensorboard in the run folder")
    wandb: WandbSection | None = Field(
        default=None, description="{project, name}: a run of Weights & Biases; null: none"
    )


class EvalSection(ConfigSection):
    """Held-out evaluation: its loss on the way, and greedy answers at the end."""

    every: PositiveInt | None = Field(
        default=None, description="steps between evaluations of the held-out loss; null: none before the end"
    )
    prompts: Annotated[Patterns, Different] = Field(
        default=(), description="what is answered at each of them, into answers.jsonl in the run folder"
    )
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
    export_every: PositiveInt | None = Field(
        default=None, description="steps between exports of what is trained so far, in exports/iter_0000100; null: none"
    )
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
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()
    output: OutputSection

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.lora.rank is not None or self.model.adapter is not None

    @property
    def gathers_in_graphs(self) -> bool:
        """Whether compiled graphs gather parameters, so that nothing runs ahead of blocks or behind them."""
        is_selective = "selective" in self.layout.remat_kinds
        return gathers_in_graphs(self.train.compile, is_selective=is_selective, keep_gathered=self.layout.keep_gathered)

    def is_changed(self, name: str) -> bool:
        """Whether a dotted setting differs from its default."""
        section, _, setting = name.partition(".")
        return bool(getattr(self, section).is_changed(setting))
