"""Rules between settings: each one is broken by a config, with one sentence; what a smaller layout idles is a note."""

from pathlib import Path
from typing import Any

import pytest

from mmfn import models
from mmfn.train.build.model import check_model
from mmfn.train.config.load import describe, load_config, load_text
from mmfn.train.config.rule import Stack, Subject
from mmfn.train.config.rules import RULES, breaches
from mmfn.train.config.schema import Config
from tests.parallel.plan_cases import hf_config

MINIMAL: dict[str, dict[str, Any]] = {
    "model": {"path": ""},
    "data": {"train": "", "token_buckets": [64], "tower_buckets": {"vision": [64]}},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 8},
    "output": {"path": ""},
}
TOWER = {"vision": Stack(depth=2, has_experts=False)}
DENSE = {**TOWER, "text": Stack(depth=4, has_experts=False)}
EXPERTS = {**TOWER, "text": Stack(depth=4, has_experts=True)}
KNOWN: dict[str, Any] = {"towers": ("vision",), "num_ahead": 0, "hears": False, "is_recurrent": False}  # of a model
WIDE = {"layout.dp": 2, "model.dtype": "bfloat16"}

# Settings that break a rule, and what is said. In the order of the list; of a dense model of 4 blocks and a tower of 2.
BREAKS: list[tuple[dict[str, Any], str]] = [
    ({"layout.ep": 3}, "layout.dp, layout.cp, layout.ulysses, layout.ep: layout ep 3: ep 3 must divide dp * cp = 1"),
    ({"layout.cp": 4, "layout.kind": "usp"}, "context_parallel('usp') over cp 4 (ulysses 1) needs 1 < ulysses < cp"),
    ({"layout.kind": "ring"}, "layout.kind has no effect with cp 1; remove it or change that"),
    ({"layout.capacity": 1.5}, "layout.capacity has no effect with ep 1"),
    ({"layout.fused_exchange": True, "model.device": "npu"}, "layout.fused_exchange has no effect with ep 1"),
    ({"layout.head": "sharded"}, "layout.head has no effect with dp 1 and cp 1"),
    ({"layout.prefetch": False}, "layout.prefetch has no effect with dp 1 and cp 1, parameters on the device"),
    ({"layout.keep_gathered": True, "layout.remat": "full"}, "layout.keep_gathered has no effect on one rank"),
    ({"layout.reshard_after_forward": True}, "layout.reshard_after_forward has no effect on one rank with parameters"),
    ({"layout.sums_under_way": 0}, "layout.sums_under_way has no effect with one rank"),
    ({"layout.reduce_dtype": "bfloat16"}, "layout.reduce_dtype has no effect with one rank"),
    ({"layout.timeout_s": 60}, "layout.timeout_s has no effect with one rank"),
    (
        {"layout.remat": "selective", "layout.remat_save": ["matmul", "exchange"]},
        "layout.remat_save 'exchange' has no effect with ep 1",
    ),
    ({"layout.ulysses": 2}, "layout.ulysses has no effect with kind 'gather'"),
    ({"layout.keep_gathered": True, "layout.dp": 2}, "layout.keep_gathered has no effect with remat 'none'"),
    (
        {
            "layout.keep_gathered": True,
            "layout.reshard_after_forward": True,
            "layout.dp": 2,
            "layout.remat": "block",
        },
        "layout.keep_gathered, layout.reshard_after_forward: keep_gathered keeps whole weights and reshard_after",
    ),
    (
        {"layout.reshard_after_forward": True, "layout.dp": 2, "layout.remat": "full"},
        "layout.reshard_after_forward has no effect where remat computes all layers again",
    ),
    (
        {"layout.reshard_after_forward": True, "layout.dp": 2, "train.compile": "step"},
        "layout.reshard_after_forward has no effect with train.compile 'step' and remat 'none', whose graphs gather",
    ),
    (
        {"layout.prefetch": False, "layout.dp": 2, "train.compile": "layer", "layout.remat": "selective"},
        "layout.prefetch has no effect with train.compile 'layer' and remat 'selective', whose graphs gather",
    ),
    (
        {"layout.sums_under_way": 4, "layout.dp": 2, "train.compile": "step"},
        "layout.sums_under_way has no effect with train.compile 'step' and remat 'none', whose graphs gather",
    ),
    ({"layout.remat_layers": 2}, "layout.remat_layers has no effect with remat 'none'"),
    (
        {"layout.remat": "full", "layout.remat_every": 5},
        "layout.remat_every is 5 but has no effect above the 4 layers of the deepest stack; use at most 4",
    ),
    (
        {"layout.remat": "selective", "layout.remat_save": ["matmul", "experts"]},
        "layout.remat_save 'experts' has no effect, there are no experts",
    ),
    (
        {"layout.remat_stacks": {"audio": {"kind": "full"}}},
        "layout.remat_stacks has 'audio' but the model's stacks are vision, text; use these",
    ),
    (
        {"layout.offload": ["activations"], "train.compile": "step"},
        "layout.head, layout.offload, train.compile: offload('activations') moves memory between the blocks of a step",
    ),
    (
        {"layout.dp": 2, "layout.ep": 2, "layout.capacity": 1.5, "data.token_buckets": [64, 128]},
        "layout.capacity needs batches of one size on all ranks, but data.token_buckets are (64, 128); keep",
    ),
    (
        {"layout.dp": 2, "layout.ep": 2, "layout.fused_exchange": True, "layout.capacity": 1.5},
        "layout.fused_exchange, layout.capacity: fused needs the rows of each expert on the host, which kind",
    ),
    (
        {"layout.dp": 2, "layout.ep": 2, "layout.fused_exchange": True},
        "layout.fused_exchange has no effect with model.kernels 'portable', which exchange rows and multiply",
    ),
    ({"layout.compute_dtype": "float32"}, "layout.compute_dtype has no effect beside an equal model.dtype"),
    ({"layout.compute_rules": {}}, "layout.compute_rules has no effect where all is computed in float32"),
    ({"layout.dp": 2, "layout.reduce_dtype": "float32"}, "layout.reduce_dtype has no effect where all is computed"),
    ({"optimizer.master": True}, "optimizer.master has no effect with model.dtype 'float32'"),
    (
        {"data.columns": {"messages": "turns"}},
        "data.format, data.columns, data.tags, data.ignore: columns need a format",
    ),
    ({"checkpoint.asynchronous": False}, "checkpoint.asynchronous has no effect without checkpoint.every"),
    ({"checkpoint.read_back": True}, "checkpoint.read_back has no effect without checkpoint.every"),
    ({"checkpoint.keep_last": 3}, "checkpoint.keep_last has no effect without checkpoint.every"),
    ({"checkpoint.keep_every": 3}, "checkpoint.keep_every has no effect without checkpoint.every"),
    ({"checkpoint.keep_best": 3}, "checkpoint.keep_best has no effect without checkpoint.every"),
    ({"checkpoint.save_optimizer": False}, "checkpoint.save_optimizer has no effect without checkpoint.every"),
    ({"checkpoint.load_optimizer": False}, "checkpoint.load_optimizer has no effect without a path in checkpoint"),
    ({"checkpoint.load_cursor": False}, "checkpoint.load_cursor has no effect without a path in checkpoint.resume"),
    (
        {"checkpoint.keep_best": 3, "checkpoint.every": 5},
        "checkpoint.keep_best has no effect without eval.every",
    ),
    ({"data.max_tokens": 65}, "data.max_tokens 65 is above the largest token bucket of (64,); lower it"),
    (
        {"data.batch_samples": 4, "data.batch_tokens": 64},
        "data.batch_samples and data.batch_tokens are both set; set one of them to null",
    ),
    (
        {"data.batch_samples": None},
        "data.batch_samples and data.batch_tokens are both null, but one of the two says how large a step is; set one",
    ),
    ({"data.window_samples": 100}, "data.window_samples has no effect without data.batch_tokens"),
    (
        {"data.train_on_prompt": True, "data.mask_history": True},
        "data.mask_history has no effect with data.train_on_prompt; remove it or change that",
    ),
    (
        {"data.train_on_prompt": True, "data.train_empty_thinking": False},
        "data.train_empty_thinking has no effect with data.train_on_prompt",
    ),
    (
        {"data.train": [{"path": "a", "weight": 1.0}, "b"]},
        "data.train has a weight for 'a' but not for all data sets; give one to each or to none",
    ),
    ({"data.workers": 0, "data.ahead": 9}, "data.ahead has no effect with workers 0"),
    ({"data.workers": 0, "data.worker_kind": "processes"}, "data.worker_kind has no effect with workers 0"),
    (
        {"data.batch_tokens": 192, "layout.dp": 2},
        "data.batch_tokens is 192 but must be a multiple of 128, the largest token bucket times 2 ranks with their own "
        "data; use 256",
    ),
    (
        {"data.batch_samples": 4, "layout.dp": 3, "layout.replicate": 2},
        "data.batch_samples is 4 but must be at least replicate 2 * dp 3, one for each rank with its own data",
    ),
    (
        {"layout.cp": 3},
        "data.token_buckets has 64 but layout.kind 'gather' with cp 3 needs multiples of 6; use 66",
    ),
    (
        {"data.tower_buckets": {}},
        "data.tower_buckets lacks sizes for the tower 'vision'; set data.tower_buckets={vision: [...]}",
    ),
    ({"eval.every": 2}, "eval.every has no effect without data.eval"),
    ({"eval.batch_samples": 2}, "eval.batch_samples has no effect without data.eval"),
    ({"eval.max_new_tokens": 2}, "eval.max_new_tokens has no effect without data.eval"),
    ({"output.report_images": 2}, "output.report_images has no effect without data.eval"),
    ({"eval.prompts": ["a"]}, "eval.prompts has no effect without eval.every"),
    ({"eval.every": 9, "data.eval": "a"}, "eval.every has no effect with train.steps 8"),
    ({"output.export_every": 8}, "output.export_every has no effect with train.steps 8, behind which the run is saved"),
    ({"objective.chunk_size": 8, "objective.total_chunk_size": 8}, "are both set; set one of them to null"),
    ({"optimizer.kind": "sgd", "optimizer.betas": (0.1, 0.2)}, "optimizer.betas has no effect with kind 'sgd'"),
    ({"optimizer.kind": "sgd", "optimizer.eps": 1.0}, "optimizer.eps has no effect with kind 'sgd'"),
    ({"optimizer.kind": "sgd", "optimizer.moments_dtype": "bfloat16"}, "optimizer.moments_dtype has no effect with"),
    ({"optimizer.momentum": 0.5}, "optimizer.momentum has no effect with kind 'adamw'"),
    ({"optimizer.nesterov": False}, "optimizer.nesterov has no effect with kind 'adamw'"),
    ({"optimizer.adjust_lr": "original"}, "optimizer.adjust_lr has no effect with kind 'adamw'"),
    ({"optimizer.muon_dtype": "float32"}, "optimizer.muon_dtype has no effect with kind 'adamw'"),
    ({"optimizer.kind": "muon", "optimizer.momentum": 0.0}, "optimizer.nesterov has no effect with momentum 0"),
    ({"optimizer.no_decay": [".*bias"]}, "optimizer.no_decay has no effect with weight_decay 0"),
    (
        {
            "layout.offload": ["optimizer"],
            "optimizer.kind": "sgd",
            "optimizer.momentum": 0.0,
            "optimizer.nesterov": False,
        },
        "layout.offload 'optimizer' has no effect: sgd without momentum keeps nothing beside the parameters; remove it",
    ),
    ({"output.weights": "ema"}, "output.weights 'ema' needs averages; set optimizer.ema_decay or remove it"),
    ({"optimizer.ema_decay": 0.9}, "optimizer.ema_decay has no effect with output.weights 'last'"),
    ({"train.epochs": 2}, "the other follows; set one, and the other to null"),
    ({"train.profile": (2, 9)}, "train.profile ends with step 9 but train.steps is 8; end it earlier"),
    (
        {"schedule.groups": {"a": {"lr": 1.0, "warmup_steps": 8}}},
        "schedule.groups 'a'.warmup_steps 8 must be below train.steps 8; shorten it",
    ),
    (
        {"schedule.groups": {"a": {"lr": 1.0, "kind": "constant", "final_scale": 0.1}}},
        "schedule.groups 'a'.final_scale has no effect with kind 'constant'",
    ),
    ({"train.spike_factor": 2.0}, "train.spike_factor has no effect with spike_window 0"),
    ({"train.spike_window": 16}, "train.spike_window 16 has no effect with train.steps 8"),
    ({"lora.alpha": 1.0}, "lora.alpha has no effect without rank"),
    ({"lora.targets": ["a"]}, "lora.targets has no effect without rank"),
    ({"lora.rslora": True}, "lora.rslora has no effect without rank"),
    ({"lora.dropout": 0.1}, "lora.dropout has no effect without rank"),
    ({"lora.keep": ["a"]}, "lora.keep has no effect without rank"),
    ({"lora.rank": 2, "model.adapter": "x"}, "lora has no effect with model.adapter, which says what is adapted"),
    ({"output.adapter": "merged"}, "output.adapter has no effect without LoRA"),
    ({"lora.rank": 2, "model.init": "random", "output.adapter": "separate"}, "saves nowhere the base"),
    (
        {"model.kernels": "cuda"},
        "model.kernels 'cuda' are those of a device that model.device 'cpu' is not; use model.kernels=portable, or",
    ),
    (
        {"model.kernel_packages": ["fla"]},
        "model.kernel_packages 'fla' has kernels for cuda and npu, not for model.device 'cpu'; remove it, or use "
        "model.device=cuda",
    ),
    (
        {"model.kernel_packages": ["fla", "flash-attn"]},
        "model.kernel_packages 'fla' has no effect, its kernels are of recurrent layers and the model has none; remove",
    ),
    ({"output.experts": "transformers"}, "output.experts 'transformers' has no effect, the model has no experts"),
    ({"layout.capacity": 1.5}, "layout.capacity has no effect, the model has no experts; remove it"),
    ({"layout.fused_exchange": True}, "layout.fused_exchange has no effect, the model has no experts; remove it"),
    ({"data.max_audio_seconds": 9.0}, "data.max_audio_seconds has no effect, the model hears nothing; remove it"),
    ({"objective.router_aux_coef": 0.0}, "objective.router_aux_coef has no effect, the model has no experts; remove"),
    (
        {"objective.ahead_weight": 0.1},
        "objective.ahead_weight has no effect, the model predicts no token further ahead",
    ),
    (
        {"train.compile": "layer", "model.device": "npu"},
        "train.compile 'layer' needs attention that is one operator, as it is on a CPU and of the kernels 'cuda', not",
    ),
    (
        {"layout.cp": 2, "model.device": "cuda:1", "model.kernels": "portable"},
        "layout.kind 'gather' needs attention blocks with log-sum-exp, which model.kernels 'portable' has on the CPU "
        "only; use the kernels of cuda:1, or layout.kind=ulysses",
    ),
]


