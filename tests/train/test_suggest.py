"""`mmfn suggest`: its first choice is about the best of all there are, and what it writes is a config that fits."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mmfn import cli
from mmfn.errors import UserError
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning import devices
from mmfn.parallel.planning.plan import Plan
from mmfn.train.build.model import check_model, find_family
from mmfn.train.config.load import Settings, load_config
from mmfn.train.config.schema import Config
from mmfn.train.planning.choice import OFFLOADS, Budget, Choice, Space, step_of
from mmfn.train.planning.suggest import BEAM, Measures, planner, suggest
from tests.parallel.plan_cases import hf_config
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
KIB = 1024


def space_of(folder: Path, hf: dict[str, Any], world: int, budgets: Sequence[Budget], **given: Any) -> Space:
    """What is chosen from for a model of that config.json on the device "small"."""
    (folder / "config.json").write_text(json.dumps(hf))
    values: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "data": {"train": "x"},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1},
        "output": {"path": "x"},
        **given,
    }
    settings = Settings(values=values, path=folder, origins={})
    return Space(settings=settings, world=world, device="small", budgets=budgets)


def every(space: Space) -> list[tuple[Budget, Config]]:
    """All configs of a space that are not refused."""
    found = []
    for budget, layout in space.layouts():
        for policy, offload in product(space.policies(layout), space.offloads()):
            with suppress(UserError):
                found.append((budget, space.config(budget, {**layout, **policy, "offload": list(offload)})))
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`small(kib)` gives the device "small" so much memory: a slow host and links that a small model feels."""

    def make(kib: float) -> None:
        device = replace(
            devices.device("910b"),
            name="small",
            memory_bytes=round(kib * KIB),
            flops=1e12,
            memory_bandwidth=1e10,
            link=5e9,
            network=1e9,
            host_link=1e9,
            ranks_per_node=2,
        )
        monkeypatch.setitem(devices.DEVICES, "small", device)

    return make


@pytest.mark.parametrize(
    ("moe", "world"), [(False, 2), pytest.param(True, 4, marks=pytest.mark.slow)], ids=["dense", "experts"]
)
def test_the_first_choice_is_about_the_best(
    tmp_path: Path, small: Callable[[float], None], moe: bool, world: int
) -> None:
    """Within 5 % of the best of all, for memory that holds anything, down to what nothing fits."""
    budgets = [
        Budget(tokens=64, towers={"vision": 32}, fill=0.9),
        Budget(tokens=256, towers={"vision": 128}, fill=0.98),
    ]
    given = {} if moe else {"replicate": 1}
    space = space_of(tmp_path, hf_config(moe=moe, layers=2), world, budgets, layout=given)
    measures = Measures(64)
    small(1e9)

    def plan(config: Config, micro_batches: int | None = None) -> Plan:
        return measures.plan(config, "small", micro_batches)

    def best() -> Choice:
        """Of those that can be planned."""
        return min((Choice(config=c, plan=plan(c), fill=b.fill) for b, c in configs), key=lambda choice: choice.rank)

    configs = every(space)
    peaks = sorted(plan(config).peak_bytes / 0.9 / KIB for _, config in configs)
    assert len(peaks) == 100 or moe
    chosen = set()
    for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.98):
        small(peaks[int(share * len(peaks))] + 1)
        first = suggest(space, plan)[0]
        assert first.fits
        assert first.token_s <= 1.05 * best().token_s, f"{share}: {first} but {best()}"
        chosen.add(str(first.config.layout))
    assert len(chosen) > 2
    small(peaks[0] * 0.9)
    with pytest.raises(
        ValueError, match=f"nothing fits {world} ranks of small, the least is .* a rank; use more ranks"
    ):
        suggest(space, plan)


