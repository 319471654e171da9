"""Every combination of replicate, dp, cp and ep gives the step of one device, and the collectives of its plan."""

import pytest

from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.train.build.program import build_remat
from mmfn.train.config.layout import LayoutSection
from tests.parallel.conformance import Cell, check_cell, spread
from tests.parallel.layout_cases import CELLS, LAYOUTS, Case, name_of, settings_of
from tests.tiny import model_of

ROW = 384  # tokens of a batch of any half of the samples, padded: a capacity needs as many on every rank


def cell(case: Case, family: str) -> Cell:
    """The case on a model and a batch of the conformance matrix."""
    section = LayoutSection(**settings_of(case))
    model = model_of(family)
    layout, kind, capacity = section.sizes, section.kind, section.capacity
    pack = {"segment_multiple": segment_multiple(kind, layout)} if layout.cp > 1 else {}
    return Cell(
        layout=layout,
        name=name_of(case),
        transforms=(
            expert_parallel("dropless" if capacity is None else "capacity", capacity=capacity),
            data_parallel(),
            spread(kind, family),
            *build_remat(section, list(model.family.stacks(model.cfg))),
            *(offload(what) for what in section.offload),
            *([vocabulary_parallel()] if section.head == "sharded" else []),
        ),
        family=family,
        batch=case["batch"],
        trained=case.get("trained", "all"),
        pack=pack | ({} if capacity is None else {"tokens": ROW}),
    )


@pytest.mark.parametrize(("case", "family"), CELLS)
def test_a_step_of_a_model(case: Case, family: str) -> None:
    check_cell(cell(case, family))


def test_every_layout_is_there_once() -> None:
    assert len(LAYOUTS) >= 40
    assert len({name_of(case) for case in LAYOUTS}) == len(LAYOUTS)
    assert all(LayoutSection(**settings_of(case)).sizes.world in range(2, 9) for case in LAYOUTS)