def config_of(settings: dict[str, Any]) -> Config:
    """The smallest config with some settings."""
    sections = {name: dict(section) for name, section in MINIMAL.items()}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return Config.model_validate(sections)


def said(settings: dict[str, Any], stacks: dict[str, Stack] = DENSE) -> list[tuple[str, bool]]:
    """What the list says of a config for a model: sentences, and whether they are notes."""
    subject = Subject(config=config_of(settings), stacks=stacks, **KNOWN)
    return [(breach.sentence, breach.warns) for breach in breaches(subject)]


def test_every_rule_has_a_config_that_breaks_it() -> None:
    assert len(BREAKS) == len(RULES)


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda i: f"{i} {' '.join(RULES[i].settings)}")
def test_a_broken_rule_is_one_sentence(index: int) -> None:
    """The rule at a place of the list finds its config, and says its sentence once."""
    settings, expected = BREAKS[index]
    rule = RULES[index]
    subject = Subject(config=config_of(settings), stacks=DENSE, **KNOWN)
    (sentence,) = rule.find(subject)
    assert expected in sentence
    assert "\n" not in sentence
    assert (sentence, rule.warns) in said(settings)
    assert not list(rule.find(Subject(config=config_of({}), stacks=DENSE, **KNOWN)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data.eval": ["a", {"path": "b", "weight": 2}]}, "data.eval has a weight for 'b' but every held-out sample"),
        ({"data.train": [{"path": "a", "weight": 2}]}, "data.train: a weight has no effect on one data set alone"),
        (
            {"data.train": {"path": "a", "tags": {"user_tag": "x"}}},
            "data.train: columns and tags of 'a' need its format",
        ),
        ({"data.train": {"path": "a", "format": "x"}}, "data.train: 'a': unknown format 'x'; use auto or one of"),
        ({"data.train": ["a"], "data.max_samples": 3}, "data.max_samples is for a data.train of one path; write it"),
    ],
)
def test_data_sets_that_do_not_go_together(settings: dict[str, Any], sentence: str) -> None:
    ((found, is_note),) = said(settings)
    assert found.startswith(sentence)
    assert not is_note


