"""What is learnt and how: the sections `objective`, `optimizer`, `schedule`, `freeze` and `lora` of a config."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from mmfn.train.config.section import Betas, ConfigSection, Fraction, Patterns


class ObjectiveSection(ConfigSection):
    """What the loss is."""

    name: str = Field(
        default="per_token_loss",
        description="how tokens are weighted: default, per_sample_loss, per_token_loss, token_loss, square_loss",
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="coefficient of the squared log-sum-exp of a token's logits; 1e-4 is usual"
    )
    label_smoothing: Fraction = Field(default=0.0, description="share of a token's target spread over the vocabulary")
    router_aux_coef: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="weight of the routers' load-balancing loss; null: router_aux_loss_coef as config.json has it",
    )
    ahead_weight: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="weight of tokens predicted further ahead; null: mtp_loss_scaling_factor as config.json has it",
    )
    chunk_size: PositiveInt | None = Field(
        default=None, description="tokens that meet the head at a time; null: as many as suit it"
    )
    total_chunk_size: PositiveInt | None = Field(
        default=None, description="the same as a limit: the largest power of two that is at most it"
    )


class OptimizerSection(ConfigSection):
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


class FreezeSection(ConfigSection):
    """What stays as it is."""

    parts: Patterns = Field(default=(), description="vision_encoder, vision_projector, text_decoder, lm_head, ...")
    patterns: Patterns = Field(default=(), description="regexes over parameter paths")


class LoraSection(ConfigSection):
    """Low-rank adapters; everything else is frozen."""

    rank: PositiveInt | None = Field(default=None, description="rank of the adapters; null: no LoRA")
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="adapters are scaled by alpha / rank")
    targets: Patterns | None = Field(
        default=None, description="regexes over layers that get adapters; null: those of the family, its text attention"
    )
    rslora: bool = Field(default=False, description="rank-stabilised: scale by alpha / sqrt(rank)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of an adapter's inputs that is zeroed in training; 0: none"
    )
    keep: Patterns = Field(default=(), description="regexes over parameters that are trained as well, in full")


class ScheduleShape(ConfigSection):
    """A learning rate over steps, but for its peak."""

    kind: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="shape after the warmup")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="steps of linear warmup")
    final_scale: Fraction = Field(
        default=0.0, description="share of the peak after train.steps; the last step runs one step's decay above it"
    )


class ScheduleGroup(ScheduleShape):
    """The schedule of some parameters."""

    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")


class ScheduleSection(ScheduleShape):
    """The learning rate over steps."""

    groups: dict[str, ScheduleGroup] = Field(
        default={}, description="schedules {lr, kind, warmup_steps, final_scale} of their own by regex over paths"
    )
