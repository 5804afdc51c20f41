"""Tensor-parallel parameters: what works equals one process, what does not says what to do."""

from tests.distributed.tensor_parallel import PAGE, alone, inserted, results


def test_the_table_of_the_manual_is_what_was_tried():
    page = PAGE.read_text()
    assert inserted(page) == page


def test_what_works():
    for layout in ("TP", "FSDP2 and TP"):
        assert {use: results()[layout][use] for use in alone()} == dict.fromkeys(alone(), "")


def test_errors_say_what_to_do():
    for told in results().values():
        for error in filter(None, told.values()):
            assert error.startswith("ValueError: ")
            assert " must " in error
            assert "jd.distributed.sharded" in error or "let it take all" in error