@pytest.mark.parametrize("offload", OFFLOADS[1:], ids=", ".join)
def test_what_alone_fits_is_found_behind_what_is_faster(
    tmp_path: Path, small: Callable[[float], None], offload: tuple[str, ...]
) -> None:
    """The slowest of all layouts, with that on the host or more: no more is moved than it needs."""
    small(100_000)
    budget = Budget(tokens=64, towers={"vision": 32})
    space = space_of(tmp_path, hf_config(), 4, [budget])
    layouts = [layout for _, layout in space.layouts()]
    assert len(layouts) > BEAM
    any_plan = Measures(64).plan(space.config(budget, layouts[0]), "small")

    def plan(config: Config, micro_batches: int | None = None) -> Plan:
        sizes = config.layout.model_dump()
        place = next(i for i, layout in enumerate(layouts) if layout.items() <= sizes.items())
        fits = place == len(layouts) - 1 and set(config.layout.offload) >= set(offload)
        time = replace(any_plan.time, total_s=1.0 + place + len(config.layout.offload) / 100)
        return replace(any_plan, peak_bytes=KIB * (500 if fits else 200_000), time=time)

    first = suggest(space, plan)[0]
    assert first.fits
    assert first.config.layout.offload == offload
    assert layouts[-1].items() <= first.config.layout.model_dump().items()


def test_what_keeps_more_may_fit_on_the_host_where_less_does_not(
    tmp_path: Path, small: Callable[[float], None]
) -> None:
    small(100_000)
    budget = Budget(tokens=64, towers={"vision": 32})
    space = space_of(tmp_path, hf_config(), 2, [budget], layout={"cp": 1, "replicate": 1})
    ((_, layout),) = space.layouts()
    any_plan = Measures(64).plan(space.config(budget, layout), "small")

    def plan(config: Config, micro_batches: int | None = None) -> Plan:
        remat, offload = config.layout.remat, config.layout.offload
        fits = remat == "full" or (remat, offload) == ("none", ("activations",))
        time = replace(any_plan.time, total_s={"full": 3.0, "selective": 2.0, "none": 1.0}[remat])
        return replace(any_plan, peak_bytes=KIB * (500 if fits else 200_000), time=time)

    first = suggest(space, plan)[0].config.layout
    assert (first.remat, first.offload) == ("none", ("activations",))


def test_what_is_given_is_kept(tmp_path: Path, small: Callable[[float], None]) -> None:
    small(1e9)
    layout = {"cp": 2, "kind": "ulysses", "remat": "full", "offload": []}
    budgets = [Budget(tokens=64, towers={"vision": 32})]
    space = space_of(tmp_path, hf_config(), 2, budgets, layout=layout, data={"train": "x", "batch_tokens": 128})
    choices = suggest(space, lambda config, _: Measures(64).plan(config, "small"))
    assert {(c.config.layout.cp, c.config.layout.dp, c.config.layout.remat) for c in choices} == {(2, 1, "full")}
    assert {c.config.data.batch_tokens for c in choices} == {128}
    impossible = space_of(tmp_path, hf_config(), 2, budgets, layout={"cp": 3})
    with pytest.raises(ValueError, match="no layout of 2 ranks can be planned"):
        suggest(impossible, lambda config, _: Measures(64).plan(config, "small"))


def test_a_given_bucket_decides_on_the_batch(tmp_path: Path, small: Callable[[float], None]) -> None:
    small(1e9)
    layout = {"replicate": 2, "dp": 1, "cp": 1, "ep": 1}
    budget = Budget(tokens=64, towers={"vision": 32})

    def data_of(**data: Any) -> tuple[Any, ...]:
        data = {"train": "x", **data}
        config = space_of(tmp_path, hf_config(), 2, [budget], data=data).config(budget, layout)
        return config.data.token_buckets, config.data.batch_tokens, config.data.batch_samples

    assert data_of(token_buckets=[64, 256]) == ((64, 256), 512, 8)
    assert data_of(batch_samples=6) == ((64,), None, 6)
    assert data_of(batch_samples=8) == ((64,), None, 8)
    assert data_of(max_tokens=64, window_samples=9) == ((64,), 128, 8)


def test_towers_that_are_not_given_have_the_batch_s(tmp_path: Path, small: Callable[[float], None]) -> None:
    """A model that sees and hears, with buckets for one of the two, loads as it is written."""
    small(1e9)
    layout = {"replicate": 2, "dp": 1, "cp": 1, "ep": 1}
    budget = Budget(tokens=64, towers={"vision": 32, "audio": 100})
    for given in ({"vision": [16, 48]}, {"audio": [300]}, {}):
        data = {"train": "x", "tower_buckets": given}
        config = space_of(tmp_path, TINY["omni"](2), 2, [budget], data=data).config(budget, layout)
        expected = {"vision": (32,), "audio": (100,)} | {name: tuple(sizes) for name, sizes in given.items()}
        assert config.data.tower_buckets == expected
        family, cfg = find_family(config.model)
        check_model(config, family, cfg)


