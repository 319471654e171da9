"""What `mmfn suggest` chooses from: batches, layouts, what is computed again, what lies on the host.

A choice is a whole config and its plan. Choices are compared by the seconds that a real token takes over all ranks: a
larger batch hides more of what ranks send, a fuller one has fewer tokens that are padding.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil, gcd, prod
from typing import Any

from mmfn.errors import UserError
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning.plan import Plan, size
from mmfn.parallel.weights.sharding import sizes_over
from mmfn.spec import has_experts, num_params, num_trained
from mmfn.train.build.model import find_family, model_specs
from mmfn.train.config.load import Settings, check, load_section
from mmfn.train.config.schema import Config
from mmfn.train.planning.device_file import planned_device

ROOM = 0.9  # share of a device's memory that a plan may fill: the allocator rounds up, kernels have workspaces
FULL: Mapping[str, Any] = {"remat": "full"}
OFFLOADS: tuple[tuple[str, ...], ...] = (
    (),
    ("activations",),
    ("optimizer",),
    ("activations", "optimizer"),
    ("activations", "optimizer", "parameters"),
)
"""What may lie on the host, from what costs nothing to what costs most."""
CP: tuple[int, ...] = (1, 2, 4, 8, 16)
REMAT = {"remat_save", "remat_every", "remat_layers", "remat_stacks", "keep_gathered", "reshard_after_forward"}
"""Settings that not every remat suits."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The size of a batch: its tokens, inputs of each tower, and the share of its tokens that are real.

    `sample_tokens`: the mean of the data, by which steps of `data.batch_samples` are planned; None: not known.
    """

    tokens: int
    towers: Mapping[str, int] = field(default_factory=dict)
    fill: float = 1.0
    sample_tokens: float | None = None


class IdleError(UserError):
    """A setting that is given has no effect in a layout, but has one in a larger."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A config and its plan. `fill`: the share of a step's tokens that are real."""

    config: Config
    plan: Plan
    fill: float

    @property
    def fits(self) -> bool:
        """Whether it leaves the room on the device that a plan does not know of."""
        return self.plan.peak_bytes <= ROOM * self.plan.memory_bytes

    @property
    def token_s(self) -> float:
        """Seconds of all ranks together for one real token."""
        return self.plan.time.total_s / (self.plan.tokens * self.fill)

    @property
    def rank(self) -> tuple[bool, float, int]:
        """What the best choice has least of: first those that fit, then by time, then by memory."""
        return not self.fits, self.token_s, self.plan.peak_bytes

    def __str__(self) -> str:
        rate = self.config.layout.world / self.token_s
        how = [str(Layout(**self.plan.layout)), describe_memory(self.config)]
        return (
            f"step {self.plan.time.total_s:.3g} s, {rate:,.0f} tokens/s, {size(self.plan.peak_bytes)}: "
            f"{', '.join(how)}, batches of {self.config.data.token_buckets[-1]:,} tokens"
        )


def describe_memory(config: Config) -> str:
    """What of a config's layout saves memory, in words."""
    layout = config.layout
    saved = f" but {', '.join(layout.remat_save)}" if layout.remat == "selective" else ""
    offload = f", {' and '.join(layout.offload)} on the host" if layout.offload else ""
    released = ", whole weights released" if layout.reshard_after_forward else ""
    return f"remat {layout.remat}{saved}{released}{offload}"


