"""A card: what is verified of a model, data and a layout, with the figures that are expected.

One declaration each, checked as strictly as a config: see docs/evidence. A stage that is absent is not run.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mmfn.errors import UserError
from mmfn.parallel.mesh.layout import Layout
from mmfn.train.config.load import YamlLoader
from mmfn.train.config.section import ConfigSection, Patterns, Tuple

ONE_DEVICE = [f"layout.{size.name}=1" for size in fields(Layout)]  # whatever the layout of a card's config is
Precision = Literal["float64", "float32", "bfloat16"]


class Bound(ConfigSection):
    """What is expected of a figure; all that is given must hold."""

    at_most: float | None = Field(default=None, description="the largest value that passes")
    at_least: float | None = Field(default=None, description="the smallest value that passes")
    value: float | None = Field(default=None, description="what it is, up to `within`")
    within: Annotated[float, Field(ge=0)] = Field(default=0.0, description="how far from `value` it may be")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.at_most is self.at_least is self.value is None:
            raise UserError("it expects nothing; give at_most, at_least or value")
        if self.within and self.value is None:
            raise UserError("within has no effect without value; give value, or at_most and at_least")
        return self

    def holds(self, measured: float) -> bool:
        """Whether a value passes; one that is no number never does."""
        return (
            (self.at_most is None or measured <= self.at_most)
            and (self.at_least is None or measured >= self.at_least)
            and (self.value is None or abs(measured - self.value) <= self.within)
            and measured == measured
        )

    def __str__(self) -> str:
        value = None if self.value is None else f"{self.value:g}" + (f" +- {self.within:g}" if self.within else "")
        parts = {"at most ": self.at_most, "at least ": self.at_least}
        return ", ".join([*(f"{name}{n:g}" for name, n in parts.items() if n is not None), *([value] if value else [])])


class Stage(ConfigSection):
    """What all stages have. `FIGURES`: what one measures, and what that means."""

    FIGURES: ClassVar[Mapping[str, str]] = {}

    expect: Annotated[dict[str, Bound], Field(min_length=1)] = Field(description="what its figures must be")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.expect:
            if name not in self.FIGURES:
                near = get_close_matches(name, self.FIGURES, n=1, cutoff=0)[0]
                raise UserError(f"{name!r} is no figure of this stage; the nearest is {near!r}")
        return self


class ImportStage(Stage):
    """The checkpoint of `model.path` as mmfn and as transformers load it, on samples of `data.train`."""

    FIGURES: ClassVar[Mapping[str, str]] = {
        "logits": "largest difference of a logit from transformers', relative to the largest",
        "tokens_apart": "places whose most likely next token is another",
        "tokens": "places compared",
    }

    samples: PositiveInt = Field(
        default=4, description="how many samples, packed in mmfn and one by one in transformers"
    )
    dtype: Precision = Field(default="float64", description="of both; float64 also where transformers casts to float32")


class EqualityStage(Stage):
    """Steps of training on a mesh and on one device, from the same weights and data."""

    FIGURES: ClassVar[Mapping[str, str]] = {
        "loss": "largest relative difference of a step's loss from one device's",
        "grad_norm": "the same of the norm of its gradient",
        "params": "largest difference of a parameter behind the steps, relative to the largest of its leaf",
        "optimizer": "the same of the optimizer's state",
    }

    layout: dict[str, Any] = Field(description="settings of the section `layout` (docs/config.md), such as {dp: 2}")
    ranks: Literal["virtual", "processes"] = Field(
        default="virtual", description="ranks as threads of this process, or real ones that torchrun starts"
    )
    steps: PositiveInt = Field(default=2, description="steps of training")
    dtype: Precision = Field(default="float64", description="of parameters and compute")

    @property
    def name(self) -> str:
        """Of this one among others."""
        sizes = [f"{key} {value}" for key, value in self.layout.items()]
        return ", ".join([*sizes, "processes"] if self.ranks == "processes" else sizes)

    @property
    def settings(self) -> list[str]:
        """The layout as overrides of a config."""
        return [*ONE_DEVICE, *(f"layout.{key}={json.dumps(value)}" for key, value in self.layout.items())]


class TrainingStage(Stage):
    """`mmfn train` with the card's config, then its evaluation."""

    FIGURES: ClassVar[Mapping[str, str]] = {
        "loss": "of the last tenth of all steps, on average",
        "first_loss": "of the first step",
        "accuracy": "share of held-out questions that are answered right",
        "skipped": "steps that changed nothing, as loss or gradients were not finite",
        "tokens_per_s": "median over the steps",
    }


