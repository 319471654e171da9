"""The configuration: precedence, origins, and one clear sentence for every mistake."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mmfn.train.config.load import describe, known_keys, load_config, load_text
from mmfn.train.config.schema import DataSection

ROOT = Path(__file__).parents[2]
MINIMAL = """\
model: {path: m}
data:
  train: train.json
  token_buckets: [64, 128]
  tower_buckets: {vision: [32]}
optimizer: {lr: 1e-3}
train: {steps: 10}
output: {path: out}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_values_defaults_and_overrides(config_file: Path) -> None:
    loaded = load_config(config_file, ["train.steps=20", "train.steps=30", "optimizer.betas=[0.9, 0.95]"])
    config = loaded.config
    assert config.train.steps == 30  # the last override wins
    assert config.optimizer.lr == 1e-3  # YAML 1.1 would read 1e-3 as text
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.data.token_buckets == (64, 128)
    assert config.model.init == "load"
    assert loaded.origins["train.steps"] == "override"
    assert loaded.origins["data.train"] == f"{config_file}:3"
    assert "train.seed" not in loaded.origins


def test_config_is_frozen(config_file: Path) -> None:
    config = load_config(config_file).config
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_describe_lists_every_value_with_its_origin_and_reads_back(config_file: Path, tmp_path: Path) -> None:
    loaded = load_config(config_file, ["schedule.final_scale=1e-2"])
    text = describe(loaded)
    values = yaml.safe_load(text)
    assert [f"{s}.{k}" for s, section in values.items() for k in section] == list(known_keys())
    assert "# command line" in text
    assert "# default" in text
    assert f"# {config_file}:1" in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(again).config == loaded.config


def test_rules_keep_their_order_and_constant_schedules_load_again(config_file: Path, tmp_path: Path) -> None:
    """Of rules the first match counts."""
    rules = [
        "optimizer.lr_scales={'text/z.*': 0.5, 'text/a.*': 0.1, '.*': 1.0}",
        "schedule.groups={'z.*': {lr: 1e-3, kind: constant}, 'a.*': {lr: 1e-4}}",
        "layout.compute_rules={'z': bfloat16, 'a': float32}",
        "schedule.kind=constant",
    ]
    loaded = load_config(config_file, rules)
    again = tmp_path / "again.yaml"
    again.write_text(describe(loaded))
    config = load_config(again).config
    assert config == loaded.config
    assert list(config.optimizer.lr_scales) == ["text/z.*", "text/a.*", ".*"]
    assert list(config.schedule.groups) == ["z.*", "a.*"]
    assert list(config.layout.compute_rules or ()) == ["z", "a"]


