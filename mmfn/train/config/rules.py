"""What settings mean to each other: one list of rules, each a row (settings, condition, sentence).

A setting that can never have an effect is refused, so that nobody believes in it. One that only a smaller layout idles
is said and goes on: a config for eight ranks can be tried on one with `layout.dp=1 layout.cp=1`. What a transform
itself refuses is asked of it (`asked`) and not said again here.
"""

from collections.abc import Iterator

from mmfn.parallel.context.token_order import token_multiple
from mmfn.parallel.program import check_one_graph
from mmfn.parallel.transforms.context_parallel import check_kind
from mmfn.train.config.layout import RematStack
from mmfn.train.config.learning import LoraSection
from mmfn.train.config.rule import Breach, Rule, Stack, Subject, asked, idle, refused
from mmfn.train.config.schema import Config
from mmfn.train.dialect import check_dialect


def _is_alone(c: Config) -> bool:
    return c.layout.world == 1 and "parameters" not in c.layout.offload


def _is_unsharded(c: Config) -> bool:
    return c.layout.dp * c.layout.cp == 1


def _recomputes(c: Config) -> bool:
    kinds = {c.layout.remat, *(stack.kind for stack in c.layout.remat_stacks.values())}
    return kinds != {"none"}


def _is_all_float32(c: Config) -> bool:
    rules = c.layout.compute_rules or {}
    return {c.layout.compute_dtype or c.model.dtype, *rules.values()} == {"float32"}


def _is_on_accelerator(c: Config) -> bool:
    return not c.model.device.startswith("cpu")


def _short_schedules(subject: Subject) -> Iterator[str]:
    config = subject.config
    shapes = {"schedule": config.schedule} | {f"schedule.groups {k!r}": v for k, v in config.schedule.groups.items()}
    for name, shape in shapes.items():
        if shape.warmup_steps >= config.train.steps:
            steps = config.train.steps
            yield f"{name}.warmup_steps {shape.warmup_steps} must be below train.steps {steps}; shorten it"


def _constant_schedules(subject: Subject) -> Iterator[str]:
    chosen = subject.config.schedule
    shapes = {"schedule": chosen} | {f"schedule.groups {k!r}": v for k, v in chosen.groups.items()}
    for name, shape in shapes.items():
        if shape.kind == "constant" and shape.is_changed("final_scale"):
            yield f"{name}.final_scale has no effect with kind 'constant'; remove it or choose linear or cosine"


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


def _router_settings(subject: Subject) -> Iterator[str]:
    if not subject.has_experts and subject.config.objective.router_aux_coef is not None:
        yield "objective.router_aux_coef has no effect, the model has no experts; remove it"


def _ahead_settings(subject: Subject) -> Iterator[str]:
    if subject.num_ahead == 0 and subject.config.objective.ahead_weight is not None:
        yield "objective.ahead_weight has no effect, the model predicts no token further ahead; remove it"


POLICY_KINDS = {"save": ("selective",), "every": ("full", "selective"), "layers": ("uniform", "block")}
EXPERT_OPS = ("experts", "exchange")  # of those that selective remat can keep

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
    idle("layout.reduce_dtype", lambda c: c.layout.world == 1, "with one rank", warns=True),
    idle("layout.timeout_s", lambda c: c.layout.world == 1, "with one rank", warns=True),
    Rule(settings=("layout.remat_save", "layout.ep"), find=_saved_exchange, warns=True),
    # layout
    idle("layout.ulysses", lambda c: c.layout.kind != "usp", "with kind {c.layout.kind!r}"),
    idle("layout.keep_gathered", lambda c: not _recomputes(c), "with remat 'none'"),
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
    refused(
        "data.max_tokens data.token_buckets",
        lambda c: c.data.max_tokens is not None and c.data.max_tokens > c.data.token_buckets[-1],
        "data.max_tokens {c.data.max_tokens} is above the largest token bucket of {c.data.token_buckets}; lower it",
    ),
    idle("data.ahead", lambda c: c.data.workers == 0, "with workers 0"),
    Rule(settings=("data.token_buckets", "layout.kind", "layout.cp"), find=_bucket_sizes),
    Rule(settings=("data.tower_buckets",), find=_towers),
    *(
        idle(setting, lambda c: c.data.eval is None, "without data.eval")
        for setting in ("eval.batch_samples", "eval.max_new_tokens", "output.report_images")
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
        "output.weights optimizer.ema_decay",
        lambda c: c.output.weights == "ema" and c.optimizer.ema_decay is None,
        "output.weights 'ema' needs averages; set optimizer.ema_decay or remove it",
    ),
    idle("optimizer.ema_decay", lambda c: c.output.weights == "last", "with output.weights 'last'"),
    Rule(settings=("schedule.warmup_steps", "schedule.groups", "train.steps"), find=_short_schedules),
    Rule(settings=("schedule.final_scale", "schedule.groups", "schedule.kind"), find=_constant_schedules),
    idle("train.spike_factor", lambda c: c.train.spike_window == 0, "with spike_window 0"),
    refused(
        "train.spike_window train.steps",
        lambda c: c.train.spike_window >= 2 * c.train.steps,
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
    Rule(settings=("output.experts",), find=_expert_settings),
    Rule(settings=("objective.router_aux_coef",), find=_router_settings),
    Rule(settings=("objective.ahead_weight",), find=_ahead_settings),
    refused(
        "train.compile model.device",
        lambda c: c.train.compile != "none" and _is_on_accelerator(c),
        "train.compile {c.train.compile!r} needs attention that reads nothing on the host, which there is on the CPU "
        "only, not on {c.model.device}; use train.compile=none",
        runs=True,
    ),
    refused(
        "layout.kind model.device",
        lambda c: c.layout.cp > 1 and c.layout.kind != "ulysses" and _is_on_accelerator(c),
        "layout.kind {c.layout.kind!r} needs attention blocks with log-sum-exp, which there are on the CPU only, not "
        "on {c.model.device}; use layout.kind=ulysses",
        runs=True,
    ),
)
"""All rules between settings. Conditions are functions of the config; sentences say what to do."""


def breaches(subject: Subject) -> Iterator[Breach]:
    """All breaches, in the order of the list."""
    for rule in RULES:
        for sentence in rule.find(subject):
            yield Breach(setting=rule.settings[0], sentence=sentence, warns=rule.warns)
