"""What settings mean to each other: one list of rules, each a row (settings, condition, sentence).

A setting that can never have an effect is refused, so that nobody believes in it. One that only a smaller layout idles
is said and goes on: a config for eight ranks can be tried on one with `layout.dp=1 layout.cp=1`. What a transform
itself refuses is asked of it (`asked`) and not said again here.
"""

import math
from collections.abc import Iterator

from mmfn.errors import UserError
from mmfn.parallel.context.token_order import token_multiple
from mmfn.parallel.program import check_one_graph
from mmfn.parallel.transforms.context_parallel import check_kind
from mmfn.parallel.transforms.data_parallel import check_weights
from mmfn.train.config.layout import RematStack
from mmfn.train.config.learning import LoraSection
from mmfn.train.config.rule import Breach, Rule, Stack, Subject, asked, idle, refused
from mmfn.train.config.schema import Config
from mmfn.train.config.sets import list_sets
from mmfn.train.dialect import check_dialect


def _is_alone(c: Config) -> bool:
    return c.layout.world == 1 and "parameters" not in c.layout.offload


def _is_unsharded(c: Config) -> bool:
    return c.layout.dp * c.layout.cp == 1


def _recomputes(c: Config) -> bool:
    return c.layout.remat_kinds != {"none"}


def _is_all_float32(c: Config) -> bool:
    rules = c.layout.compute_rules or {}
    return {c.layout.compute_dtype or c.model.dtype, *rules.values()} == {"float32"}


def _is_stateless(c: Config) -> bool:
    has_master = c.model.dtype == "bfloat16" and c.optimizer.master is not False
    return c.optimizer.kind == "sgd" and c.optimizer.momentum == 0 and c.optimizer.ema_decay is None and not has_master


def _is_on_accelerator(c: Config) -> bool:
    return not c.model.device.startswith("cpu")


def _is_of_any_device(c: Config) -> bool:
    return c.model.table in ("portable", "reference")


def _short_schedules(subject: Subject) -> Iterator[str]:
    config = subject.config
    shapes = {"schedule": config.schedule} | {f"schedule.groups {k!r}": v for k, v in config.schedule.groups.items()}
    for name, shape in shapes.items():
        steps = config.train.steps
        if steps is not None and shape.warmup_steps >= steps:
            yield f"{name}.warmup_steps {shape.warmup_steps} must be below train.steps {steps}; shorten it"


def _constant_schedules(subject: Subject) -> Iterator[str]:
    chosen = subject.config.schedule
    shapes = {"schedule": chosen} | {f"schedule.groups {k!r}": v for k, v in chosen.groups.items()}
    for name, shape in shapes.items():
        if shape.kind == "constant" and shape.is_changed("final_scale"):
            yield f"{name}.final_scale has no effect with kind 'constant'; remove it or choose linear or cosine"


def _data_sets(subject: Subject) -> Iterator[str]:
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


def _bucket_sizes(subject: Subject) -> Iterator[str]:
    if subject.is_plan:
        return
    layout = subject.config.layout
    least = token_multiple(layout.kind, layout.sizes) if layout.cp > 1 else 1
    if odd := [size for size in subject.config.data.token_buckets if size % least]:
        yield (
            f"data.token_buckets has {odd[0]} but layout.kind {layout.kind!r} with cp {layout.cp} needs multiples of "
            f"{least}; use {-(-odd[0] // least) * least}"
        )


def _batch_tokens(subject: Subject) -> Iterator[str]:
    data, layout = subject.config.data, subject.config.layout
    if subject.is_plan or data.batch_tokens is None:
        return
    num_ranks = layout.replicate * layout.dp
    least = data.token_buckets[-1] * num_ranks
    if data.batch_tokens % least:
        yield (
            f"data.batch_tokens is {data.batch_tokens} but must be a multiple of {least}, the largest token bucket "
            f"times {num_ranks} ranks with their own data; use {max(1, round(data.batch_tokens / least)) * least}"
        )


