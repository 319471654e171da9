"""The configuration of a run: one YAML file plus dotted overrides, checked as a whole before anything else happens.

Every setting has one declaration here: its type, default and meaning. Unknown keys are refused by name, values of the
wrong type are never converted, and each value remembers where it came from. Relative paths mean the current directory.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

Tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has lists only
Buckets = Annotated[tuple[PositiveInt, ...], Tuple, Field(min_length=1)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Tuple]
Patterns = Annotated[tuple[str, ...], Tuple]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


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
        return self


class ObjectiveSection(Section):
    """What the loss is."""

    name: str = Field(default="per_token_loss", description="how tokens are weighted, see mmfn.train.objective")


class OptimizerSection(Section):
    """AdamW with clipping."""

    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    betas: Betas = Field(default=(0.9, 0.999), description="decay rates of the two moments")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="decoupled decay, per unit of learning rate"
    )
    no_decay: Patterns = Field(default=(), description="regexes over parameter paths that are not decayed")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="global gradient norm; null: no clipping"
    )


class ScheduleSection(Section):
    """The learning rate over steps."""

    kind: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="shape after the warmup")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="steps of linear warmup")
    final_scale: Fraction = Field(default=0.0, description="learning rate at the last step, as a share of the peak")

    @model_validator(mode="after")
    def _check(self) -> "ScheduleSection":
        if self.kind == "constant" and "final_scale" in self.model_fields_set:
            raise ValueError("final_scale has no effect with kind 'constant'; remove it or choose linear or cosine")
        return self


class TrainSection(Section):
    """How long and how."""

    steps: PositiveInt = Field(description="optimizer steps")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="decides the initial weights and the order of the data"
    )
    compile: Literal["none", "layer", "step"] = Field(
        default="none", description="torch.compile: each block, the whole step"
    )
    allocator: Literal["default", "retained"] = Field(
        default="default", description="retained: glibc keeps freed memory (faster on CPU; for the whole process)"
    )
    log_every: PositiveInt = Field(default=10, description="steps between printed lines (metrics.jsonl has every step)")


class LayoutSection(Section):
    """How a program is laid out over ranks (docs/architecture.md), and in which dtypes it computes."""

    replicate: PositiveInt = Field(default=1, description="copies of the sharded parameters, each with its own data")
    dp: PositiveInt = Field(default=1, description="ranks with their own data, over which parameters are sharded")
    cp: PositiveInt = Field(default=1, description="ranks that share the tokens of a batch; parameters are sharded too")
    ep: PositiveInt = Field(default=1, description="ranks among dp * cp that share the experts")
    kind: Literal["gather", "ulysses", "ring", "usp"] = Field(default="gather", description="attention over cp ranks")
    ulysses: PositiveInt = Field(default=1, description="of the cp ranks of kind usp, those that split heads")
    capacity: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="rows an ep rank takes from another, in even shares; null: all there are"
    )
    prefetch: bool = Field(default=True, description="gather the next layer's parameters while one computes")
    keep_gathered: bool = Field(default=False, description="keep gathered parameters for the backward under remat")
    remat: Literal["none", "full", "selective"] = Field(
        default="none", description="layers whose activations are computed again: wholly, or all but some ops"
    )
    remat_save: Patterns = Field(default=("attention",), description="ops whose results selective remat keeps")
    remat_every: PositiveInt = Field(default=1, description="of so many layers one is computed again")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype parameters are gathered and used in; null: model.dtype"
    )
    reduce_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype gradients are summed in over ranks; null: the compute dtype"
    )
    timeout_s: PositiveInt = Field(default=1800, description="a rank that does not answer for so long ends the run")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.replicate * self.dp * self.cp

    @model_validator(mode="after")
    def _check(self) -> "LayoutSection":
        idle = {
            "kind": (self.cp == 1, "cp 1"),
            "ulysses": (self.kind != "usp", f"kind {self.kind!r}"),
            "capacity": (self.ep == 1, "ep 1"),
            "prefetch": (self.dp * self.cp == 1, "dp 1 and cp 1"),
            "keep_gathered": (self.remat == "none" or self.world == 1, "remat 'none' or one rank"),
            "remat_save": (self.remat != "selective", f"remat {self.remat!r}"),
            "remat_every": (self.remat == "none", "remat 'none'"),
            "reduce_dtype": (self.world == 1, "one rank"),
            "timeout_s": (self.world == 1, "one rank"),
        }
        for name, (is_idle, reason) in idle.items():
            if is_idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with {reason}; remove it or change that")
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


class Config(Section):
    """All settings of a run."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    layout: LayoutSection = LayoutSection()
    eval: EvalSection = EvalSection()
    output: OutputSection

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.layout.compute_dtype == self.model.dtype:
            raise ValueError(f"layout.compute_dtype {self.model.dtype!r} has no effect, model.dtype says so; remove it")
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


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checked config, the file it is from, and where every dotted key that was set is: "FILE:LINE" or "override"."""

    config: Config
    path: Path
    origins: Mapping[str, str]


# What PyYAML raises, besides its own errors, for values that do not fit their tag (`!!int x`) and for deep nesting.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


class _Setting(NamedTuple):
    key: str
    value: Any
    origin: str


class _YamlLoader(yaml.SafeLoader):
    """YAML with numbers as in YAML 1.2: plain SafeLoader reads 1e-3 as a string."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def known_keys() -> dict[str, str]:
    """Every dotted key and its description, in declaration order."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        f"{name}.{key}": field.description or ""
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Section)
        for key, field in section.model_fields.items()
    }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a YAML file, apply `key=value` overrides in order (values are YAML) and check everything.

    Raises ValueError: a file that is missing or no YAML mapping, an unknown or repeated key, a missing or wrong value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ValueError(f"cannot read config {str(path)!r}: {reason}; give the path of a YAML file") from error
    settings = [*_read_file(text, str(path)), *map(_read_override, overrides)]
    nested: dict[str, dict[str, Any]] = {name: {} for name in ("model", "data", "optimizer", "train", "output")}
    for key, value, _ in settings:
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    origins = {key: origin for key, _, origin in settings}
    try:
        return Loaded(config=Config.model_validate(nested), path=path, origins=origins)
    except ValidationError as error:
        raise ValueError(_sentence(error, str(path), nested, origins)) from error


def describe(loaded: Loaded) -> str:
    """The whole config as YAML; each value with its origin as a comment. It can be read back as a config."""
    lines = []
    for name, section in loaded.config.model_dump(mode="json").items():
        lines.append(f"{name}:")
        for key, value in section.items():
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
            origin = loaded.origins.get(f"{name}.{key}", "default")
            lines.append(f"{f'  {key}: {text}':<60}  # {origin}")
    return "\n".join(lines) + "\n"


def _read_file(text: str, source: str) -> list[_Setting]:
    try:
        loader = _YamlLoader(text)
        root = loader.get_single_node()
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ValueError(f"{where} is no valid YAML: {_reason(error)}; correct it") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"config {source!r} must be a mapping of sections such as 'model:', got something else")
    settings: list[_Setting] = []
    for name, section, where in _entries(root, source):
        if name not in Config.model_fields:
            raise ValueError(_unknown(name, where))
        if not isinstance(section, yaml.MappingNode):
            raise ValueError(f"{where}: section {name!r} must be a mapping of settings, got {section.value!r}")
        for key, node, line in _entries(section, source, prefix=f"{name}."):
            if key not in known_keys():
                raise ValueError(_unknown(key, line))
            try:
                settings.append(_Setting(key, loader.construct_object(node, deep=True), line))
            except _YAML_ERRORS as error:
                raise ValueError(f"{line}: {key} is no valid YAML: {_reason(error)}; quote it if it is text") from error
    return settings


def _entries(mapping: yaml.MappingNode, source: str, prefix: str = "") -> list[tuple[str, yaml.Node, str]]:
    """`(key, value node, "FILE:LINE")` of a YAML mapping. A repeated key is an error, not a silent last wins."""
    found: dict[str, tuple[str, yaml.Node, str]] = {}
    for key_node, value_node in mapping.value:
        key, where = f"{prefix}{key_node.value}", f"{source}:{key_node.start_mark.line + 1}"
        if key in found:
            raise ValueError(f"{where}: key {key!r} was already set at {found[key][2]}; keep one of them")
        found[key] = (key, value_node, where)
    return list(found.values())


def _read_override(text: str) -> _Setting:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"override {text!r} has no '='; write it as key=value, for instance train.steps=100")
    if key not in known_keys():
        raise ValueError(_unknown(key, "override"))
    try:
        return _Setting(key, yaml.load(value, Loader=_YamlLoader), "override")
    except _YAML_ERRORS as error:
        raise ValueError(
            f"override: {key} is {value[:100]!r} but the value is no valid YAML: {_reason(error)}; "
            "quote it if it is text"
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error)


def _unknown(key: str, where: str) -> str:
    """Nearest by the whole dotted key or by its last part, whichever is closer: `lr` finds `optimizer.lr`."""

    def likeness(known: str) -> float:
        last = SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, key, known).ratio(), last * 0.99)

    candidates = list(known_keys()) if "." in key or where == "override" else [*Config.model_fields, *known_keys()]
    return f"{where}: unknown key {key!r}; the nearest known key is {max(candidates, key=likeness)!r}"


def _sentence(
    error: ValidationError, source: str, values: Mapping[str, Mapping[str, Any]], origins: Mapping[str, str]
) -> str:
    """The first problem as one sentence: where, which setting, what it is, what it should be."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    section, _, name = key.partition(".")
    if first["type"] == "missing" and key not in origins:
        return f"{source}: {key} is required ({known_keys()[key]}); set it in the file or as {key}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{source}: {f'in section {key}, ' if key else ''}{message}"
    if first["type"] == "missing":
        message = "it has too few entries"
    where = origins.get(key, source)
    return f"{where}: {key} is {values[section][name]!r} but {message[:1].lower()}{message[1:]}; correct the value"