def test_merged_keys_may_be_set_again(config_file: Path) -> None:
    changed = "optimizer: {lr: 1e-3, lr_scales: {<<: {a: 1.0, b: 2.0}, b: 3.0}}"
    config_file.write_text(MINIMAL.replace("optimizer: {lr: 1e-3}", changed))
    assert load_config(config_file).config.optimizer.lr_scales == {"a": 1.0, "b": 3.0}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.dtype=float32", "layout.compute_rules={'.*norm.*': float32}"], "layout.compute_rules has no effect"),
        (["layout.compute_rules={}"], "layout.compute_rules has no effect where all is computed in float32"),
        (["layout.dp=2", "layout.reduce_dtype=float32"], "layout.reduce_dtype has no effect where all is computed"),
        (["data.workers=0", "data.ahead=9"], "ahead has no effect with workers 0"),
        (["data.eval=null", "eval.batch_samples=2"], "eval.batch_samples has no effect without data.eval"),
        (["output.report_images=3"], "output.report_images has no effect without data.eval"),
        (["optimizer.kind=muon", "optimizer.momentum=0"], "nesterov has no effect with momentum 0"),
    ],
)
def test_pairs_without_effect_are_refused(config_file: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_config(config_file, overrides)


def test_dtypes_with_effect_are_taken(config_file: Path) -> None:
    layout = load_config(config_file, ["layout.dp=2", "layout.reduce_dtype=bfloat16"]).config.layout
    assert layout.reduce_dtype == "bfloat16"
    narrow = ["layout.dp=2", "model.dtype=bfloat16", "layout.reduce_dtype=float32", "layout.compute_rules={}"]
    assert load_config(config_file, narrow).config.layout.compute_rules == {}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=3", "override: unknown key 'lr'; the nearest known key is 'optimizer.lr'"),
        ("optimizer.weigth_decay=0", "the nearest known key is 'optimizer.weight_decay'"),
        ("optim.lr=3", "the nearest known key is 'optimizer.lr'"),
        ("train=3", "unknown key 'train'"),
        ("train.steps=many", "override: train.steps is 'many' but input should be a valid integer"),
        ("train.steps=1.5", "train.steps is 1.5"),
        ("train.steps=true", "train.steps is true but input should be a valid integer"),
        ("train.steps=", "train.steps and train.epochs: one of the two says how long the run is"),
        ("train.epochs=1", "the other follows; set one, and the other to null"),
        ("train.seed=null", "train.seed is null but input should be a valid integer; correct the value"),
        ("data.ignore=[a, null]", "data.ignore is ['a', null] but"),
        ("data.tags={a: null, b: false}", "data.tags is {'a': null, 'b': false} but"),
        ("data.batch_samples=null", "data.batch_samples and data.batch_tokens are both null, but one of the two says"),
        ("train.steps=0", "input should be greater than 0"),
        ("optimizer.lr=.nan", "finite"),
        ("train.compile=all", "train.compile is 'all' but input should be 'none', 'layer' or 'step'"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas is [0.9, 1]"),
        (
            "data.token_buckets=[128,64]",
            "data.token_buckets is [128, 64] but the sizes must increase; correct the value",
        ),
        ("data.token_buckets=[]", "data.token_buckets is []"),
        ("data.max_tokens=129", "max_tokens 129 is above the largest token bucket of (64, 128)"),
        ("schedule.warmup_steps=10", "schedule.warmup_steps 10 must be below train.steps 10"),
        ("train.steps", "override 'train.steps' has no '='"),
        ("model.path=[", "override: model.path is '[' but the value is no valid YAML"),
        ("model.path=!foo x", "model.path is '!foo x' but the value is no valid YAML"),
        ("model.path={[a]: b}", "found unhashable key"),
        ("model.path=!!timestamp x", "model.path is '!!timestamp x' but the value is no valid YAML"),
        ("model.path=!!bool x", "model.path is '!!bool x' but the value is no valid YAML"),
        ("model.path=2024-13-45", "model.path is '2024-13-45' but the value is no valid YAML: month must be in 1..12"),
        ("model.path=" + "{" * 3000, "the value is no valid YAML: maximum recursion depth"),
        ("layout.ulysses=2", "ulysses has no effect with kind 'gather'"),
        ("layout.keep_gathered=true", "keep_gathered has no effect with remat 'none'"),
        ("layout.remat_save=[matmul]", "remat_save has no effect with remat 'none'"),
        ("layout.remat_every=2", "remat_every has no effect with remat 'none'"),
        ("layout.reduce_dtype=float32", "reduce_dtype has no effect where all is computed in float32"),
        ("layout.remat_stacks={vision: {kind: all}}", "input should be 'none', 'full', 'selective', 'uniform' or"),
        ("layout.remat_stacks={vision: {every: 2}}", "layout.remat_stacks is {'vision': {'every': 2}} but"),
        ("data.tower_buckets={vision: [4, 2]}", "data.tower_buckets is {'vision': [4, 2]} but the sizes must increase"),
        (
            "layout.offload=[activations, activations]",
            "layout.offload is ['activations', 'activations'] but it names one",
        ),
        ("optimizer.no_decay=['.*bias']", "no_decay has no effect with weight_decay 0"),
        ("optimizer.ema_decay=0.9", "optimizer.ema_decay has no effect with output.weights 'last'"),
        ("train.spike_window=10000", "train.spike_window 10000 has no effect with"),
        ("layout.compute_dtype=float32", "layout.compute_dtype has no effect beside an equal model.dtype"),
        ("layout.dp=0", "layout.dp is 0 but input should be greater than 0"),
        ("layout.tp=2", "unknown key 'layout.tp'; the nearest known key is 'layout.dp'"),
        ("optimizer.lr_scales={a: 1.0, a: 0.5}", "the value is no valid YAML: key 'a' is set twice; correct it"),
        ("data.workers=65", "data.workers is 65 but input should be less than or equal to 64"),
    ],
)
def test_wrong_override_is_one_sentence(config_file: Path, override: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole text is compared below)
        load_config(config_file, [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "optimizer: {lr: 1e-3}",
            "optimiser: {lr: 1e-3}",
            ":6: unknown key 'optimiser'; the nearest known key is 'optimizer'",
        ),
        (
            "  train: train.json",
            "  trian: train.json",
            ":3: unknown key 'data.trian'; the nearest known key is 'data.train'",
        ),
        ("model: {path: m}", "model: m", ":1: section 'model' must be a mapping of settings, got 'm'"),
        ("output: {path: out}\n", "", "output.path is required"),
        ("train: {steps: 10}", "train: {steps: 10, steps: 11}", "key 'train.steps' was already set"),
        ("model: {path: m}", "model: {path: m", "is no valid YAML"),
        ("train: {steps: 10}", "train: {steps: ten}", ":7: train.steps is 'ten'"),
        ("model: {path: m}", "model: {path: !foo x}", ":1: model.path is no valid YAML: could not determine a constr"),
        ("model: {path: m}", "model: {path: {[a]: b}}", ":1: model.path is no valid YAML: found unhashable key"),
        ("model: {path: m}", "model: {path: !!timestamp x}", ":1: model.path is no valid YAML: "),
        ("model: {path: m}", "model: {path: 2024-13-45}", ":1: model.path is no valid YAML: month must be in 1..12"),
        ("{lr: 1e-3}", "{lr: 1e-3, lr_scales: {a: 1.0, a: 0.5}}", ":6: optimizer.lr_scales is no valid YAML: key 'a'"),
        ("model: {path: m}", "{[a]: b}", "run.yaml"),
        ("model: {path: m}", "{" * 3000, "run.yaml is no valid YAML: maximum recursion depth"),
    ],
)
def test_wrong_file_is_one_sentence(config_file: Path, old: str, new: str, expected: str) -> None:
    assert old in MINIMAL
    config_file.write_text(MINIMAL.replace(old, new))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole text is compared below)
        load_config(config_file)
    assert expected in str(error.value)
    assert "run.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "- a\n", "text\n"])
