"""Conditions of rules that take more than a line: of a config, or of all that is known of a run, with sentences."""

from collections.abc import Iterator

from mmfn.errors import UserError, spell_count
from mmfn.ops.packages import PACKAGES
from mmfn.parallel.context.token_order import token_multiple
from mmfn.train.config.layout import RematStack
from mmfn.train.config.rule import Stack, Subject
from mmfn.train.config.schema import Config
from mmfn.train.config.sets import list_sets
from mmfn.train.dialect import check_dialect

POLICY_KINDS = {"save": ("selective",), "every": ("full", "selective"), "layers": ("uniform", "block")}
RECURRENT_OPS = ("gated_delta", "causal_conv1d")  # how the names of ops of recurrent layers begin
EXPERT_OPS = ("experts", "exchange")  # of those that selective remat can keep


def is_alone(c: Config) -> bool:
    """One rank, whose parameters are on the device: nothing is gathered."""
    return c.layout.world == 1 and "parameters" not in c.layout.offload


def is_unsharded(c: Config) -> bool:
    """No parameter is cut over ranks."""
    return c.layout.dp * c.layout.cp == 1


def recomputes(c: Config) -> bool:
    """Some stack is computed again."""
    return c.layout.remat_kinds != {"none"}


def is_all_float32(c: Config) -> bool:
    """No leaf is computed in a narrower dtype."""
    rules = c.layout.compute_rules or {}
    return {c.layout.compute_dtype or c.model.dtype, *rules.values()} == {"float32"}


def is_stateless(c: Config) -> bool:
    """The optimizer keeps nothing beside the parameters."""
    has_master = c.model.dtype == "bfloat16" and c.optimizer.master is not False
    return c.optimizer.kind == "sgd" and c.optimizer.momentum == 0 and c.optimizer.ema_decay is None and not has_master


def is_on_accelerator(c: Config) -> bool:
    """The device is none of the CPU's."""
    return not c.model.device.startswith("cpu")


def is_of_any_device(c: Config) -> bool:
    """The table is one that every device has."""
    return c.model.table in ("portable", "reference")


def is_by_package(c: Config, op: str) -> bool:
    """Whether `op` is a kernel of an installed package."""
    return any(op in PACKAGES[name].kernels() for name in c.model.kernel_packages)


def kernel_packages(subject: Subject) -> Iterator[str]:
    """Packages without kernels for the device."""
    section = subject.config.model
    for name in section.kernel_packages:
        kinds = tuple(PACKAGES[name].needs)
        if section.kind not in kinds and not subject.is_plan:
            yield (
                f"model.kernel_packages {name!r} has kernels for {' and '.join(kinds)}, not for model.device "
                f"{section.device!r}; remove it, or use model.device={kinds[0]}"
            )


def idle_packages(subject: Subject) -> Iterator[str]:
    """Packages whose kernels are all of recurrent layers, where there are none."""
    for name in subject.config.model.kernel_packages if subject.is_recurrent is False else ():
        if all(op.startswith(RECURRENT_OPS) for op in PACKAGES[name].kernels()):
            yield (
                f"model.kernel_packages {name!r} has no effect, its kernels are of recurrent layers and the model has "
                "none; remove it"
            )


def short_schedules(subject: Subject) -> Iterator[str]:
    """Schedules that end before they have warmed up."""
    config = subject.config
    shapes = {"schedule": config.schedule} | {f"schedule.groups {k!r}": v for k, v in config.schedule.groups.items()}
    for name, shape in shapes.items():
        steps = config.train.steps
        if steps is not None and shape.warmup_steps >= steps:
            yield f"{name}.warmup_steps {shape.warmup_steps} must be below train.steps {steps}; shorten it"


def constant_schedules(subject: Subject) -> Iterator[str]:
    """Constant schedules that are told where to end."""
    chosen = subject.config.schedule
    shapes = {"schedule": chosen} | {f"schedule.groups {k!r}": v for k, v in chosen.groups.items()}
    for name, shape in shapes.items():
        if shape.kind == "constant" and shape.is_changed("final_scale"):
            yield f"{name}.final_scale has no effect with kind 'constant'; remove it or choose linear or cosine"


def data_sets(subject: Subject) -> Iterator[str]:
    """Weights, columns and dialects of data sets that mean nothing, or not to all."""
    data = subject.config.data
    for name, sets in (("data.train", list_sets(data.train)), ("data.eval", list_sets(data.eval))):
        weights = [one.path for one in sets if one.weight is not None]
        if weights and name == "data.eval":
            yield f"data.eval has a weight for {weights[0]!r} but every held-out sample is used once; remove it"
        elif weights and len(sets) == 1:
            yield f"{name}: a weight has no effect on one data set alone; remove it"
        elif weights and len(weights) < len(sets):
            yield f"{name} has a weight for {weights[0]!r} but not for all data sets; give one to each or to none"
        for one in sets:
            if one.format is None and (one.columns or one.tags):
                yield f"{name}: columns and tags of {one.path!r} need its format; set it beside them"
            try:
                check_dialect(data.dialect_of(one))
            except UserError as error:
                if one.format is not None:
                    yield f"{name}: {one.path!r}: {error}"
    if data.max_samples is not None and not isinstance(data.train, str):
        yield "data.max_samples is for a data.train of one path; write it beside the path of each data set"


def bucket_sizes(subject: Subject) -> Iterator[str]:
    """Buckets that the ranks of cp cannot share."""
    if subject.is_plan:
        return
    layout = subject.config.layout
    least = token_multiple(layout.kind, layout.sizes) if layout.cp > 1 else 1
    if odd := [size for size in subject.config.data.token_buckets if size % least]:
        yield (
            f"data.token_buckets has {odd[0]} but layout.kind {layout.kind!r} with cp {layout.cp} needs multiples of "
            f"{least}; use {-(-odd[0] // least) * least}"
        )