def test_the_smallest_config_breaks_none() -> None:
    assert said({}) == []
    assert said({}, EXPERTS) == []


def test_a_config_for_many_ranks_can_be_tried_on_one(tmp_path: Path) -> None:
    """What the smaller layout idles is said, and nothing is refused."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m, dtype: bfloat16}\n"
        "data: {train: t, token_buckets: [64], tower_buckets: {vision: [32]}}\n"
        "optimizer: {lr: 1e-3}\ntrain: {steps: 10}\noutput: {path: out}\n"
        "layout: {dp: 2, cp: 4, ep: 4, kind: usp, ulysses: 2, capacity: 2.0, head: sharded, prefetch: false, "
        "keep_gathered: true, remat: selective, remat_save: [exchange], reduce_dtype: float32, timeout_s: 60}\n"
    )
    assert load_config(path).notes == ()
    loaded = load_config(path, ["layout.dp=1", "layout.cp=1", "layout.ep=1"])
    keys = ["kind", "capacity", "head", "prefetch", "keep_gathered", "reduce_dtype", "timeout_s", "remat_save"]
    assert [note.split()[0] for note in loaded.notes] == [f"layout.{key}" for key in keys]
    assert loaded.config.layout.sizes.world == 1


def test_a_setting_of_the_file_that_an_override_idles_is_left_out(tmp_path: Path) -> None:
    """It is said. What has no effect by the file alone, or stands on the command line itself, is refused as ever."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\n"
        "data: {train: t, eval: e, token_buckets: [64], tower_buckets: {vision: [32]}}\n"
        "optimizer: {lr: 1e-3, betas: [0.9, 0.95]}\nschedule: {final_scale: 0.1}\n"
        "train: {steps: 100, spike_window: 64, spike_factor: 5}\nlora: {rank: 4, alpha: 8}\n"
        "layout: {remat: block, remat_layers: 2}\ncheckpoint: {every: 5, keep_best: 2}\n"
        "eval: {every: 10, batch_samples: 4, prompts: [a]}\noutput: {path: o, adapter: merged}\n"
    )

    def left_out(*overrides: str) -> dict[str, str]:
        loaded = load_config(path, overrides)
        assert not {note.split()[0] for note in loaded.notes} & loaded.origins.keys()
        again = load_text(describe(loaded), "again")  # what a run folder keeps is a config
        assert again.config == loaded.config
        assert again.notes == ()
        return {note.split()[0]: note for note in loaded.notes}

    assert left_out() == {}
    assert left_out("train.seed=3") == {}
    notes = left_out("data.eval=null")
    assert list(notes) == ["eval.every", "eval.batch_samples", "checkpoint.keep_best", "eval.prompts"]
    assert notes["eval.batch_samples"] == "eval.batch_samples has no effect without data.eval: it is left out"
    assert list(left_out("train.steps=9")) == [
        *("eval.every", "train.spike_window", "checkpoint.keep_best", "eval.prompts", "train.spike_factor")
    ]
    assert list(left_out("lora.rank=null")) == ["lora.alpha", "output.adapter"]
    assert list(left_out("optimizer.kind=sgd")) == ["optimizer.betas"]
    assert list(left_out("schedule.kind=constant")) == ["schedule.final_scale"]
    assert list(left_out("layout.remat=none")) == ["layout.remat_layers"]
    with pytest.raises(ValueError, match=r"override: eval.batch_samples has no effect without data.eval; remove it"):
        load_config(path, ["data.eval=null", "eval.batch_samples=3"])
    with pytest.raises(ValueError, match=r"override: layout.remat_layers has no effect with remat 'full'"):
        load_config(path, ["layout.remat=full", "layout.remat_layers=3"])
    path.write_text(path.read_text().replace("eval: e, ", ""))
    for overrides in ([], ["train.seed=3"], ["data.eval=null"]):
        with pytest.raises(ValueError, match=r"run.yaml:9: eval.every has no effect without data.eval; remove it"):
            load_config(path, overrides)


