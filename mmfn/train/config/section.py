"""What all sections of a config are built from."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from mmfn.errors import UserError


def _increasing(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if list(sizes) != sorted(set(sizes)):
        raise UserError("the sizes must increase")
    return sizes


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise UserError("it names one thing twice")
    return names


def _in_order(window: tuple[int, int]) -> tuple[int, int]:
    if window[0] > window[1]:
        raise UserError("the first must not be above the last")
    return window


Tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has lists only
Different = AfterValidator(_different)
Buckets = Annotated[tuple[PositiveInt, ...], Tuple, Field(min_length=1), AfterValidator(_increasing)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Tuple]
Window = Annotated[tuple[PositiveInt, PositiveInt], Tuple, AfterValidator(_in_order)]
Patterns = Annotated[tuple[str, ...], Tuple]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


class ConfigSection(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    def is_changed(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)