@pytest.mark.parametrize(
    ("world", "given", "expected"),
    [
        (2, {"dp": 1, "replicate": 1}, {(1, 1, 2)}),
        (2, {"dp": 1, "cp": 1}, {(2, 1, 1)}),
        (8, {"replicate": 2, "cp": 1}, {(2, 4, 1)}),
        (8, {"dp": 2, "cp": 1}, {(4, 2, 1)}),
        (6, {"replicate": 2, "dp": 1}, {(2, 1, 3)}),
    ],
)
def test_given_sizes_are_those_of_all_layouts(
    tmp_path: Path, small: Callable[[float], None], world: int, given: dict[str, int], expected: set[Any]
) -> None:
    small(1e9)
    space = space_of(tmp_path, hf_config(), world, [Budget(tokens=64)], layout=given)
    assert {(sizes["replicate"], sizes["dp"], sizes["cp"]) for _, sizes in space.layouts()} == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"cp": 2}, r"layout.cp 2 does not divide them; change it or --world"),
        ({"dp": 3, "replicate": 2}, r"layout.replicate 2 \* layout.dp 3 does not divide them"),
        ({"replicate": 1, "dp": 1, "cp": 1}, r"layout.replicate 1 \* layout.dp 1 \* layout.cp 1 is 1; change one"),
        ({"ep": 3}, r"layout.ep 3 must divide the ranks of a copy of the model and its experts"),
        ({"kind": "ring", "cp": 1}, r"layout.kind has no effect with cp 1"),
        ({"remat_save": ["exchange"]}, r"layout.remat_save 'exchange' has no effect with ep 1"),
        ({"remat_layers": 9}, r"layout.remat_layers is 9 but has no effect above the 2 layers"),
    ],
)
def test_why_there_is_no_layout(
    tmp_path: Path, small: Callable[[float], None], given: dict[str, int], reason: str
) -> None:
    small(1e9)
    space = space_of(tmp_path, hf_config(), 3, [Budget(tokens=64)], layout=given)
    with pytest.raises(ValueError, match=f"no layout of 3 ranks can be planned: {reason}"):
        suggest(space, lambda config, _: Measures(64).plan(config, "small"))


def test_a_refusal_is_said_before_what_a_small_layout_idles(tmp_path: Path, small: Callable[[float], None]) -> None:
    small(1e9)
    space = space_of(tmp_path, hf_config(), 2, [Budget(tokens=64)], layout={"kind": "usp"})
    assert next(sizes["cp"] for _, sizes in space.layouts()) == 1
    with pytest.raises(ValueError, match=r"'usp'\) over cp 2 \(ulysses 1\) needs 1 < ulysses < cp"):
        suggest(space, lambda config, _: Measures(64).plan(config, "small"))
    budget = Budget(tokens=64, towers={"vision": 32})
    heads = space_of(tmp_path, hf_config(), 4, [budget], layout={"ulysses": 2, "cp": 4})
    ((_, layout),) = heads.layouts()
    assert heads.config(budget, layout).layout.sizes == Layout(cp=4, ulysses=2)


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({"remat_save": ["attention", "matmul"]}, ["selective"]),
        ({"reshard_after_forward": True}, ["none"]),
        ({"reshard_after_forward": False}, ["none", "selective", "selective", "full"]),
        ({"keep_gathered": True}, ["selective", "selective", "full"]),
        ({"remat_layers": 2}, ["block", "uniform"]),
        ({"remat_layers": 2, "reshard_after_forward": True}, ["block"]),
        ({"remat": "uniform", "remat_layers": 2}, [None]),
    ],
)
def test_what_is_computed_again_suits_what_is_given(
    tmp_path: Path, small: Callable[[float], None], given: dict[str, Any], kinds: list[str | None]
) -> None:
    small(1e9)
    space = space_of(tmp_path, hf_config(), 2, [Budget(tokens=64, towers={"vision": 32})], layout=given)
    policies = space.policies({"replicate": 2, "dp": 1, "cp": 1, "ep": 1})
    assert [policy.get("remat") for policy in policies] == kinds


