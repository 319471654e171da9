"""Steps of a `Case` with parameters on the host or on the device, where only copies may touch what lies on the host."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn import tree
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.weights.host_memory import HOST
from mmfn.parallel.weights.hosted import fetch_in_graph
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import trained_paths
from mmfn.train import optim
from mmfn.train.guard import Guard
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import tiny
from tests.batches import with_inputs
from tests.parallel.conformance import Cell, batch_of
from tests.tiny import TRAINED, model_of
from tests.train.hosted_cases import Case, build_optimizer

RATE = schedule("cosine", peak=1e-2, num_steps=9, warmup_steps=1)
NUM_STEPS, BAD = 4, 2  # the step of number BAD is not finite


class OnlyCopies(TorchDispatchMode):
    """Refuses every operator on the memory of some tensors but copies from and to it, and looks at it.

    So a device whose memory is another than the host's would do the same.
    """

    is_eager = True  # hand-written Functions run as in plain eager execution

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages = {x.untyped_storage()._cdata for x in tensors}
        self.num_copies = self.num_buffers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = [x for x in tree.leaves([list(args), dict(kwargs or {})]) if isinstance(x, Tensor)]
        if any(local(x).untyped_storage()._cdata in self.storages for x in given):
            assert func in ALLOWED, f"{func} on what lies on the host"
            self.num_copies += func is torch.ops.aten.copy_.default
        self.num_buffers += func is torch.ops.mmfn.counted_empty.default and args[2] == HOST
        return func(*args, **(kwargs or {}))


ALLOWED = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.detach.default,
    torch.ops.mmfn.counted_empty.default,
    fetch_in_graph._opoverload,
}


def take_steps(case: Case, mesh: Mesh, *, is_hosted: bool, is_watched: bool) -> list[Any]:
    """After each step: metrics and copies of the state's leaves."""
    model = model_of(case.family, case.num_layers)
    specs = TRAINED[case.trained](model.family, model.cfg)
    program = pipe(Program.of(specs, mesh=mesh), *case.transforms, *([offload("parameters")] if is_hosted else []))
    params = tree.map(lambda x: x.to(case.dtype), tiny.with_adapters(model.params, specs))
    params = shard_params(params, program.specs, mesh) if mesh.layout.world > 1 else params
    writer = build_optimizer(case.optimizer, specs)
    writer = optim.on_host(writer, 700, what=case.what) if is_hosted else writer
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), writer)
    guard = Guard(window=4, factor=100.0)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=RATE, guard=guard)
    state = init_state(params, optimizer, specs, guard)
    pack = {"segment_multiple": segment_multiple(case.kind, case.layout)} if case.layout.cp > 1 else {}
    cell = Cell(layout=case.layout, name="", transforms=(), family=case.family, num_layers=case.num_layers, pack=pack)
    batch = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    bad = with_inputs(batch, lambda x: x * torch.nan)
    found, places = [], [local(x).data_ptr() for x in tree.leaves(state["params"])]
    for number in range(NUM_STEPS):
        watch = OnlyCopies([local(x) for x in tree.leaves(state["params"])])
        with watch if is_watched else nullcontext():
            state, metrics = step(state, [bad if number == BAD else batch] * case.micro_batches)
        assert [local(x).data_ptr() for x in tree.leaves(state["params"])] == places, "they stay where they are"
        assert number == 0 or watch.num_buffers == 0, "buffers of the host are made once"
        assert not is_watched or watch.num_copies >= len(places) + len(trained_paths(specs))
        found.append((metrics, {path: local(x).clone() for path, x in tree.items(state)}))
    return found