def step_of(config: Config, budget: Budget) -> tuple[int | None, float]:
    """Micro-batches of a rank's step, and the share of their tokens that are real.

    `data.batch_samples` are those of all ranks, of which the `replicate * dp` with data of their own have a part each:
    8 samples of 50 tokens on 4 ranks are 100 of a batch's tokens with dp 4, 200 with dp 2 and cp 2. None where
    `data.batch_tokens` says how many micro-batches there are, or the length of samples is not known.
    """
    data, layout = config.data, config.layout
    if data.batch_samples is None or data.batch_tokens is not None or budget.sample_tokens is None:
        return None, budget.fill
    num_ranks, bucket = layout.replicate * layout.dp, data.token_buckets[-1]
    most = -(-data.batch_samples // num_ranks) * budget.sample_tokens  # of the ranks that have a sample more
    micro_batches = max(1, ceil(most / (bucket * budget.fill)))
    return micro_batches, data.batch_samples * budget.sample_tokens / (num_ranks * micro_batches * bucket)


@dataclass(frozen=True, kw_only=True)
class Space:
    """All that is chosen from, for a model on so many ranks of a device. `settings`: what is given, which is kept."""

    settings: Settings
    world: int
    device: str
    budgets: Sequence[Budget]

    def config(self, budget: Budget, layout: Mapping[str, Any]) -> Config:
        """The checked config of a batch and a layout; towers whose buckets are not given have the batch's. Raises
        ValueError for one that is refused, `IdleError` where that layout idles what is given."""
        towers = {name: [inputs] for name, inputs in budget.towers.items()}
        data = {
            "token_buckets": [budget.tokens],
            **self._data,
            "tower_buckets": {**towers, **self._data.get("tower_buckets", {})},
        }
        if not self._data.keys() & {"batch_tokens", "batch_samples"}:
            data["batch_tokens"] = data["token_buckets"][-1] * layout["replicate"] * layout["dp"]
        loaded = check(self.settings.having("layout", **{**layout, **self._layout}).having("data", **data))
        if loaded.notes:
            raise IdleError(loaded.notes[0])
        if loaded.config.layout.world != self.world:
            raise UserError(f"the layout has not {self.world} ranks")
        return loaded.config

    def layouts(self) -> Iterator[tuple[Budget, dict[str, Any]]]:
        """Batches and sizes of the mesh: copies of the model in a node, among nodes or everywhere, every ep, and where
        a batch can be divided among ranks, every cp that does it by heads. Sizes that are given are the only ones, and
        those they leave open may be any. Raises ValueError for a wrong value of the layout."""
        load_section("layout", self._layout, ())
        family, cfg = find_family(self._bare.model)
        specs = model_specs(self._bare, family, cfg)
        experts = gcd(*sizes_over(specs, "ep").values()) if has_experts(specs) else 1
        nodes = max(1, self.world // planned_device(self.device).ranks_per_node)
        given = self._layout
        is_open = not given.keys() & {"replicate", "dp"}
        numbers: Iterable[int] = sorted({1, nodes, self.world}) if is_open else range(1, self.world + 1)
        if "replicate" in given:
            numbers = (given["replicate"],)
        cps: Iterable[int] = CP
        if "cp" in given:
            cps = (given["cp"],)
        elif {"replicate", "dp"} <= given.keys():
            cps = (max(1, self.world // (given["replicate"] * given["dp"])),)
        kind = "usp" if given.get("ulysses", 1) > 1 else "ulysses"
        for budget, copies in product(self.budgets, numbers):
            shards = self.world // copies
            fits = not is_open or copies == 1 or self._state_fits(num_params(specs), num_trained(specs), shards)
            for cp, ep in product(cps, range(1, shards + 1)):
                sizes = {"replicate": copies, "dp": shards // cp, "cp": cp, "ep": ep}
                is_whole = self.world % copies == shards % cp == shards % ep == experts % ep == 0
                if fits and is_whole and all(given.get(k, n) == n for k, n in sizes.items()):
                    yield budget, {**sizes, **({"kind": kind} if cp > 1 else {})}

    def no_layout(self) -> str:
        """Why there are no layouts: which of the given sizes does not divide the ranks."""
        given = {name: self._layout[name] for name in ("replicate", "dp", "cp") if name in self._layout}
        sizes = " * ".join(f"layout.{name} {value}" for name, value in given.items())
        if self.world % prod(given.values()):
            return f"{sizes} does not divide them; change it or --world"
        if len(given) == 3 and prod(given.values()) != self.world:
            return f"{sizes} is {prod(given.values())}; change one of them or --world"
        ep = self._layout.get("ep", 1)
        return f"layout.ep {ep} must divide the ranks of a copy of the model and its experts; lower or remove it"

    def policies(self, layout: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What may be computed again, from nothing to all: what costs most for its memory is kept longest. Before
        anything is, whole weights are gathered again, where there are ranks to gather them from outside of graphs.
        Where settings of remat are given without it, those that suit them; where none does, those that only the layout
        idles."""
        if "remat" in self._layout:
            return [{}]
        family, cfg = find_family(self._bare.model)
        experts = ["experts"] if has_experts(family.specs(cfg)) else []
        exchange = ["exchange"] if layout["ep"] > 1 else []
        saves = [["attention", *exchange, *experts, "matmul"], ["attention", *exchange], ["attention"]]
        saves = saves if exchange else saves[:2]
        is_open = self.world > 1 and self.settings.values.get("train", {}).get("compile") != "step"
        released = [{"remat": "none", "reshard_after_forward": True}] if is_open else []
        kept = ({"remat": "selective", "remat_save": save} for save in saves)
        grouped = [{"remat": "block"}, {"remat": "uniform"}] if "remat_layers" in self._layout else []
        policies: list[Mapping[str, Any]] = [{"remat": "none"}, *released, *kept, *grouped, FULL]
        if not self._layout.keys() & REMAT:
            return policies
        reasons: list[tuple[Mapping[str, Any], UserError | None]] = []
        for policy in ({k: v for k, v in policy.items() if k not in self._layout} for policy in policies):
            if policy not in (other for other, _ in reasons):
                reasons.append((policy, self._refusal({**layout, **policy})))
        suiting = [policy for policy, reason in reasons if reason is None]
        return suiting or [policy for policy, reason in reasons if isinstance(reason, IdleError)] or policies

    def offloads(self) -> tuple[tuple[str, ...], ...]:
        """What may lie on the host."""
        given = self._layout.get("offload")
        return OFFLOADS if given is None else (tuple(given),)

    @property
    def _layout(self) -> Mapping[str, Any]:
        """Settings of the layout that are given."""
        return self.settings.values.get("layout", {})

    @property
    def _data(self) -> Mapping[str, Any]:
        """Settings of the data that are given."""
        return self.settings.values.get("data", {})

    @property
    def _bare(self) -> Config:
        """The config without a layout and what depends on batches, for what is asked of the model."""
        data = {name: value for name, value in self._data.items() if name not in ("max_tokens", "window_samples")}
        least = {"token_buckets": [1], "tower_buckets": {}, **data}
        values = {**self.settings.values, "layout": {}, "data": least}
        return check(replace(self.settings, values=values), is_plan=True).config

    def _refusal(self, layout: Mapping[str, Any]) -> UserError | None:
        """Why no batch can have a layout; None where one can."""
        refusals = []
        for budget in self.budgets:
            try:
                self.config(budget, layout)
            except UserError as error:
                refusals.append(error)
            else:
                return None
        return min(refusals, key=lambda error: not isinstance(error, IdleError))

    def _state_fits(self, params: int, trained: int, shards: int) -> bool:
        """Whether parameters, gradients and AdamW's state can lie on a device, cut into so many parts."""
        itemsize = 2 if self._bare.model.dtype == "bfloat16" else 4
        state = trained * (itemsize + 8 + (4 if itemsize == 2 else 0))
        return (params * itemsize + state) / shards < ROOM * planned_device(self.device).memory_bytes