def test_settings_of_one_stack() -> None:
    def breach(stacks: dict[str, Stack] = DENSE, **policy: Any) -> str:
        (found,) = said({"layout.dp": 2, "layout.ep": 2, "layout.remat_stacks": {"vision": policy}}, stacks)
        return found[0]

    spelt = "layout.remat_stacks: vision"
    assert breach(kind="full", save=["matmul"]).startswith(f"{spelt}.save has no effect with remat 'full'")
    assert breach(kind="full", layers=2).startswith(f"{spelt}.layers has no effect with remat 'full'")
    assert breach(kind="block", layers=3).startswith(f"{spelt}.layers is 3 but has no effect above the 2 layers")
    for op in ("experts", "exchange"):
        expected = f"{spelt}.save {op!r} has no effect, there are no experts; remove it"
        assert breach(EXPERTS, kind="selective", save=["attention", op]) == expected
    assert said({"layout.remat_stacks": {"vision": {"kind": "block", "layers": 2}}, "layout.remat": "full"}) == []
    assert said({"layout.remat": "block", "layout.remat_layers": 4}) == []


def test_a_policy_for_all_stacks_but_one_is_as_deep_as_the_others() -> None:
    chosen = {"layout.remat": "block", "layout.remat_layers": 3, "layout.remat_stacks": {"text": {"kind": "none"}}}
    (found,) = said(chosen)
    assert found[0].startswith("layout.remat_layers is 3 but has no effect above the 2 layers")