def test_file_that_is_no_mapping(config_file: Path, content: str) -> None:
    config_file.write_text(content)
    with pytest.raises(ValueError, match="must be a mapping of sections"):
        load_config(config_file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read config '.*none.yaml': No such file or directory"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("ulysses", "expected"),
    [(1, "needs 1 < ulysses < cp"), (3, "ulysses 3 must divide cp 4"), (4, "needs 1 < ulysses < cp")],
)
def test_usp_needs_both_of_its_parts(config_file: Path, ulysses: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_config(config_file, ["layout.cp=4", "layout.kind=usp", f"layout.ulysses={ulysses}"])
    assert load_config(config_file, ["layout.cp=4", "layout.kind=usp", "layout.ulysses=2"]).config.layout.world == 4


def test_kept_weights_with_the_tower_alone_computed_again(config_file: Path) -> None:
    chosen = ["layout.dp=2", "layout.keep_gathered=true"]
    assert load_config(config_file, [*chosen, "layout.remat_stacks={vision: {kind: full}}"]).config.layout.keep_gathered
    with pytest.raises(ValueError, match="keep_gathered has no effect"):
        load_config(config_file, chosen)


def test_what_is_moved_to_the_host_is_no_part_of_one_graph(config_file: Path) -> None:
    expected = r"layout.head, layout.offload, train.compile: offload\('optimizer'\) moves memory between the blocks"
    with pytest.raises(ValueError, match=expected):
        load_config(config_file, ["layout.offload=[optimizer]", "train.compile=step"])


def test_fixed_capacity_needs_one_size_of_batch(config_file: Path) -> None:
    changes = ["layout.dp=2", "layout.ep=2", "layout.capacity=1.5"]
    with pytest.raises(
        ValueError, match=r"layout.capacity needs batches of one size .* data.token_buckets are \(64, 128\)"
    ):
        load_config(config_file, changes)
    assert load_config(config_file, [*changes, "data.token_buckets=[128]"]).config.layout.capacity == 1.5


def test_tokens_in_place_of_samples_on_the_command_line(config_file: Path) -> None:
    config_file.write_text(MINIMAL.replace("train.json", "train.json\n  batch_samples: 4"))
    with pytest.raises(ValueError, match=r"data.batch_tokens are both set; set one of them to null"):
        load_config(config_file, ["data.batch_tokens=256"])
    loaded = load_config(config_file, ["data.batch_samples=null", "data.batch_tokens=256", "data.window_samples=9"])
    assert (loaded.config.data.batch_samples, loaded.config.data.batch_tokens) == (None, 256)
    assert load_text(describe(loaded), "again").config == loaded.config


def test_final_scale_without_effect_is_refused(config_file: Path) -> None:
    with pytest.raises(ValueError, match="final_scale has no effect with kind 'constant'"):
        load_config(config_file, ["schedule.kind=constant", "schedule.final_scale=0.1"])


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    for key, meaning in known_keys().items():
        assert meaning, f"{key} has no description"
        assert f"`{key}`" in page, f"docs/config.md does not list {key}"


def test_every_setting_is_read() -> None:
    """Outside of its declaration and the rules; the bounds of media are read by composed names."""
    files = [path for path in (ROOT / "mmfn").rglob("*.py") if path.name != "rules.py"]
    names = {
        node.attr for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
    bounds = {f"{kind}_{name}_pixels": 1 for kind in ("image", "video") for name in ("min", "max")}
    bounds |= {"video_fps": 2.0, "video_maxlen": 4}
    required = {"train": "", "token_buckets": [1], "tower_buckets": {}}
    settings = DataSection(**required, **bounds).media_settings
    assert sum(map(len, settings.values())) == len(bounds)
    assert [key for key in known_keys() if key.partition(".")[2] not in names | bounds.keys()] == []


def test_demo_config_is_valid() -> None:
    assert load_config(ROOT / "configs" / "demo.yaml").config.train.compile == "none"


def test_the_commands_of_the_page_that_show_or_train_the_demo_are_taken() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    commands = re.findall(r"^(?:torchrun .* -m )?mmfn (?:train|config show|check) (configs/.*)$", page, re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        path, *rest = shlex.split(command, comments=True)
        assert load_config(ROOT / path, [text for text in rest if "=" in text]).notes == ()
