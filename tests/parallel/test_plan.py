"""Plans against what runs: the same step on real tensors, the allocator's own events, and virtual ranks."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn import cli, tree
from mmfn.ops.logit_chunks import aligned
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.parallel.planning import devices, plan
from mmfn.parallel.planning import extrapolate as scaling
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.planning.trace import Key, Recorder
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.weights.sharding import local
from mmfn.spec import num_params
from mmfn.train.planning import step_plan, step_trace
from mmfn.train.planning.picture import render
from mmfn.train.schedule import schedule
from mmfn.train.step import make_step
from tests.parallel.allocated import allocated_peak, start
from tests.parallel.layout_cases import LAYOUTS, families_of, name_of, settings_of
from tests.parallel.plan_cases import CASES, EXPERTS, MODELS, TEXT, hf_config, make

SAMPLE = (
    *("one device", "remat", "uniform remat", "block remat", "remat of the tower", "offload", "offload, remat, dp"),
    *("offload optimizer", "offload both, dp"),
    *("offload parameters, remat", "offload parameters, dp", "offload parameters, lora", "offload all"),
    *(
        "frozen tower",
        "lora",
        "micro-batches",
        "experts",
        "dp, remat",
        "dp, released",
        "hsdp",
        "gather",
        "ring, dp",
        "ep",
    ),
    *(
        "ep, exchange kept",
        "capacity, exchange kept",
        *(name for name in MODELS if name in CASES),
        "glm, ep, remat",
        "toy, hsdp",
        "toy, offload parameters",
        "toy, dropout",
    ),
)


@pytest.fixture(autouse=True)
def undefined_memory() -> Any:
    """Deterministic mode fills new memory with another operator, which is no part of a step."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("name", CASES)
def test_a_trace_without_values_is_that_of_the_real_step(name: str) -> None:
    """Collectives, operations and bytes alive in every stretch, to the byte."""
    setup, layout = make(**CASES[name])
    num_layers = setup.cfg.num_layers
    step_trace.trace_step(setup, layout, num_layers)  # caches of attention
    real = step_trace.trace_step(setup, layout, num_layers, is_fake=False)
    fake = step_trace.trace_step(setup, layout, num_layers)
    assert fake.count == real.count
    assert fake.sent_bytes == real.sent_bytes
    assert fake.flops == real.flops
    if "omni" in name:  # a convolution's kernel chooses the order of its result, which is then copied or not
        assert dict(fake.account) == pytest.approx(dict(real.account), rel=0.02)
    else:
        assert fake.account == real.account
    if name.endswith("bfloat16"):  # layer norm keeps statistics in bfloat16 on the CPU, elsewhere (and here) in float32
        assert fake.peak.total == pytest.approx(real.peak.total, rel=1e-3)
    else:
        assert fake.peaks == real.peaks


def test_what_selective_remat_keeps_is_computed_once_and_counted() -> None:
    """Under it attention and experts are operators of ours, in place of torch's."""
    plain, layout = make(moe=True)
    kept, _ = make(moe=True, remat="selective", remat_save=["attention", "experts"])
    expected, actual = (step_trace.trace_step(setup, layout, 2).flops for setup in (plain, kept))
    for site in ("attention", "experts"):
        for phase in ("forward", "backward"):
            assert actual[phase, site] == expected[phase, site] > 0


@pytest.mark.parametrize("trained", ["all", "decoder", "lora"])
def test_mfu_counts_what_the_model_needs_and_hfu_what_is_computed_again(trained: str) -> None:
    """The trace, but that the backward of attention computes scores again, one product of five, that the head has zero
    rows, and that the gradient of a norm's weight is written as a product."""
    cpu = devices.device("cpu")
    plain, again, many = (
        step_plan.plan(*make(trained=trained, **chosen), cpu)
        for chosen in ({}, {"remat": "full"}, {"micro_batches": 3, "cp": 2, "kind": "ulysses"})
    )
    work = {(w.phase, w.site): w.flops for w in plain.work if w.site in ("attention", "linear", "head")}
    scores, num_labels = work["backward", "attention"] // 5, 54
    zero_rows = work["forward", "head"] * (aligned(num_labels) - num_labels) // aligned(num_labels)
    assert plain.model_flops == sum(work.values()) - scores - zero_rows
    assert again.model_flops == plain.model_flops
    assert again.flops > plain.flops
    assert plain.mfu == pytest.approx(plain.model_flops / (plain.time.total_s * cpu.flops))
    assert again.mfu < plain.mfu < plain.time.hfu
    assert many.model_flops == 3 * plain.model_flops  # a batch of two ranks has twice as many samples


