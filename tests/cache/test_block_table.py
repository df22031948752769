"""Block bookkeeping: who holds which block, in what order blocks are handed out, what comes back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hf_int8_paged.block_allocator import HOLE, RUN_LENGTH, BlockAllocator
from hf_int8_paged.sequences.block_table import BlockTable

CPU = torch.device("cpu")


def table_of(num_blocks: int, batch: int = 1, tokens: int = 0) -> BlockTable:
    table = BlockTable(BlockAllocator(num_blocks), block_size=16)
    if tokens:
        table.extend(batch, tokens)
    return table


def test_a_sequence_gets_ascending_blocks():
    allocator = BlockAllocator(40)
    first = allocator.allocate(11)
    assert first.tolist() == list(range(11))
    assert allocator.allocate(3, after=first[-1]).tolist() == [11, 12, 13]


def test_sequences_that_grow_in_turn_keep_runs_of_their_own():
    table = table_of(64, batch=4, tokens=16)
    for _ in range(15):
        table.extend(4, 16)
    for blocks in table.ids.tolist():
        jumps = sum(b != a + 1 for a, b in pairwise(blocks))
        assert jumps <= len(blocks) / RUN_LENGTH
    assert sorted(table.ids.ravel().tolist()) == list(range(64))


@pytest.mark.parametrize("num_blocks", [1, 7, 8, 9, 23])
def test_every_block_can_be_taken_and_given_back(num_blocks):
    allocator = BlockAllocator(num_blocks)
    for _ in range(3):
        taken = [allocator.allocate(1)[0] for _ in range(num_blocks)]
        assert sorted(taken) == list(range(num_blocks))
        assert allocator.num_free == 0
        with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
            allocator.allocate(1)
        allocator.release(taken[::-1])
        assert allocator.num_free == num_blocks


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go():
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    allocator.retain(blocks)
    allocator.release(blocks)
    assert allocator.num_free == 0
    allocator.release(blocks[:1])
    assert allocator.num_free == 1
    assert allocator.ref_count(blocks[1]) == 1


def test_growth_adds_free_blocks_and_completes_the_last_run():
    allocator = BlockAllocator(5)
    allocator.allocate(5)
    allocator.grow(24)
    assert allocator.num_free == 19
    assert sorted(allocator.allocate(19)) == list(range(5, 24))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32])
def test_blocks_needed_is_what_extend_takes(tokens):
    table = table_of(64, batch=3, tokens=13)
    needed, free = table.blocks_needed(3, tokens), table.allocator.num_free
    table.extend(3, tokens)
    assert free - table.allocator.num_free == needed
    assert table.length == 13 + tokens
    assert table.ids_on(CPU).shape == (3, -(-table.length // 16))


def test_a_shared_partly_filled_last_block_is_replaced_before_it_is_written():
    table = table_of(32, batch=2, tokens=20)
    last = table.ids[:, -1].tolist()
    table.allocator.retain(last[:1])
    assert table.blocks_needed(2, 1) == 1
    ((source, private),) = table.extend(2, 1)
    assert source == last[0] != private == table.ids[0, -1]
    assert table.ids_on(CPU)[0, -1] == private
    assert table.ids[1, -1] == last[1]
    assert table.allocator.ref_count(source) == 1


def test_a_shared_full_last_block_stays_shared():
    table = table_of(32, tokens=32)
    table.allocator.retain(table.ids[0].tolist())
    assert not len(table.extend(1, 1))
    assert table.allocator.num_used == 3


def test_blocks_before_a_position_come_back_as_holes():
    table = table_of(32, batch=2, tokens=100)
    assert table.drop_before(49)
    assert not table.drop_before(49)
    assert table.allocator.num_used == 2 * 4
    assert (table.ids_on(CPU)[:, :3] == HOLE).all()
    assert (table.ids_on(CPU)[:, 3:] >= 0).all()


def test_a_long_chunk_leaves_out_blocks_that_nobody_will_read():
    table = table_of(64, batch=1, tokens=20)
    table.extend(1, 500, keep_from=480)
    assert [b == HOLE for b in table.ids[0].tolist()] == [False] * 2 + [True] * 28 + [False] * 3
    table.drop_before(480)
    assert table.allocator.num_used == 3


def test_truncate_gives_blocks_back():
    table = table_of(64, batch=2, tokens=100)
    table.truncate(33)
    assert table.length == 33
    assert table.allocator.num_used == 2 * 3
    table.extend(2, 15)
    assert table.allocator.num_used == 2 * 3
    table.clear()
    assert table.allocator.num_used == 0


def test_a_device_mirror_follows_changes_only():
    table = table_of(64, batch=2, tokens=10)
    device = torch.device("meta")
    first = table.ids_on(device)
    assert first.device == device
    assert first.shape == (2, 1)
    base = first._base
    table.extend(2, 1)
    assert table.ids_on(device)._base is base, "nothing changed, so nothing is copied"
    table.extend(2, 10)
    assert table.ids_on(device)._base is not base
