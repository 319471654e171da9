"""docs/migrating.md: it is what its data say, and every setting and command that they name exists."""

from collections import Counter

from docs import migrating
from mmfn.arguments import COMMANDS
from mmfn.train.config.load import known_keys

# Settings of the native files that have to stand there, by section: their sections' own keys.
NATIVE = {
    "parallel (native)": (
        "data_parallel_size fully_shard_parallel_size tensor_parallel_size ring_attention_size ulysses_parallel_size "
        "expert_parallel_size expert_fully_shard_parallel_size tp_plan recompute recompute_plan"
    ),
    "model (native)": (
        "model_id model_name_or_path trust_remote_code attn_implementation freeze mtp_num_layers "
        "mtp_loss_scaling_factor gdn_implementation causal_conv1d_implementation use_grouped_expert_matmul "
        "skip_gdn_recompute skip_flash_attn_recompute"
    ),
    "training (native)": (
        "micro_batch_size gradient_accumulation_steps train_iters train_epochs seed lr lr_min lr_start lr_decay_style "
        "lr_warmup_ratio lr_decay_ratio lr_scaling_plan weight_decay optimizer adam_fused eps clip_grad load save "
        "save_interval save_async log_interval val_interval manual_gc_interval use_deter_comp plugin quantization_plan"
    ),
}


def test_the_page_is_current() -> None:
    assert migrating.PAGE.read_text(encoding="utf-8") == migrating.page(), "run make migrating"


def test_every_target_exists() -> None:
    known = {*known_keys(), *(f"mmfn {name}" for name in COMMANDS)}
    named = [name for _, rows in migrating.sections() for row in rows for name in row.ours]
    assert len(named) > 150
    assert sorted(set(named) - known) == []


def test_every_setting_stands_once_and_has_a_target_or_a_reason() -> None:
    tables = dict(migrating.sections())
    for title, rows in tables.items():
        keys = Counter(key for row in rows for key in row.theirs.split(", "))
        assert [key for key, count in keys.items() if count > 1] == [], title
        assert [row.theirs for row in rows if not row.ours and not row.how] == [], title
    for title, keys in NATIVE.items():
        assert set(keys.split()) <= {key for row in tables[title] for key in row.theirs.split(", ")}
    assert sum(map(len, tables.values())) > 200
