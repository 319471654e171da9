"""How a program is laid out over ranks: the section `layout` of a config."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.weights.gradient_sums import MOST_UNDER_WAY
from mmfn.train.config.section import ConfigSection, Different, Dtype, Patterns, Tuple

Remat = Literal["none", "full", "selective", "uniform", "block"]


class RematStack(ConfigSection):
    """What is computed again of one stack: the settings `remat`, `remat_save`, ... for it alone."""

    kind: Remat = Field(description="all blocks; all but some ops; in groups; the first ones")
    save: Patterns = Field(default=("attention",), description="ops whose results selective remat keeps")
    every: PositiveInt = Field(default=1, description="of so many layers one is computed again")
    layers: PositiveInt = Field(default=1, description="layers in a group (uniform), or first layers (block)")


class LayoutSection(ConfigSection):
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
    fused_exchange: bool = Field(
        default=False, description="exchange rows of experts by NPU operators that multiply them too (docs/npu.md)"
    )
    prefetch: bool = Field(default=True, description="gather the next layer's parameters while one computes")
    keep_gathered: bool = Field(default=False, description="keep gathered parameters for the backward under remat")
    reshard_after_forward: bool = Field(
        default=False,
        description="release gathered parameters behind the forward, and gather them again, without remat",
    )
    sums_under_way: NonNegativeInt = Field(
        default=MOST_UNDER_WAY, description="sums of layers' gradients that run beside the backward at once; 0: none"
    )
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
    remat_stacks: dict[str, RematStack] = Field(
        default={}, description="stacks {kind, save, every, layers} that differ, by name: {vision: {kind: full}}"
    )
    offload: Annotated[tuple[Literal["activations", "optimizer", "parameters"], ...], Tuple, Different] = Field(
        default=(), description="what lies in the host's memory while the device does not need it"
    )
    compute_dtype: Dtype | None = Field(
        default=None, description="dtype parameters are gathered and used in; null: model.dtype"
    )
    compute_rules: dict[str, Dtype] | None = Field(
        default=None,
        description="dtypes by regex over paths; null: with bfloat16, routers and norms are float32",
    )
    reduce_dtype: Dtype | None = Field(
        default=None, description="dtype gradients are summed in over ranks; null: float32"
    )
    timeout_s: PositiveInt = Field(default=1800, description="a rank that does not answer for so long ends the run")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.replicate * self.dp * self.cp

    @property
    def sizes(self) -> Layout:
        """The sizes of the mesh. Raises ValueError for sizes that do not fit together."""
        ulysses = {"ulysses": self.cp, "usp": self.ulysses}.get(self.kind, 1) if self.cp > 1 else 1
        return Layout(replicate=self.replicate, dp=self.dp, cp=self.cp, ulysses=ulysses, ep=self.ep)

    @property
    def remat_kinds(self) -> set[str]:
        """What is computed again, over all stacks."""
        return {self.remat, *(stack.kind for stack in self.remat_stacks.values())}

    @property
    def recomputes_all(self) -> bool:
        """Whether every block of every stack is computed again."""
        policies = self.remat_of(""), *self.remat_stacks.values()
        return all(p.every == 1 and p.kind in ("full", "selective", "uniform") for p in policies)

    def remat_of(self, stack: str) -> RematStack:
        """What is computed again of a stack."""
        every, layers = self.remat_every, self.remat_layers
        default = RematStack(kind=self.remat, save=self.remat_save, every=every, layers=layers)
        return self.remat_stacks.get(stack, default)