@pytest.mark.parametrize(
    ("samples", "layout", "expected"),
    [
        (8, {"dp": 4}, (1, 200 / 1000)),
        (8, {"replicate": 2, "dp": 2}, (1, 200 / 1000)),
        (8, {"cp": 4}, (1, 800 / 1000)),  # one batch of all ranks
        (8, {"dp": 2, "cp": 2}, (1, 400 / 1000)),
        (12, {"cp": 4}, (2, 1200 / 2000)),
        (10, {"dp": 4}, (1, 250 / 1000)),  # 3, 3, 2 and 2 samples
        (38, {"dp": 4}, (2, 950 / 2000)),  # 10 do not fit one batch, of which 98 % are real
        (4 * 98, {"dp": 4}, (10, 0.98)),
    ],
)
def test_a_step_of_samples(
    tmp_path: Path, small: Callable[[float], None], samples: int, layout: dict[str, int], expected: tuple[int, float]
) -> None:
    """Samples of 100 tokens each, in batches of 1000."""
    small(1e9)
    budget = Budget(tokens=1000, fill=0.98, sample_tokens=100)
    space = space_of(tmp_path, hf_config(), 4, [budget], data={"train": "x", "batch_samples": samples})
    assert step_of(space.config(budget, {"replicate": 1, "dp": 1, **layout}), budget) == pytest.approx(expected)
    by_tokens = space_of(tmp_path, hf_config(), 4, [budget]).config(budget, {"replicate": 1, "dp": 1, **layout})
    assert step_of(by_tokens, budget) == (None, 0.98)


def test_a_step_of_samples_is_planned_as_it_is(tmp_path: Path, small: Callable[[float], None]) -> None:
    """Its micro-batches, and memory for two, which a step of longer samples takes."""
    small(1e9)
    budget = Budget(tokens=64, towers={"vision": 32}, sample_tokens=32)
    space = space_of(tmp_path, hf_config(), 1, [budget], data={"train": "x", "batch_samples": 2})
    config = space.config(budget, {"replicate": 1, "dp": 1, "cp": 1, "ep": 1})
    with planner("small", 1, 64) as (plan, _):
        one, two, three, usual = (plan(config, n) for n in (1, 2, 3, None))
    alone = Measures(64).plan(config, "small", 1)
    assert (one.tokens, two.tokens, three.tokens, usual.tokens) == (64, 128, 192, 128)
    assert (one.time, one.peak_bytes) == (alone.time, two.peak_bytes)
    assert alone.peak_bytes < two.peak_bytes == usual.peak_bytes
    assert one.time.total_s < two.time.total_s < three.time.total_s