def test_a_tower_the_model_does_not_have() -> None:
    (found,) = said({"data.tower_buckets": {"vision": [4], "audio": [4]}})
    assert found == ("data.tower_buckets has 'audio' but the model's towers are vision; use these", False)


def test_kernels_of_a_gpu_have_every_layout() -> None:
    settings = {"layout.cp": 2, "layout.kind": "ring", "model.device": "cuda"}
    assert said({**settings, "train.compile": "layer", "data.tower_buckets": {"vision": [4]}}) == []


def test_packages_bring_attention_that_is_one_operator_and_has_blocks() -> None:
    settings = {"model.kernels": "portable", "model.device": "cuda", "layout.cp": 2, "train.compile": "layer"}
    settings["data.tower_buckets"] = {"vision": [4]}
    assert len(said(settings)) == 2
    assert said({**settings, "model.kernel_packages": ["flash-attn"]}) == []
    assert len(said({**settings, "model.kernel_packages": ["fla"]})) == 3


def test_kernels_of_recurrent_layers_are_for_models_that_have_them() -> None:
    """A plan refuses them as well; of a config alone it is not known."""
    config = config_of({"model.kernel_packages": ["fla"], "model.device": "cuda"})
    for is_recurrent, num_found in ((True, 0), (None, 0), (False, 1)):
        subject = Subject(config=config, is_recurrent=is_recurrent, is_plan=True)
        assert len(list(breaches(subject))) == num_found


