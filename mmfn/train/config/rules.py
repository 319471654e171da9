"""What settings mean to each other: one list of rules, each a row (settings, condition, sentence).

A setting that can never have an effect is refused, so that nobody believes in it. One that only a smaller layout idles
is said and goes on: a config for eight ranks can be tried on one with `layout.dp=1 layout.cp=1`. So does one in the
file that an override idles (`load.leave_idle_out`). What a transform itself refuses is asked of it (`asked`) and not
said again here.
"""

import math
from collections.abc import Iterator

from mmfn.parallel.program import check_one_graph
from mmfn.parallel.transforms.context_parallel import check_kind
from mmfn.parallel.transforms.data_parallel import check_weights
from mmfn.parallel.transforms.expert_parallel import check_experts
from mmfn.train.config import conditions
from mmfn.train.config.learning import LoraSection
from mmfn.train.config.rule import Breach, Rule, Subject, asked, idle, refused
from mmfn.train.dialect import check_dialect

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
    idle("layout.fused_exchange", lambda c: c.layout.ep == 1, "with ep 1", warns=True),
    idle("layout.head", conditions.is_unsharded, "with dp 1 and cp 1", warns=True),
    idle(
        "layout.prefetch",
        lambda c: conditions.is_unsharded(c) and "parameters" not in c.layout.offload,
        "with dp 1 and cp 1, parameters on the device",
        warns=True,
    ),
    idle("layout.keep_gathered", conditions.is_alone, "on one rank with parameters on the device", warns=True),
    idle("layout.reshard_after_forward", conditions.is_alone, "on one rank with parameters on the device", warns=True),
    idle("layout.sums_under_way", lambda c: c.layout.world == 1, "with one rank", warns=True),
    idle("layout.reduce_dtype", lambda c: c.layout.world == 1, "with one rank", warns=True),
    idle("layout.timeout_s", lambda c: c.layout.world == 1, "with one rank", warns=True),
    Rule(settings=("layout.remat_save", "layout.ep"), find=conditions.saved_exchange, warns=True),
    # layout
    idle("layout.ulysses", lambda c: c.layout.kind != "usp", "with kind {c.layout.kind!r}"),
    idle("layout.keep_gathered", lambda c: not conditions.recomputes(c), "with remat 'none'"),
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
    Rule(
        settings=("layout.remat_save", "layout.remat_every", "layout.remat_layers"),
        find=conditions.idle_policies,
        idles=True,
    ),
    Rule(settings=("layout.remat_every", "layout.remat_layers"), find=conditions.deep_policies),
    Rule(settings=("layout.remat_save",), find=conditions.saved_experts),
    Rule(settings=("layout.remat_stacks",), find=conditions.remat_names),
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
    asked(
        "layout.fused_exchange layout.capacity",
        lambda c: check_experts("dropless" if c.layout.capacity is None else "capacity", fused=c.layout.fused_exchange),
    ),
    refused(
        "layout.fused_exchange model.kernels",
        lambda c: c.layout.fused_exchange and c.model.table != "npu",
        "layout.fused_exchange has no effect with model.kernels {c.model.table!r}, which exchange rows and multiply "
        "them apart; use model.kernels=npu or remove it",
        runs=True,
    ),
    # dtypes
    idle("layout.compute_dtype", lambda c: c.layout.compute_dtype == c.model.dtype, "beside an equal model.dtype"),
    idle("layout.compute_rules", conditions.is_all_float32, "where all is computed in float32"),
    idle(
        "layout.reduce_dtype",
        lambda c: conditions.is_all_float32(c) and c.layout.reduce_dtype == "float32",
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
        lambda c: None not in (c.data.batch_tokens, c.data.batch_samples) and c.is_changed("data.batch_samples"),
        "data.batch_samples and data.batch_tokens are both set; set one of them to null",
    ),
    refused(
        "data.batch_samples data.batch_tokens",
        lambda c: c.data.batch_samples is None and c.data.batch_tokens is None,
        "data.batch_samples and data.batch_tokens are both null, but one of the two says how large a step is; set one",
    ),
    idle("data.window_samples", lambda c: c.data.batch_tokens is None, "without data.batch_tokens"),
    *(
        idle(f"data.{name}", lambda c: c.data.train_on_prompt, "with data.train_on_prompt")
        for name in ("mask_history", "train_empty_thinking")
    ),
    Rule(settings=("data.train", "data.eval", "data.max_samples"), find=conditions.data_sets),
    idle("data.ahead", lambda c: c.data.workers == 0, "with workers 0"),
    idle("data.worker_kind", lambda c: c.data.workers == 0, "with workers 0"),
    Rule(settings=("data.batch_tokens", "data.token_buckets"), find=conditions.batch_tokens),
    refused(
        "data.batch_samples layout.replicate layout.dp",
        lambda c: c.data.batch_tokens is None and (c.data.batch_samples or math.inf) < c.layout.replicate * c.layout.dp,
        "data.batch_samples is {c.data.batch_samples} but must be at least replicate {c.layout.replicate} * dp "
        "{c.layout.dp}, one for each rank with its own data; raise it",
        runs=True,
    ),
    Rule(settings=("data.token_buckets", "layout.kind", "layout.cp"), find=conditions.bucket_sizes),
    Rule(settings=("data.tower_buckets",), find=conditions.towers),
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
        "with train.steps {c.train.steps}",
    ),
    idle(
        "output.export_every",
        lambda c: c.train.steps is not None and (c.output.export_every or 0) >= c.train.steps,
        "with train.steps {c.train.steps}, behind which the run is saved",
    ),
    # objective, optimizer, schedule
    refused(
        "objective.chunk_size objective.total_chunk_size",
        lambda c: None not in (c.objective.chunk_size, c.objective.total_chunk_size),
        "objective.chunk_size and objective.total_chunk_size are both set; set one of them to null",
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
        lambda c: "optimizer" in c.layout.offload and conditions.is_stateless(c),
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
        "train.steps and train.epochs: one of the two says how long the run is, and the other follows; set one, and "
        "the other to null",
    ),
    refused(
        "train.profile train.steps",
        lambda c: c.train.profile is not None and c.train.profile[1] > (c.train.steps or math.inf),
        "train.profile ends with step {c.train.profile[1]} but train.steps is {c.train.steps}; end it earlier",
    ),
    Rule(settings=("schedule.warmup_steps", "schedule.groups", "train.steps"), find=conditions.short_schedules),
    Rule(
        settings=("schedule.final_scale", "schedule.groups", "schedule.kind"),
        find=conditions.constant_schedules,
        idles=True,
    ),
    idle("train.spike_factor", lambda c: c.train.spike_window == 0, "with spike_window 0"),
    refused(
        "train.spike_window train.steps",
        lambda c: c.train.steps is not None and c.train.spike_window >= 2 * c.train.steps,
        "train.spike_window {c.train.spike_window} has no effect with train.steps {c.train.steps}: nothing is a spike "
        "before half of it is filled; lower it",
        idles=True,
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
        lambda c: not conditions.is_of_any_device(c) and c.model.kind != c.model.table,
        "model.kernels {c.model.kernels!r} are those of a device that model.device {c.model.device!r} is not; use "
        "model.kernels=portable, or model.device={c.model.kernels}",
        runs=True,
    ),
    Rule(settings=("model.kernel_packages", "model.device"), find=conditions.kernel_packages),
    Rule(settings=("model.kernel_packages",), find=conditions.idle_packages),
    Rule(settings=("output.experts",), find=conditions.expert_settings),
    Rule(settings=("layout.capacity",), find=conditions.capacity),
    Rule(settings=("layout.fused_exchange",), find=conditions.fused_exchange),
    Rule(settings=("data.max_audio_seconds",), find=conditions.sound_settings),
    Rule(settings=("objective.router_aux_coef",), find=conditions.router_settings),
    Rule(settings=("objective.ahead_weight",), find=conditions.ahead_settings),
    refused(
        "train.compile model.device model.kernels",
        lambda c: (
            c.train.compile != "none"
            and conditions.is_on_accelerator(c)
            and c.model.table != "cuda"
            and not conditions.is_by_package(c, "attention")
        ),
        "train.compile {c.train.compile!r} needs attention that is one operator, as it is on a CPU and of the kernels "
        "'cuda', not of {c.model.table!r} on {c.model.device}; use train.compile=none",
        runs=True,
    ),
    refused(
        "layout.kind model.device model.kernels",
        lambda c: (
            c.layout.cp > 1
            and c.layout.kind != "ulysses"
            and conditions.is_on_accelerator(c)
            and conditions.is_of_any_device(c)
            and not conditions.is_by_package(c, "attention_block")
        ),
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
            named = [setting for setting in rule.settings if sentence.startswith(f"{setting} ")]
            yield Breach(
                setting=(named or rule.settings)[0],
                sentence=sentence,
                warns=rule.warns,
                is_idle=rule.idles and bool(named),
            )