def batch_tokens(subject: Subject) -> Iterator[str]:
    """Batches that ranks cannot share evenly."""
    data, layout = subject.config.data, subject.config.layout
    if subject.is_plan or data.batch_tokens is None:
        return
    num_ranks = layout.replicate * layout.dp
    least = data.token_buckets[-1] * num_ranks
    of_ranks = f" times {num_ranks} ranks with their own data" if num_ranks > 1 else ""
    if data.batch_tokens % least:
        yield (
            f"data.batch_tokens is {data.batch_tokens} but must be a multiple of {least}, the largest token bucket"
            f"{of_ranks}; use {max(1, round(data.batch_tokens / least)) * least}"
        )


def towers(subject: Subject) -> Iterator[str]:
    """Buckets for towers that the model lacks, and towers without."""
    if subject.towers is None or subject.is_plan:
        return
    sizes, towers = subject.config.data.tower_buckets, ", ".join(subject.towers)
    for name in subject.towers:
        if name not in sizes:
            yield f"data.tower_buckets lacks sizes for the tower {name!r}; set data.tower_buckets={{{name}: [...]}}"
    for name in sizes:
        if name not in subject.towers:
            yield f"data.tower_buckets has {name!r} but the model's towers are {towers or 'none'}; use these"


def remat_names(subject: Subject) -> Iterator[str]:
    """Policies for stacks that the model lacks."""
    if subject.stacks is None:
        return
    for name in subject.config.layout.remat_stacks:
        if name not in subject.stacks:
            yield f"layout.remat_stacks has {name!r} but the model's stacks are {', '.join(subject.stacks)}; use these"


def policies(subject: Subject) -> Iterator[tuple[str, RematStack, list[Stack]]]:
    """How stacks are computed again: how its settings are spelt, the policy, and the stacks it is for, if known."""
    layout, stacks = subject.config.layout, subject.stacks or {}
    yield "layout.remat_{}", layout.remat_of(""), [s for name, s in stacks.items() if name not in layout.remat_stacks]
    for name, policy in layout.remat_stacks.items():
        yield f"layout.remat_stacks: {name}.{{}}", policy, [stacks[name]] if name in stacks else []


def idle_policies(subject: Subject) -> Iterator[str]:
    """Settings of remat that its kind does not read."""
    for spelling, policy, _ in policies(subject):
        for name, kinds in POLICY_KINDS.items():
            if policy.is_changed(name) and policy.kind not in kinds:
                yield f"{spelling.format(name)} has no effect with remat {policy.kind!r}; remove it or change that"


def deep_policies(subject: Subject) -> Iterator[str]:
    """Settings of remat beyond the depth of the stacks."""
    for spelling, policy, stacks in policies(subject):
        depth = max((stack.depth for stack in stacks), default=0)
        for name in ("every", "layers"):
            value = getattr(policy, name)
            if depth and policy.is_changed(name) and value > depth:
                yield (
                    f"{spelling.format(name)} is {value} but has no effect above the {spell_count(depth, 'layer')} of "
                    f"the deepest stack; use at most {depth}"
                )


def saved_experts(subject: Subject) -> Iterator[str]:
    """Ops of experts to keep where there are none."""
    for spelling, policy, stacks in policies(subject):
        saved = [op for op in EXPERT_OPS if op in policy.save]
        if saved and stacks and not any(stack.has_experts for stack in stacks):
            yield f"{spelling.format('save')} {saved[0]!r} has no effect, there are no experts; remove it"


def saved_exchange(subject: Subject) -> Iterator[str]:
    """The exchange to keep where there is none."""
    for spelling, policy, _ in policies(subject):
        if "exchange" in policy.save and subject.config.layout.ep == 1:
            yield f"{spelling.format('save')} 'exchange' has no effect with ep 1; remove it or change that"


def expert_settings(subject: Subject) -> Iterator[str]:
    """How experts are written where there are none."""
    c = subject.config
    if not subject.has_experts and c.is_changed("output.experts"):
        yield f"output.experts {c.output.experts!r} has no effect, the model has no experts; remove it"


def capacity(subject: Subject) -> Iterator[str]:
    """Room for experts where there are none."""
    if not subject.has_experts and subject.config.layout.capacity is not None:
        yield "layout.capacity has no effect, the model has no experts; remove it"


def fused_exchange(subject: Subject) -> Iterator[str]:
    """The exchange of experts where there are none."""
    if not subject.has_experts and subject.config.layout.fused_exchange:
        yield "layout.fused_exchange has no effect, the model has no experts; remove it"


def sound_settings(subject: Subject) -> Iterator[str]:
    """A limit of sound for a model that hears none."""
    if subject.hears is False and subject.config.is_changed("data.max_audio_seconds"):
        yield "data.max_audio_seconds has no effect, the model hears nothing; remove it"


def router_settings(subject: Subject) -> Iterator[str]:
    """A loss of routers where there are none."""
    if not subject.has_experts and subject.config.objective.router_aux_coef is not None:
        yield "objective.router_aux_coef has no effect, the model has no experts; remove it"


def ahead_settings(subject: Subject) -> Iterator[str]:
    """A loss of further tokens where none are predicted."""
    if subject.num_ahead == 0 and subject.config.objective.ahead_weight is not None:
        yield "objective.ahead_weight has no effect, the model predicts no token further ahead; remove it"
