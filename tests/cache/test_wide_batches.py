"""What a step of many sequences costs in Python: no more than one of few. numpy does what grows with the batch."""

from __future__ import annotations

import pytest
import torch

from eval._workloads import Bookkeeping, Step
from hf_int8_paged.block_allocator import BlockAllocator
from hf_int8_paged.kernels import why_unavailable
from tests.counting import Work, operators, python_work


def counted(batch: int, beams: int) -> tuple[dict[str, int], Work]:
    """Torch's operators in one cycle of steps, and Python in the next."""
    step = Bookkeeping(batch, beams)

    def cycle() -> None:
        for _ in range(Bookkeeping.CYCLE):
            step()

    return dict(operators(cycle).called), python_work(cycle)


@pytest.mark.parametrize("beams", [1, 4], ids=["sequences", "beams_reordered_in_each_step"])
def test_the_bookkeeping_of_a_step_takes_no_more_python_for_more_sequences(beams: int) -> None:
    """Steps that need a block for every sequence, those in which windows give one back, and those between."""
    assert counted(1024, beams) == counted(64, beams)


@pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)
@torch.no_grad()
def test_a_step_through_all_layers_takes_no_more_python_for_more_sequences() -> None:
    """One that needs a block for every sequence."""
    few, many = Step(batch=8), Step(batch=64)
    assert python_work(many) == python_work(few)
    assert operators(many).called == operators(few).called


def test_blocks_are_added_taken_and_given_back_without_python_for_each() -> None:
    """As many as 131,072 tokens need."""

    def work(num_blocks: int) -> list[Work]:
        allocator = BlockAllocator(5)
        grown = python_work(lambda: allocator.grow(num_blocks))
        taken = python_work(lambda: allocator.allocate(num_blocks))
        given_back = python_work(lambda: allocator.release(range(num_blocks)))
        assert allocator.num_free == num_blocks
        return [grown, taken, given_back]

    assert work(8192) == work(80)
