"""What sentences of errors are put together from."""

from mmfn.errors import spell_count


def test_numbers_of_things() -> None:
    assert spell_count(1, "rank") == "1 rank"
    assert spell_count(0, "rank") == "0 ranks"
    assert spell_count(1437, "sample") == "1437 samples"
    assert spell_count(1, "process") == "1 process"
    assert spell_count(2, "process") == "2 processes"