def test_a_plan_reads_neither_data_nor_device() -> None:
    settings = {"layout.cp": 3, "data.tower_buckets": {}, "model.device": "npu", "train.compile": "layer"}
    settings["model.kernels"] = "portable"
    assert len(said(settings)) == 4
    subject = Subject(config=config_of(settings), stacks=DENSE, towers=("vision",), num_ahead=0, is_plan=True)
    assert list(breaches(subject)) == []


@pytest.mark.parametrize("moe", [False, True])
def test_of_a_real_model(moe: bool) -> None:
    """Four text blocks and a tower of two."""
    hf = hf_config(moe=moe, layers=4)
    family = models.family(hf["model_type"])
    cfg = family.config_from_hf(hf)
    for settings, is_refused in (
        ({"layout.remat": "full", "layout.remat_every": 4}, False),
        ({"layout.remat": "full", "layout.remat_every": 5}, True),
        ({"output.experts": "transformers"}, not moe),
        ({"layout.remat_stacks": {"encoder": {"kind": "full"}}}, True),
        ({"data.tower_buckets": {"tower": [4]}}, True),
        ({"data.tower_buckets": {"vision": [6]}}, True),
        ({"layout.kind": "ring"}, False),
    ):
        if is_refused:
            with pytest.raises(ValueError, match=next(iter(settings)).rpartition(".")[2]):
                check_model(config_of(settings), family, cfg)
        else:
            check_model(config_of(settings), family, cfg)