def _towers(subject: Subject) -> Iterator[str]:
    if subject.towers is None or subject.is_plan:
        return
    sizes, towers = subject.config.data.tower_buckets, ", ".join(subject.towers)
    for name in subject.towers:
        if name not in sizes:
            yield f"data.tower_buckets lacks sizes for the tower {name!r}; set data.tower_buckets={{{name}: [...]}}"
    for name in sizes:
        if name not in subject.towers:
            yield f"data.tower_buckets has {name!r} but the model's towers are {towers or 'none'}; use these"


def _remat_names(subject: Subject) -> Iterator[str]:
    if subject.stacks is None:
        return
    for name in subject.config.layout.remat_stacks:
        if name not in subject.stacks:
            yield f"layout.remat_stacks has {name!r} but the model's stacks are {', '.join(subject.stacks)}; use these"


def _policies(subject: Subject) -> Iterator[tuple[str, RematStack, list[Stack]]]:
    """How stacks are computed again: how its settings are spelt, the policy, and the stacks it is for, if known."""
    layout, stacks = subject.config.layout, subject.stacks or {}
    yield "layout.remat_{}", layout.remat_of(""), [s for name, s in stacks.items() if name not in layout.remat_stacks]
    for name, policy in layout.remat_stacks.items():
        yield f"layout.remat_stacks: {name}.{{}}", policy, [stacks[name]] if name in stacks else []


def _idle_policies(subject: Subject) -> Iterator[str]:
    for spelling, policy, _ in _policies(subject):
        for name, kinds in POLICY_KINDS.items():
            if policy.is_changed(name) and policy.kind not in kinds:
                yield f"{spelling.format(name)} has no effect with remat {policy.kind!r}; remove it or change that"


def _deep_policies(subject: Subject) -> Iterator[str]:
    for spelling, policy, stacks in _policies(subject):
        depth = max((stack.depth for stack in stacks), default=0)
        for name in ("every", "layers"):
            value = getattr(policy, name)
            if depth and policy.is_changed(name) and value > depth:
                yield (
                    f"{spelling.format(name)} is {value} but more than the {depth} layers there are has no effect; use "
                    f"at most {depth}"
                )


def _saved_experts(subject: Subject) -> Iterator[str]:
    for spelling, policy, stacks in _policies(subject):
        saved = [op for op in EXPERT_OPS if op in policy.save]
        if saved and stacks and not any(stack.has_experts for stack in stacks):
            yield f"{spelling.format('save')} {saved[0]!r} has no effect, there are no experts; remove it"


def _saved_exchange(subject: Subject) -> Iterator[str]:
    for spelling, policy, _ in _policies(subject):
        if "exchange" in policy.save and subject.config.layout.ep == 1:
            yield f"{spelling.format('save')} 'exchange' has no effect with ep 1; remove it or change that"


def _expert_settings(subject: Subject) -> Iterator[str]:
    c = subject.config
    if not subject.has_experts and c.is_changed("output.experts"):
        yield f"output.experts {c.output.experts!r} has no effect, the model has no experts; remove it"


def _capacity(subject: Subject) -> Iterator[str]:
    if not subject.has_experts and subject.config.layout.capacity is not None:
        yield "layout.capacity has no effect, the model has no experts; remove it"


def _sound_settings(subject: Subject) -> Iterator[str]:
    if subject.hears is False and subject.config.is_changed("data.max_audio_seconds"):
        yield "data.max_audio_seconds has no effect, the model hears nothing; remove it"


def _router_settings(subject: Subject) -> Iterator[str]:
    if not subject.has_experts and subject.config.objective.router_aux_coef is not None:
        yield "objective.router_aux_coef has no effect, the model has no experts; remove it"


def _ahead_settings(subject: Subject) -> Iterator[str]:
    if subject.num_ahead == 0 and subject.config.objective.ahead_weight is not None:
        yield "objective.ahead_weight has no effect, the model predicts no token further ahead; remove it"


POLICY_KINDS = {"save": ("selective",), "every": ("full", "selective"), "layers": ("uniform", "block")}
EXPERT_OPS = ("experts", "exchange")  # of those that selective remat can keep
IN_GRAPHS = "with train.compile {c.train.compile!r} and remat {c.layout.remat!r}, whose graphs gather"