def test_of_the_demo(small_demo: Path, full_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, from data to a file that mmfn check and mmfn plan accept."""
    out = tmp_path / "run.yaml"
    model, data = str(small_demo / "model"), str(small_demo / "train.json")
    keep = [f"data.root={full_demo}", "model.init=random", f"output.path={tmp_path / 'run'}"]
    command = ["suggest", model, data, "--device", "cpu", "--world", "2", "--jobs", "1", "--out", str(out), *keep]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("next: step ") for line in printed) == 3
    (best,) = [line for line in printed if line.startswith("best: step ")]
    assert "tokens/s" in best
    config = load_config(out).config
    assert config.layout.world == 2
    assert config.data.batch_tokens == config.data.token_buckets[-1] * config.layout.replicate * config.layout.dp
    assert config.train.epochs == 1
    head = out.read_text().split("\n\n")[0]
    assert "Expected of a rank: " in head
    assert f"# Start: torchrun --nproc-per-node 2 -m mmfn train {out}" in head
    assert cli.main(["check", str(out), "--world", "2"]) == 0
    assert "it fits cpu" in capsys.readouterr().out
    assert cli.main(["plan", str(out), "--device", "cpu"]) == 0
    assert ", fits" in capsys.readouterr().out


def test_of_the_demo_by_lora_on_another_device(
    small_demo: Path, full_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed, where no file is named."""
    model, data = str(small_demo / "model"), str(small_demo / "train.json")
    given = [f"data.root={full_demo}", "layout.cp=1", "layout.replicate=1", "layout.remat=none"]
    options = ["--device", "h100", "--world", "1", "--lora", "--jobs", "1", "--rows", "10"]
    assert cli.main(["suggest", model, data, *options, *given]) == 0
    printed = capsys.readouterr().out
    assert "lora:\n  rank: 16\n  alpha: 32.0\n" in printed
    assert "  device: cuda\n" in printed
    assert "# Start: mmfn train suggested.yaml" in printed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data.token_buckets=[64]", (64, {"vision": (16,)}, 64, 0.75)),
        ("data.tower_buckets={vision: [16]}", (2048, {"vision": (16,)}, 2048, 0.05)),
        ("data.token_buckets=[4096]", (4096, {"vision": (1408,)}, 4096, 1.0)),
        ("data.token_buckets=[8]", None),
        ("data.batch_samples=8", (2048, {"vision": (704,)}, None, 0.19)),
    ],
)
def test_of_the_demo_with_given_buckets(
    small_demo: Path, full_demo: Path, tmp_path: Path, given: str, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Towers, the size of a step and the share of real tokens are those of the given buckets."""
    model, data, out = str(small_demo / "model"), str(small_demo / "train.json"), tmp_path / "run.yaml"
    keep = [f"data.root={full_demo}", "layout.remat=none", f"output.path={tmp_path / 'run'}", "model.init=random"]
    options = ["--device", "cpu", "--world", "1", "--jobs", "1", "--rows", "50", "--out", str(out)]
    code = cli.main(["suggest", model, data, *options, *keep, given])
    if expected is None:
        assert code == 2
        assert "no sample fits data.token_buckets; raise or remove what is too small" in capsys.readouterr().err
        return
    section = load_config(out).config.data
    real = int(out.read_text().split("% are real")[0].rpartition(" ")[2]) / 100
    assert "\n# Planned with samples of 48 tokens each, " in out.read_text()
    tokens, towers, step, most = expected
    assert (section.token_buckets, section.tower_buckets, section.batch_tokens) == ((tokens,), towers, step)
    assert 0 < real <= most


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--world", "0"], "--world 0 and --rows 20000 must be positive"),
        (["--world", "1", "--jobs", "-1"], "--jobs -1 must be positive; raise it"),
        (["--world", "1", "--device", "tpu"], "device 'tpu' is unknown"),
        (["--world", "1", "--out", "none/x.yaml"], "lies in a folder that does not exist"),
        (["--world", "1", "layout.tp=2"], "unknown key 'layout.tp'"),
        (["--world", "1"], "model.path 'none' is no folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["suggest", "none", "none.json", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


PUBLISHED = {
    "Qwen3-VL-2B": ("910b", 8, []),
    "Qwen3-VL-8B": ("910b", 8, ["--lora"]),
    "Qwen2.5-VL-7B": ("a3", 8, []),
    "Qwen3.5-9B": ("h100", 8, []),
    "Qwen3-VL-30B-A3B": ("910b", 16, ["layout.ep=8"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_of_published_sizes(
    small_demo: Path, full_demo: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of their sizes with the demo's tokenizer: what is suggested passes all checks, and fits by its own plan."""
    device, world, given = PUBLISHED[name]
    folder, out = tmp_path / "model", tmp_path / "run.yaml"
    shutil.copytree(small_demo / "model", folder)
    hf = json.loads((ROOT / "configs" / "models" / name / "config.json").read_text())
    demo = json.loads((folder / "config.json").read_text())
    tokens = {key: value for key, value in demo.items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps({**hf, **tokens}))
    where = [f"data.root={full_demo}", f"output.path={tmp_path / 'run'}", "layout.cp=1", "layout.replicate=1"]
    options = ["--device", device, "--world", str(world), "--jobs", "1", "--out", str(out)]
    assert cli.main(["suggest", str(folder), str(small_demo / "train.json"), *options, *given, *where]) == 0
    assert "best: step " in capsys.readouterr().out
    assert cli.main(["check", str(out), "--no-files", "--world", str(world), "--device", device]) == 0
    assert f"it fits {device}" in capsys.readouterr().out
    assert cli.main(["plan", str(out), "--device", device]) == 0
    assert f"  {device}: " in (printed := capsys.readouterr().out)
    assert ", fits" in printed