class ResumeStage(Stage):
    """`mmfn train`, killed by SIGKILL and started again with `checkpoint.resume=auto`, beside one that is not."""

    FIGURES: ClassVar[Mapping[str, str]] = {
        "weights_apart": "tensors of the exported checkpoints that are not the same bytes",
        "state_apart": "the same of the last training checkpoints: parameters, optimizer, guard",
        "steps_apart": "steps whose records differ, but for times and memory",
        "resumed_at": "step from which the killed run went on",
    }

    steps: PositiveInt = Field(description="train.steps of both")
    save_every: PositiveInt = Field(description="checkpoint.every of both")
    kill_at: PositiveInt = Field(description="step whose record is awaited before the kill")

    @model_validator(mode="after")
    def _check_kill(self) -> Self:
        if not self.save_every <= self.kill_at < self.steps:
            raise UserError(f"kill_at {self.kill_at} must be between save_every and steps; change it")
        if self.steps % self.save_every:
            raise UserError(f"save_every {self.save_every} must divide steps {self.steps}; change it")
        return self


class ExportStage(Stage):
    """The checkpoint that training has written, loaded again by mmfn and by transformers."""

    FIGURES: ClassVar[Mapping[str, str]] = {
        "tensors_apart": "tensors that are not the same bytes when loaded and saved once more",
        "answers_apart": "held-out answers of the loaded model that differ from those of the run",
        "loss_apart": "difference of the held-out loss of the two",
        "keys": "tensors that transformers misses, does not expect or finds of another shape",
        "logits": "largest difference of a logit from transformers', relative to the largest",
        "library_answers_apart": "greedy answers of transformers that differ from those of the run",
    }

    samples: PositiveInt = Field(default=8, description="held-out samples that transformers answers")
    dtype: Precision = Field(default="float64", description="of the logits")


class Card(ConfigSection):
    """All that a card says. `config` and `overrides`: the run, as `mmfn train CONFIG key=value ...` is given it."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    title: str = Field(description="family and layout")
    model: str = Field(description="which model, in words")
    data: str = Field(description="which data, in words")
    prepare: Patterns = Field(default=(), description="commands that write what is not there yet: python ..., mmfn ...")
    config: str = Field(description="YAML file of a run (docs/config.md)")
    overrides: Patterns = Field(default=(), description="settings that win over the file's: key=value")
    import_: ImportStage | None = Field(default=None, alias="import", description="weights from Hugging Face")
    equality: Annotated[tuple[EqualityStage, ...], Tuple] = Field(default=(), description="layouts and one device")
    training: TrainingStage | None = Field(default=None, description="what is learned")
    resume: ResumeStage | None = Field(default=None, description="a kill changes nothing")
    export: ExportStage | None = Field(default=None, description="what is written is what was trained")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.stages:
            raise UserError(f"it has no stage; give one of {', '.join(STAGES)}")
        return self

    @property
    def stages(self) -> dict[str, list[Stage]]:
        """The stages there are, by kind, in the order in which they run."""
        one = {"import": self.import_, "training": self.training, "resume": self.resume, "export": self.export}
        found = {name: [one[name]] if name in one else list(self.equality) for name in STAGES}
        return {name: [stage for stage in stages if stage] for name, stages in found.items() if any(stages)}


STAGES = ("import", "equality", "training", "resume", "export")


def read_card(path: str | Path) -> Card:
    """A card from its YAML file. Raises ValueError, one sentence, for whatever is wrong in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"cannot read card {str(path)!r}: {reason}; give the path of a YAML file") from error
    try:
        values, root = yaml.load(text, Loader=YamlLoader), yaml.compose(text, Loader=YamlLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}; correct it") from error
    try:
        return Card.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, str(path), root)) from error


def _sentence(error: ValidationError, path: str, root: yaml.Node | None) -> str:
    """The first problem as one sentence: file and line, key, what it is, what it should be."""
    first = error.errors(include_url=False)[0]
    key, where = ".".join(map(str, first["loc"])), f"{path}:{_line(root, first['loc'])}"
    if first["type"] == "missing":
        return f"{where}: {key} is required; give it"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; see docs/evidence/README.md for those there are"
    message = first["msg"].removeprefix("Value error, ")
    what = f"{key} is {first['input']!r} but " if first["type"] != "value_error" else f"{key}: " if key else ""
    return f"{where}: {what}{message[:1].lower()}{message[1:]}" + (
        "" if first["type"] == "value_error" else "; correct it"
    )


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """The line of the innermost part of the YAML that a place in the values names."""
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        else:
            rows = node.value if isinstance(node, yaml.SequenceNode) else []
            pair = (rows[part], rows[part]) if isinstance(part, int) and part < len(rows) else None
        if pair is None:
            return line
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