RULES = (
    # sizes first: others ask for them
    asked("layout.dp layout.cp layout.ulysses layout.ep", lambda c: c.layout.sizes),
    asked(
        "layout.kind layout.cp layout.ulysses",
        lambda c: check_kind(c.layout.kind, c.layout.sizes) if c.layout.cp > 1 else None,
    ),
    # what a smaller layout idles
    idle("layout.kind", lambda c: c.layout.cp == 1, "with cp 1", warns=True),
    idle("layout.capacity", lambda c: c.layout.ep == 1, "with ep 1", warns=True),
    idle("layout.head", _is_unsharded, "with dp 1 and cp 1", warns=True),
    idle(
        "layout.prefetch",
        lambda c: _is_unsharded(c) and "parameters" not in c.layout.offload,
        "with dp 1 and cp 1, parameters on the device",
        warns=True,
    ),
    idle("layout.keep_gathered", _is_alone, "on one rank with parameters on the device", warns=True),
    idle("layout.reshard_after_forward", _is_alone, "on one rank with parameters on the device", warns=True),
    idle("layout.sums_under_way", lambda c: c.layout.world == 1, "with one rank", warns=True),
    idle("layout.reduce_dtype", lambda c: c.layout.world == 1, "with one rank", warns=True),
    idle("layout.timeout_s", lambda c: c.layout.world == 1, "with one rank", warns=True),
    Rule(settings=("layout.remat_save", "layout.ep"), find=_saved_exchange, warns=True),
    # layout
    idle("layout.ulysses", lambda c: c.layout.kind != "usp", "with kind {c.layout.kind!r}"),
    idle("layout.keep_gathered", lambda c: not _recomputes(c), "with remat 'none'"),
    asked(
        "layout.keep_gathered layout.reshard_after_forward",
        lambda c: check_weights(
            keep_gathered=c.layout.keep_gathered, reshard_after_forward=c.layout.reshard_after_forward
        ),
    ),
    idle("layout.reshard_after_forward", lambda c: c.layout.recomputes_all, "where remat computes all layers again"),
    idle("layout.reshard_after_forward", lambda c: c.gathers_in_graphs, IN_GRAPHS),
    idle("layout.prefetch", lambda c: c.gathers_in_graphs, IN_GRAPHS),
    idle("layout.sums_under_way", lambda c: c.gathers_in_graphs, IN_GRAPHS),
    Rule(settings=("layout.remat_save", "layout.remat_every", "layout.remat_layers"), find=_idle_policies),
    Rule(settings=("layout.remat_every", "layout.remat_layers"), find=_deep_policies),
    Rule(settings=("layout.remat_save",), find=_saved_experts),
    Rule(settings=("layout.remat_stacks",), find=_remat_names),
    asked(
        "layout.head layout.offload train.compile",
        lambda c: check_one_graph(c.train.compile, is_head_sharded=c.layout.head == "sharded", moved=c.layout.offload),
    ),
    refused(
        "layout.capacity data.token_buckets",
        lambda c: c.layout.capacity is not None and c.layout.ep > 1 and len(c.data.token_buckets) > 1,
        "layout.capacity needs batches of one size on all ranks, but data.token_buckets are "
        "{c.data.token_buckets}; keep the largest",
    ),
    # dtypes
    idle("layout.compute_dtype", lambda c: c.layout.compute_dtype == c.model.dtype, "beside an equal model.dtype"),
    idle("layout.compute_rules", _is_all_float32, "where all is computed in float32"),
    idle(
        "layout.reduce_dtype",
        lambda c: _is_all_float32(c) and c.layout.reduce_dtype == "float32",
        "where all is computed in float32",
    ),
    idle("optimizer.master", lambda c: c.model.dtype == "float32", "with model.dtype 'float32'"),
    # data
    asked(
        "data.format data.columns data.tags data.ignore",
        lambda c: check_dialect(c.data.dialect),
    ),
    *(
        idle(f"checkpoint.{name}", lambda c: c.checkpoint.every is None, "without checkpoint.every")
        for name in ("asynchronous", "read_back", "keep_last", "keep_every", "keep_best", "save_optimizer")
    ),
    *(
        idle(
            f"checkpoint.{name}",
            lambda c: c.checkpoint.resume in ("auto", "none"),
            "without a path in checkpoint.resume: a run that goes on in its own folder goes on with all of its state",
        )
        for name in ("load_optimizer", "load_cursor")
    ),
    idle("checkpoint.keep_best", lambda c: c.eval.every is None, "without eval.every"),
    refused(
        "data.max_tokens data.token_buckets",
        lambda c: c.data.max_tokens is not None and c.data.max_tokens > c.data.token_buckets[-1],
        "data.max_tokens {c.data.max_tokens} is above the largest token bucket of {c.data.token_buckets}; lower it",
    ),
    refused(
        "data.batch_samples data.batch_tokens",
        lambda c: c.data.batch_tokens is not None and c.is_changed("data.batch_samples"),
        "data.batch_samples and data.batch_tokens are both set; remove one of them",
    ),
    idle("data.window_samples", lambda c: c.data.batch_tokens is None, "without data.batch_tokens"),
    *(
        idle(f"data.{name}", lambda c: c.data.train_on_prompt, "with data.train_on_prompt")
        for name in ("mask_history", "train_empty_thinking")
    ),
    Rule(settings=("data.train", "data.eval", "data.max_samples"), find=_data_sets),
    idle("data.ahead", lambda c: c.data.workers == 0, "with workers 0"),
    idle("data.worker_kind", lambda c: c.data.workers == 0, "with workers 0"),
    Rule(settings=("data.batch_tokens", "data.token_buckets"), find=_batch_tokens),
    Rule(settings=("data.token_buckets", "layout.kind", "layout.cp"), find=_bucket_sizes),
    Rule(settings=("data.tower_buckets",), find=_towers),
    *(
        idle(setting, lambda c: c.data.eval is None, "without data.eval")
        for setting in (
            *("eval.every", "eval.batch_samples", "eval.max_new_tokens"),
            "output.report_images",
        )
    ),
    idle("eval.prompts", lambda c: c.eval.every is None, "without eval.every"),
    idle(
        "eval.every",
        lambda c: c.train.steps is not None and (c.eval.every or 0) > c.train.steps,
        "in {c.train.steps} steps",
    ),
    idle(
        "output.export_every",
        lambda c: c.train.steps is not None and (c.output.export_every or 0) >= c.train.steps,
        "in {c.train.steps} steps, behind which the run is saved",
    ),
    # objective, optimizer, schedule
    refused(
        "objective.chunk_size objective.total_chunk_size",
        lambda c: None not in (c.objective.chunk_size, c.objective.total_chunk_size),
        "objective.chunk_size and objective.total_chunk_size are both set; remove one of them",
    ),
    *(
        idle(f"optimizer.{name}", lambda c: c.optimizer.kind == "sgd", "with kind 'sgd'")
        for name in ("betas", "eps", "moments_dtype")
    ),
    *(
        idle(f"optimizer.{name}", lambda c: c.optimizer.kind == "adamw", "with kind 'adamw'")
        for name in ("momentum", "nesterov")
    ),
    *(
        idle(f"optimizer.{name}", lambda c: c.optimizer.kind != "muon", "with kind {c.optimizer.kind!r}")
        for name in ("adjust_lr", "muon_dtype")
    ),
    refused(
        "optimizer.nesterov optimizer.momentum",
        lambda c: c.optimizer.kind != "adamw" and c.optimizer.nesterov and c.optimizer.momentum == 0,
        "optimizer.nesterov has no effect with momentum 0; set it to false",
    ),
    idle("optimizer.no_decay", lambda c: c.optimizer.weight_decay == 0, "with weight_decay 0"),
    refused(
        "layout.offload optimizer.kind",
        lambda c: "optimizer" in c.layout.offload and _is_stateless(c),
        "layout.offload 'optimizer' has no effect: sgd without momentum keeps nothing beside the parameters; remove it",
    ),
    refused(
        "output.weights optimizer.ema_decay",
        lambda c: c.output.weights == "ema" and c.optimizer.ema_decay is None,
        "output.weights 'ema' needs averages; set optimizer.ema_decay or remove it",
    ),
    idle("optimizer.ema_decay", lambda c: c.output.weights == "last", "with output.weights 'last'"),
    refused(
        "train.steps train.epochs",
        lambda c: (c.train.steps is None) == (c.train.epochs is None),
        "train.steps and train.epochs: one of the two says how long the run is, and the other follows; set one",
    ),
    refused(
        "train.profile train.steps",
        lambda c: c.train.profile is not None and c.train.profile[1] > (c.train.steps or math.inf),
        "train.profile ends with step {c.train.profile[1]} but train.steps is {c.train.steps}; end it earlier",
    ),
    Rule(settings=("schedule.warmup_steps", "schedule.groups", "train.steps"), find=_short_schedules),
    Rule(settings=("schedule.final_scale", "schedule.groups", "schedule.kind"), find=_constant_schedules),
    idle("train.spike_factor", lambda c: c.train.spike_window == 0, "with spike_window 0"),
    refused(
        "train.spike_window train.steps",
        lambda c: c.train.steps is not None and c.train.spike_window >= 2 * c.train.steps,
        "train.spike_window {c.train.spike_window} has no effect in {c.train.steps} steps: nothing is a spike before "
        "half of it is filled; lower it",
    ),
    # adapters
    *(
        idle(f"lora.{name}", lambda c: c.lora.rank is None, "without rank")
        for name in LoraSection.model_fields
        if name != "rank"
    ),
    refused(
        "lora.rank model.adapter",
        lambda c: None not in (c.lora.rank, c.model.adapter),
        "lora has no effect with model.adapter, which says what is adapted; remove one of them",
    ),
    idle("output.adapter", lambda c: not c.has_adapters, "without LoRA"),
    refused(
        "output.adapter model.init",
        lambda c: c.has_adapters and c.model.init == "random" and c.output.adapter == "separate",
        "output.adapter 'separate' saves nowhere the base that model.init 'random' draws; choose merged or both",
    ),
    # the model's kind and the device
    refused(
        "model.kernels model.device",
        lambda c: not _is_of_any_device(c) and c.model.device.partition(":")[0] != c.model.table,
        "model.kernels {c.model.kernels!r} are those of a device that model.device {c.model.device!r} is not; use "
        "model.kernels=portable, or model.device={c.model.kernels}",
        runs=True,
    ),
    Rule(settings=("output.experts",), find=_expert_settings),
    Rule(settings=("layout.capacity",), find=_capacity),
    Rule(settings=("data.max_audio_seconds",), find=_sound_settings),
    Rule(settings=("objective.router_aux_coef",), find=_router_settings),
    Rule(settings=("objective.ahead_weight",), find=_ahead_settings),
    refused(
        "train.compile model.device model.kernels",
        lambda c: c.train.compile != "none" and _is_on_accelerator(c) and c.model.table != "cuda",
        "train.compile {c.train.compile!r} needs attention that is one operator, as it is on a CPU and of the kernels "
        "'cuda', not of {c.model.table!r} on {c.model.device}; use train.compile=none",
        runs=True,
    ),
    refused(
        "layout.kind model.device model.kernels",
        lambda c: c.layout.cp > 1 and c.layout.kind != "ulysses" and _is_on_accelerator(c) and _is_of_any_device(c),
        "layout.kind {c.layout.kind!r} needs attention blocks with log-sum-exp, which model.kernels "
        "{c.model.table!r} has on the CPU only; use the kernels of {c.model.device}, or layout.kind=ulysses",
        runs=True,
    ),
)
"""All rules between settings. Conditions are functions of the config; sentences say what to do."""


def breaches(subject: Subject) -> Iterator[Breach]:
    """All breaches, in the order of the list."""
    for rule in RULES:
        for sentence in rule.find(subject):
            yield Breach(setting=rule.settings[0], sentence=sentence, warns=rule.warns)
