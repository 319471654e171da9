"""The settings of a run: one declaration each, with its type, default and meaning.

A section refuses unknown keys, never converts between types, and checks what its settings mean to each other.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

Tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has lists only
Buckets = Annotated[tuple[PositiveInt, ...], Tuple, Field(min_length=1)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Tuple]
Patterns = Annotated[tuple[str, ...], Tuple]
Fraction = Annotated[float, Field(ge=0, le=1)]
Remat = Literal["none", "full", "selective", "uniform", "block"]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    def is_changed(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class ModelSection(Section):
    """What is trained."""

    path: str = Field(description="folder with config.json, tokenizer, image settings and (to load) safetensors")
    init: Literal["load", "random"] = Field(
        default="load", description="load the weights of `path`, or draw them at random"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the parameters and, by default, of the compute"
    )
    device: str = Field(default="cpu", description="torch device: cpu, cuda, cuda:1, npu, ...")
    adapter: str | None = Field(
        default=None, description="folder of a LoRA adapter in peft's format that is trained on; null: none"
    )


class DataSection(Section):
    """What it is trained on."""

    train: str = Field(description="training set, JSON or JSONL (docs/data.md)")
    eval: str | None = Field(default=None, description="held-out set in the same format; null: no evaluation")
    root: str | None = Field(
        default=None, description="folder that media paths resolve in; null: the data file's own folder"
    )
    batch_samples: PositiveInt = Field(default=8, description="samples per step, over all micro-batches and ranks")
    token_buckets: Buckets = Field(description="sizes in tokens a packed micro-batch is padded to")
    patch_buckets: Buckets = Field(description="sizes in vision patches a packed micro-batch is padded to")
    max_tokens: PositiveInt | None = Field(
        default=None, description="refuse longer samples; null: the largest token bucket"
    )
    template: str | None = Field(default=None, description="jinja file with a chat template; null: the model's own")
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

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        for name in ("token_buckets", "patch_buckets"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name} must increase, got {list(sizes)}")
        if self.max_tokens is not None and self.max_tokens > self.token_buckets[-1]:
            raise ValueError(f"max_tokens {self.max_tokens} is above the largest token bucket {self.token_buckets[-1]}")
        if self.workers == 0 and self.is_changed("ahead"):
            raise ValueError("ahead has no effect with workers 0; remove it or raise that")
        return self


class ObjectiveSection(Section):
    """What the loss is."""

    name: str = Field(
        default="per_token_loss",
        description="how tokens are weighted: default, per_sample_loss, per_token_loss, token_loss, square_loss",
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="coefficient of the squared log-sum-exp of a token's logits; 1e-4 is usual"
    )
    label_smoothing: Fraction = Field(default=0.0, description="share of a token's target spread over the vocabulary")
    chunk_size: PositiveInt | None = Field(
        default=None, description="tokens that meet the head at a time; null: as many as suit it"
    )
    total_chunk_size: PositiveInt | None = Field(
        default=None, description="the same as a limit: the largest power of two that is at most it"
    )

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveSection":
        if self.chunk_size is not None and self.total_chunk_size is not None:
            raise ValueError("chunk_size and total_chunk_size are both set; remove one of them")
        return self


class OptimizerSection(Section):
    """How gradients become updates."""

    kind: Literal["adamw", "muon", "sgd"] = Field(
        default="adamw", description="muon: matrices by Muon, embeddings, head, norms and biases by AdamW"
    )
    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    betas: Betas = Field(default=(0.9, 0.999), description="decay rates of AdamW's two moments")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="added to the root of AdamW's second moment")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, description="of muon and sgd")
    nesterov: bool = Field(default=True, description="muon and sgd look one step ahead along the momentum")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw", description="muon: updates as large as AdamW's, or scaled by the shape alone"
    )
    muon_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of Muon's iterations; float32 is faster on most CPUs"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="decoupled decay, per unit of learning rate"
    )
    no_decay: Patterns = Field(default=(), description="regexes over parameter paths that are not decayed")
    lr_scales: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="factors of the learning rate by regex over parameter paths, the first match counts"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="factor of the learning rate per layer, counted back from the last of a stack"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="global gradient norm; null: no clipping"
    )
    moments_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of AdamW's moments; bfloat16 is rounded up or down at random"
    )
    master: bool | None = Field(
        default=None, description="update float32 copies of bfloat16 parameters, which lose small steps; null: true"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="keep an average of the parameters over steps (output.weights); null: none"
    )

    @model_validator(mode="after")
    def _check(self) -> "OptimizerSection":
        idle = {
            **dict.fromkeys(("betas", "eps", "moments_dtype"), self.kind == "sgd"),
            **dict.fromkeys(("momentum", "nesterov"), self.kind == "adamw"),
            **dict.fromkeys(("adjust_lr", "muon_dtype"), self.kind != "muon"),
        }
        for name, is_idle in idle.items():
            if is_idle and self.is_changed(name):
                raise ValueError(f"{name} has no effect with kind {self.kind!r}; remove it or change that")
        if self.no_decay and self.weight_decay == 0:
            raise ValueError("no_decay has no effect with weight_decay 0; remove it or set that")
        if self.kind != "adamw" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov has no effect with momentum 0; set it to false")
        return self


class FreezeSection(Section):
    """What stays as it is."""

    parts: Patterns = Field(default=(), description="vision_encoder, vision_projector, text_decoder, lm_head, ...")
    patterns: Patterns = Field(default=(), description="regexes over parameter paths")


class LoraSection(Section):
    """Low-rank adapters; everything else is frozen."""

    rank: PositiveInt | None = Field(default=None, description="rank of the adapters; null: no LoRA")
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="adapters are scaled by alpha / rank")
    targets: Patterns = Field(
        default=(r"text/layers/\d+/attention/(q|k|v|o)",),
        description="regexes over layers that get adapters; others: mlp/(gate|up|down), moe/experts/(gate_up|down)",
    )
    rslora: bool = Field(default=False, description="rank-stabilised: scale by alpha / sqrt(rank)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of an adapter's inputs that is zeroed in training; 0: none"
    )
    keep: Patterns = Field(default=(), description="regexes over parameters that are trained as well, in full")

    @model_validator(mode="after")
    def _check(self) -> "LoraSection":
        idle = [name for name in type(self).model_fields if self.is_changed(name)]
        if self.rank is None and idle:
            raise ValueError(f"{idle[0]} has no effect without rank; set lora.rank or remove it")
        return self


class ScheduleShape(Section):
    """A learning rate over steps, but for its peak."""

    kind: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="shape after the warmup")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="steps of linear warmup")
    final_scale: Fraction = Field(default=0.0, description="learning rate at the last step, as a share of the peak")

    @model_validator(mode="after")
    def _check(self) -> "ScheduleShape":
        if self.kind == "constant" and self.is_changed("final_scale"):
            raise ValueError("final_scale has no effect with kind 'constant'; remove it or choose linear or cosine")
        return self


class ScheduleGroup(ScheduleShape):
    """The schedule of some parameters."""

    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")


class ScheduleSection(ScheduleShape):
    """The learning rate over steps."""

    groups: dict[str, ScheduleGroup] = Field(
        default={}, description="schedules {lr, kind, warmup_steps, final_scale} of their own by regex over paths"
    )


class TrainSection(Section):
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

    @model_validator(mode="after")
    def _check(self) -> "TrainSection":
        if self.spike_window == 0 and self.is_changed("spike_factor"):
            raise ValueError("spike_factor has no effect with spike_window 0; remove it or set that")
        return self


class LayoutSection(Section):
    """How a program is laid out over ranks (docs/architecture.md), and in which dtypes it computes."""

    replicate: PositiveInt = Field(default=1, description="copies of the sharded parameters, each with its own data")
    dp: PositiveInt = Field(default=1, description="ranks with their own data, over which parameters are sharded")
    cp: PositiveInt = Field(default=1, description="ranks that share the tokens of a batch; parameters are sharded too")
    ep: PositiveInt = Field(default=1, description="ranks among dp * cp that share the experts")
    kind: Literal["gather", "ulysses", "ring", "usp"] = Field(
        default="gather", description="attention over cp ranks; on accelerators ulysses so far"
    )
    ulysses: PositiveInt = Field(default=1, description="of the cp ranks of kind usp, those that split heads")
    capacity: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="rows an ep rank takes from another, in even shares; null: all there are"
    )
    prefetch: bool = Field(default=True, description="gather the next layer's parameters while one computes")
    keep_gathered: bool = Field(default=False, description="keep gathered parameters for the backward under remat")
    head: Literal["gathered", "sharded"] = Field(
        default="gathered", description="sharded: tokens travel to the head's rows, which stay where they are"
    )
    remat: Remat = Field(
        default="none",
        description="layers whose activations are computed again: all; all but some ops; in groups; the first ones",
    )
    remat_save: Patterns = Field(default=("attention",), description="ops whose results selective remat keeps")
    remat_every: PositiveInt = Field(default=1, description="of so many layers one is computed again")
    remat_layers: PositiveInt = Field(default=1, description="layers in a group (uniform), or first layers (block)")
    remat_vision: Remat | None = Field(default=None, description="the same for the vision tower; null: as layout.remat")
    remat_vision_save: Patterns = Field(default=("attention",), description="the same for the vision tower")
    remat_vision_every: PositiveInt = Field(default=1, description="the same for the vision tower")
    remat_vision_layers: PositiveInt = Field(default=1, description="the same for the vision tower")
    offload: Annotated[tuple[Literal["activations", "optimizer", "parameters"], ...], Tuple] = Field(
        default=(), description="what lies in the host's memory while the device does not need it"
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype parameters are gathered and used in; null: model.dtype"
    )
    compute_rules: dict[str, Literal["float32", "bfloat16"]] | None = Field(
        default=None,
        description="dtypes by regex over paths; null: with bfloat16, routers, norms and A_log are float32",
    )
    reduce_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype gradients are summed in over ranks; null: float32"
    )
    timeout_s: PositiveInt = Field(default=1800, description="a rank that does not answer for so long ends the run")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.replicate * self.dp * self.cp

    @model_validator(mode="after")
    def _check(self) -> "LayoutSection":
        is_hosted = "parameters" in self.offload
        idle = {
            "kind": (self.cp == 1, "cp 1"),
            "ulysses": (self.kind != "usp", f"kind {self.kind!r}"),
            "capacity": (self.ep == 1, "ep 1"),
            "prefetch": (self.dp * self.cp == 1 and not is_hosted, "dp 1 and cp 1, parameters on the device"),
            "head": (self.dp * self.cp == 1, "dp 1 and cp 1"),
            "keep_gathered": (
                (self.world == 1 and not is_hosted) or {self.remat, self.remat_vision} <= {"none", None},
                "remat 'none' or one rank with parameters on the device",
            ),
            "reduce_dtype": (self.world == 1, "one rank"),
            "timeout_s": (self.world == 1, "one rank"),
        }
        for key, kind in (("remat", self.remat), ("remat_vision", self.remat_vision)):
            reason = f"{key} {kind!r}"
            idle[f"{key}_save"] = (kind != "selective", reason)
            idle[f"{key}_every"] = (kind not in ("full", "selective"), reason)
            idle[f"{key}_layers"] = (kind not in ("uniform", "block"), reason)
        for name, (is_idle, reason) in idle.items():
            if is_idle and self.is_changed(name):
                raise ValueError(f"{name} has no effect with {reason}; remove it or change that")
        if "exchange" in self.remat_save and self.ep == 1:
            raise ValueError("remat_save 'exchange' has no effect with ep 1; remove it or change that")
        if idle_ops := {"exchange", "experts"} & set(self.remat_vision_save):
            raise ValueError(f"remat_vision_save {min(idle_ops)!r} has no effect, the tower has no experts; remove it")
        if len(set(self.offload)) < len(self.offload):
            raise ValueError(f"offload names one thing twice: {list(self.offload)}; name each once")
        if self.kind == "usp" and (self.ulysses in (1, self.cp) or self.cp % self.ulysses):
            raise ValueError(
                f"ulysses {self.ulysses} must divide cp {self.cp} and lie between 1 and it for kind 'usp'; change it, "
                "or choose kind ring or ulysses"
            )
        return self


class EvalSection(Section):
    """Held-out evaluation by greedy generation, at the end."""

    batch_samples: PositiveInt = Field(default=32, description="prompts generated at once")
    max_new_tokens: PositiveInt = Field(default=32, description="longest answer")


class OutputSection(Section):
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


class Config(Section):
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

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for name, is_set in (("head", self.layout.head == "sharded"), ("offload", bool(self.layout.offload))):
            if is_set and self.train.compile == "step":
                chosen = getattr(self.layout, name)
                raise ValueError(f"layout.{name} {chosen!r} needs train.compile 'none' or 'layer'; change one of them")
        self._check_dtypes()
        if self.data.eval is None:
            idle = [f"eval.{name}" for name in EvalSection.model_fields if self.eval.is_changed(name)]
            idle += ["output.report_images"] * self.output.is_changed("report_images")
            if idle:
                raise ValueError(f"{idle[0]} has no effect without data.eval; remove it or set that")
        if self.layout.compute_dtype == self.model.dtype:
            raise ValueError(f"layout.compute_dtype {self.model.dtype!r} has no effect, model.dtype says so; remove it")
        if self.model.adapter is not None and self.lora.rank is not None:
            raise ValueError("lora has no effect with model.adapter, which says what is adapted; remove one of them")
        if not self.has_adapters and self.output.adapter != "both":
            raise ValueError(f"output.adapter {self.output.adapter!r} has no effect without LoRA; remove it")
        if self.has_adapters and self.model.init == "random" and self.output.adapter == "separate":
            raise ValueError(
                "output.adapter 'separate' saves nowhere the base that model.init 'random' draws; choose merged or both"
            )
        if self.optimizer.master is not None and self.model.dtype == "float32":
            raise ValueError("optimizer.master has no effect with model.dtype 'float32'; remove it or choose bfloat16")
        if self.output.weights == "ema" and self.optimizer.ema_decay is None:
            raise ValueError("output.weights 'ema' needs averages; set optimizer.ema_decay or remove it")
        if self.output.weights == "last" and self.optimizer.ema_decay is not None:
            raise ValueError("optimizer.ema_decay has no effect with output.weights 'last'; remove it or choose ema")
        if self.train.spike_window >= 2 * self.train.steps:
            raise ValueError(
                f"train.spike_window {self.train.spike_window} has no effect in {self.train.steps} steps: nothing "
                "is a spike before half of it is filled; lower it"
            )
        if self.layout.capacity is not None and len(self.data.token_buckets) > 1:
            raise ValueError(
                f"layout.capacity needs batches of one size on all ranks, but data.token_buckets has "
                f"{len(self.data.token_buckets)}; keep the largest"
            )
        if self.schedule.warmup_steps >= self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} must be below train.steps {self.train.steps}"
            )
        return self

    def _check_dtypes(self) -> None:
        """Raise ValueError for dtypes that change nothing where all is computed in float32."""
        chosen = self.layout
        rules = chosen.compute_rules or {}
        if {chosen.compute_dtype or self.model.dtype, *rules.values()} != {"float32"}:
            return
        idle = {"compute_rules": chosen.compute_rules is not None, "reduce_dtype": chosen.reduce_dtype == "float32"}
        for name in (name for name, is_idle in idle.items() if is_idle):
            raise ValueError(f"layout.{name} has no effect where all is computed in float32; remove it")
