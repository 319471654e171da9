"""FLOPs from what a batch holds: for every family those that torch counts of a real forward and backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, TEXT, Sample
from mmfn.models import work
from mmfn.ops.gated_delta_chunks import CHUNK
from mmfn.spec import trained_paths
from mmfn.train.objective import loss_weights, resolve
from tests.batches import packed, wide
from tests.tiny import TINY, TRAINED, media_kinds, model_of, sample, with_adapters

CASES = [name for name in TRAINED if name != "lora with dropout"]  # what it drops changes no product


def text_sample(length: int) -> Sample:
    tokens_T = 5 + torch.arange(length) % 50
    kinds_T = torch.full((length,), TEXT)
    return Sample(tokens_T=tokens_T, labels_T=torch.where(tokens_T % 3 == 0, tokens_T, IGNORE), kinds_T=kinds_T)


def whole_chunks(model, seed):
    """A batch without padding of all that the model reads, in whole chunks of the delta rule, which counts these."""
    kinds = media_kinds(model.family, model.cfg)
    samples = [sample(model.family, model.cfg, seed, kinds), sample(model.family, model.cfg, seed + 1, kinds[::-1])]
    used = sum(s.tokens_T.numel() for s in samples)
    return packed(model, [*samples, text_sample(CHUNK - used % CHUNK)])


class Extras(TorchDispatchMode):
    """Counts what torch takes for a product but is a sum, that of the probabilities of experts over tokens and its
    gradient, and the backwards of the delta rule."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts, self.flops, self.backwards = num_experts, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            (m, k), n = args[0].shape, args[1].shape[1]
            self.flops += 2 * m * k * n * (n == self.num_experts and 1 in (m, k))
        self.backwards += func is torch.ops.mmfn.gated_delta_rule_grad.default
        return out


def counted(model, params, specs, batch):
    """What torch counts of a step's gradient, without what is computed again in a backward."""
    leaves = dict(tree.items(params))
    trained = [leaves[path].requires_grad_() for path in trained_paths(specs)]
    moe = getattr(model.cfg, "moe", None)
    with Extras(moe.num_experts if moe else 0) as extras, FlopCounterMode(display=False) as counter:
        loss, _ = mmfn.loss(params, wide(batch), model)
        torch.autograd.grad(loss, trained)
    found = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    found["mmfn.attention_grad"] = found.get("mmfn.attention_grad", 0) * 4 // 5  # the scores
    if "mmfn.gated_delta_rule_grad" in found:
        cfg, (C, V) = model.cfg.delta, (model.cfg.delta.key_dim, model.cfg.delta.value_dim)
        chunks = 2 * CHUNK * (1 + 2 * C + V) + 2 * (CHUNK**2 - 1) // 3  # `_chunks`
        again = chunks + 2 * 3 * C * V + 2 * CHUNK * C  # and the scan, u, products of queries and keys
        found["mmfn.gated_delta_rule_grad"] -= extras.backwards * cfg.num_value_heads * batch.tokens_T.numel() * again
    return sum(found.values()) - extras.flops


def predicted(model, specs, batch):
    weights = loss_weights(resolve("per_token_loss"), model.family, model.cfg)
    flow = {part: stages for part, stages in model.family.flow(model.cfg).items() if weights.get(part, 1)}
    found = work.work_of(specs, flow, model.family.experts_per_token(model.cfg))
    return work.flops_of(found, work.counts_of(batch))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("trained", CASES)
def test_flops_are_those_of_a_real_forward_and_backward(name, trained):
    model = model_of(name, 3)
    specs = TRAINED[trained](model.family, model.cfg)
    params = with_adapters(model.params, specs)
    batch = whole_chunks(model, seed=2)
    found = predicted(model, specs, batch)
    assert sum(found.values()) == counted(model, params, specs, batch), found
    assert all(n > 0 for n in found.values())


@pytest.mark.parametrize("name", TINY)
def test_padding_counts_nothing_and_media_and_tokens_do(name):
    model = model_of(name)
    specs, exact = model.family.specs(model.cfg), whole_chunks(model, seed=4)
    T, N = exact.tokens_T.numel(), exact.num_segments
    units = {tower: 2 * t.items_I.sum() for tower, t in exact.towers.items()}
    again = [sample(model.family, model.cfg, 4, kinds) for kinds in (media_kinds(model.family, model.cfg), ())]
    padded = packed(model, again[:1], tokens=2 * T, segments=2 * N, units=int(max(units.values())), segment_multiple=8)
    found = predicted(model, specs, padded)
    assert found == predicted(model, specs, packed(model, again[:1]))
    only_text = predicted(model, specs, packed(model, again[1:]))
    assert all(only_text[tower] == 0 < found[tower] for tower in model.family.towers(model.cfg))


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_its_stage(name):
    """A leaf that no stage names would count nothing, without a word."""
    model = model_of(name, 3)
    names = [name for stages in model.family.flow(model.cfg).values() for stage in stages for name in stage.parameters]
    for path in tree.paths(model.family.specs(model.cfg)):
        assert any(path == name or path.startswith(f"{name}/") for name in names), path


def test_a_table_of_experts_counts_those_that_a_row_meets():
    model = model_of("moe", 2)
    specs, batch = model.family.specs(model.cfg), whole_chunks(model, seed=1)
    of_text = {X: work.work_of(specs, model.family.flow(model.cfg), X)["text"]["tokens"] for X in (1, 2, 8)}
    moe, layers = model.cfg.moe, len(model.cfg.moe_layers)
    assert of_text[2] - of_text[1] == 3 * 2 * 3 * moe.d_ff * moe.d_model * layers  # an expert: gate, up and down
    assert of_text[8] - of_text[1] == 7 * (of_text[2] - of_text[1])
    assert work.counts_of(batch)["tokens"] == batch.tokens_T.numel()
