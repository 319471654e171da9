"""docs/npu.md is drawn from what tests prove."""

from docs import npu


def test_the_page_is_that_of_today() -> None:
    assert npu.PAGE.read_text(encoding="utf-8") == npu.page(), "run make npu"