def test_what_is_kept_of_an_exchange_is_counted() -> None:
    """Rows that arrived, rows that came back, counts and sizes; of its collectives none is in the backward again."""
    chosen = {"moe": True, "dp": 2, "ep": 2}
    setup, layout = make(**chosen)
    plain, full, kept = (
        step_trace.trace_step(make(**chosen, **policy)[0], layout, 2)
        for policy in ({}, {"remat": "full"}, {"remat": "selective", "remat_save": ["exchange"]})
    )
    rows, width, experts = setup.workload.tokens * EXPERTS["num_experts_per_tok"], TEXT["hidden_size"], 8
    counts = 2 * (experts // 2)
    num_bytes = 2 * rows * width * 4 + counts * 8 + 2 * 2 * 8
    turn = ("backward", 0, 2 + 2)  # the loss, behind the blocks of the tower and of the text
    more = kept.peaks[turn].parts["activations"] - full.peaks[turn].parts["activations"]
    assert more == 2 * num_bytes
    for site in ("experts", "expert counts"):
        of_site = [{key: n for key, n in t.count.items() if key.site == site} for t in (plain, full, kept)]
        assert of_site[2] == of_site[0] != of_site[1]


def test_a_plan_shows_whole_weights_that_are_released() -> None:
    """Between the passes, of every block more all its weights, each of which some node saves."""
    whole, layers = {}, (3, 6)
    for n in layers:
        for reshard in (False, True):
            setup, layout = make(layers=n, dp=2, reshard_after_forward=reshard)
            peaks = step_trace.trace_step(setup, layout, n).peaks
            whole[n, reshard] = peaks["backward", 0, n + 2].parts["gathered weights"]  # behind those of the tower
    block = setup.family.specs(setup.cfg)["text"]["layers"][0]
    num_bytes = 4 * num_params(block)
    assert whole[6, False] - whole[3, False] == 3 * num_bytes
    assert whole[6, True] == whole[3, True] < whole[3, False] - 3 * num_bytes


@pytest.mark.parametrize("name", SAMPLE)
def test_the_peak_is_that_of_the_allocator(name: str) -> None:
    """torch's own allocation events know nothing of the recorder."""
    setup, layout = make(**CASES[name])
    planned = step_trace.trace_step(setup, layout, setup.cfg.num_layers).peak.total
    allocated, held = allocated_peak(setup, layout)
    assert planned == pytest.approx(allocated + held, rel=0.01)


@pytest.mark.parametrize(
    "chosen",
    [
        *(pytest.param(chosen, id=name) for name, chosen in CASES.items() if make(**chosen)[1].world > 1),
        *(
            pytest.param(
                {**MODELS[family], "trained": case.get("trained", "all"), **settings_of(case)},
                id=f"{family}, {name_of(case)}",
                marks=pytest.mark.slow,
            )
            for case in LAYOUTS
            for family in families_of(case)
        ),
    ],
)
def test_planned_collectives_are_those_of_virtual_ranks(chosen: dict[str, Any]) -> None:
    setup, layout = make(**chosen)

    def run(mesh: Mesh) -> None:
        program = setup.build(setup.cfg, mesh)
        program = replace(program, ops=step_trace.balanced(program.ops))
        state, batches = start(setup, program, mesh)
        rate = schedule("constant", peak=1e-3, num_steps=1)
        make_step(setup.family, setup.cfg, program, setup.objective, setup.optimizer, schedule=rate)(state, batches)

    world = run_virtual(layout, run)
    for rank in {0, layout.world - 1}:
        trace = step_trace.trace_step(setup, layout, setup.cfg.num_layers, rank=rank)
        count: Counter[Any] = Counter()
        sent: Counter[Any] = Counter()
        for call in world.calls[rank]:
            key = (call.site, call.axis, call.name)
            count[key] += 1
            sent[key] += torch.Size(call.shape).numel() * call.dtype.itemsize
        assert _by_call(trace.count) == count
        assert _by_call(trace.sent_bytes) == sent


def _by_call(table: Counter[Key]) -> Counter[Any]:
    out: Counter[Any] = Counter()
    for key, n in table.items():
        out[key.site, key.axis, key.op] += n
    return out


EXTENDED = (
    *("one device", "dp, remat", "experts", "ring, dp", "micro-batches", "uniform remat", "block remat", "every 2"),
    *("remat of the tower", "offload", "offload both, dp", "ep, exchange kept"),
    *("offload parameters, remat", "offload parameters, dp", "toy, hsdp", "toy, ring, ep", "dp, released"),
)


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_traces_equal_whole_ones(name: str) -> None:
    setup, layout = make(**{**CASES[name], "layers": 13})
    cpu = devices.device("cpu")
    short, whole = (step_plan.plan(setup, layout, cpu, all_layers=every) for every in (False, True))
    assert "and extended" in short.notes[-1]
    assert "all 13" in whole.notes[-1]
    assert replace(short, notes=()) == replace(whole, notes=())
    bytes_and_files = [plan.notes[-2].partition(", at most")[0] for plan in (short, whole)]
    assert bytes_and_files[0].startswith("checkpoint: ")
    assert bytes_and_files[0] == bytes_and_files[1]


def test_depths_fit_the_pattern() -> None:
    assert scaling.choose_depths(["a"] * 12, 3, 5) == scaling.Depths(first=5, period=1, front=9, back=1)
    assert scaling.choose_depths(["a", "b"] * 8, 1, 0) == scaling.Depths(first=4, period=2, front=2, back=2)
    behind = scaling.choose_depths(["a"] * 12, 3, 5, num_behind=2)
    assert behind == scaling.Depths(first=7, period=1, front=9, back=3)
    assert scaling.choose_depths(["a"] * 5, 3, 0) is None
    assert scaling.choose_depths([*["a"] * 11, "b"], 0, 0) is None  # the last one differs: nothing repeats to the end


def test_what_is_not_affine_is_not_extended() -> None:
    setup, layout = make(layers=9)
    depths = scaling.choose_depths(["a"] * 9, 1, 2)
    assert depths is not None
    traces = [step_trace.trace_step(setup, layout, n) for n in (*depths.all, depths.first)][1:]
    traces[0].flops["forward", "layers"] += 1
    assert scaling.extend([traces[2], *traces[:2]], depths, 2, 9) is None


def test_state_is_exact_and_a_plan_survives_json(tmp_path: Path) -> None:
    setup, layout = make(moe=True, dp=3, remat="full")
    found = step_plan.plan(setup, layout, devices.device("910b"), rank=2)
    program = setup.build(setup.cfg, recording_mesh(layout, 2))
    state, _ = start(setup, program, program.mesh)
    params = tree.leaves(state["params"])
    assert [leaf.parameter_bytes for leaf in found.leaves] == [local(x).nbytes for x in params]
    assert found.total("gradient") == found.total("parameter")
    moments = sum(local(x).nbytes for x in tree.leaves(state["opt"]) if x.ndim)
    assert found.total("optimizer") == moments
    text = found.to_json()
    assert plan.from_json(text) == found
    assert plan.diff(found, found) == "the plans are equal"
    other = step_plan.plan(setup, layout, devices.device("h100"))
    assert "device: 910b -> h100" in plan.diff(found, other)
    assert "rows are spread evenly" in str(found)
    page = render([found, other])
    assert page.count("<circle") == 2
    assert "100.00%" in page, "the longest bar is as long as there is room"
    assert "http" not in page
    with pytest.raises(ValueError, match="is no plan"):
        plan.from_json("{}")


def test_what_lies_on_the_host_is_shown_and_is_not_the_devices() -> None:
    cpu = devices.device("cpu")
    plain, moved = (step_plan.plan(*make(offload=chosen), cpu) for chosen in ([], ["optimizer", "activations"]))
    moments = 8 * sum(leaf.parameter_bytes for leaf in moved.leaves) // 4
    assert plain.host_bytes == 0
    assert moved.host_bytes >= moments == moved.total("optimizer")
    assert sum(moved.peak_parts.values()) == moved.peak_bytes < plain.peak_bytes
    assert "held on the host" in str(moved)
    assert "held on the host" not in str(plain)
    assert "host: 0 B ->" in plan.diff(plain, moved)
    assert plan.from_json(moved.to_json()) == moved


def test_a_compiled_program_is_refused() -> None:
    setup, layout = make()
    build = setup.build
    setup = replace(setup, build=lambda cfg, mesh: compiled("layer")(build(cfg, mesh)))
    with pytest.raises(ValueError, match="a plan traces the eager step but the program is compiled"):
        step_trace.trace_step(setup, layout, 2)


def test_values_of_parameters_are_never_read() -> None:
    with Recorder(is_fake=True):
        x = torch.empty(3)
        assert x.is_meta
        assert torch.arange(3, device="meta").sum().item() == 3
        with pytest.raises(ValueError, match="reads a value that depends on parameters"):
            (x * 2).sum().item()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(moe=True)))
    path, out = str(tmp_path / "config.json"), str(tmp_path / "plan.json")
    small = ["--tokens", "64", "--sample-tokens", "32", "--image-side", "4", "--device", "h200"]
    options = ["--world", "4", "--json", out, "--html", str(tmp_path / "plan.html")]
    assert cli.main(["plan", path, "layout.ep=2", *small, *options]) == 0
    printed = capsys.readouterr().out
    assert "dp 4, ep 2 (4 ranks)" in printed
    assert "predicted step on h200" in printed
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert cli.main(["plan", "--diff", out, out]) == 0
    assert capsys.readouterr().out == "the plans are equal\n"
    assert cli.main(["plan", path, *small[:-2]]) == 0  # a model alone says no device
    assert "predicted step on 910b" in capsys.readouterr().out
    assert cli.main(["plan", path, "layout.cp=3", "--world", "4", *small]) == 2
    assert "world 4 is no multiple of replicate * cp = 3" in capsys.readouterr().err
    other = str(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")  # beside a config.json that is not meant
    assert cli.main(["plan", other, *small]) == 2
    assert "give a file of that name" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2
    assert "needs CONFIG" in capsys.readouterr().err
    assert cli.main(["plan", path, "--search"]) == 2
    assert "--search needs --world" in capsys.readouterr().err
