import pytest

from rayllm.scheduler.block_pool import BlockPool


def test_blocks_are_given_once_until_they_are_released():
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.num_free, pool.num_used) == (0, 4)
    pool.check([first, second])
    pool.release(first)
    assert sorted(pool.allocate(3)) == sorted(first)


def test_a_request_for_more_than_is_free_changes_nothing():
    pool = BlockPool(3)
    held = pool.allocate(2)
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.check([held])


def test_a_shared_block_is_free_only_when_its_last_owner_releases_it():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.check([blocks, blocks])
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_used == 0
    pool.check()


def test_a_kept_block_counts_as_free_and_comes_back_with_its_owner():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.keep(blocks[0])
    pool.release(blocks)
    assert pool.num_free == 2
    pool.share(blocks)
    assert pool.num_free == 1
    assert pool.allocate(1) != blocks
    pool.check([blocks, [1 - blocks[0]]])


def test_free_blocks_go_before_cached_ones_and_the_longest_unused_is_evicted_first():
    pool, evicted = BlockPool(4), []
    pool.on_evict = evicted.append
    old, new, plain = pool.allocate(1), pool.allocate(1), pool.allocate(2)
    for block in old + new:
        pool.keep(block)
    for blocks in (old, new, plain):
        pool.release(blocks)
    assert sorted(pool.allocate(2)) == sorted(plain)
    assert evicted == []
    assert pool.allocate(1) == old
    assert evicted == old
    pool.release(old)
    assert pool.num_free == 2
    assert pool.allocate(1) == old, "evicted, it is no longer cached but plainly free"
    pool.check([plain, old])


def test_a_tail_is_evicted_before_its_head():
    pool, evicted = BlockPool(3), []
    pool.on_evict = evicted.append
    table = pool.allocate(3)
    for block in table:
        pool.keep(block)
    pool.release(table)
    pool.allocate(3)
    assert evicted == table[::-1]


def test_a_block_that_is_not_worth_keeping_is_plainly_free_once_it_has_no_owner():
    pool = BlockPool(2)
    owned, cached = pool.allocate(1), pool.allocate(1)
    for block in owned + cached:
        pool.keep(block)
    pool.release(cached)
    for block in owned + cached:
        pool.forget(block)
    pool.check([owned])
    assert (pool.kept, pool.num_free) == (set(), 1)
    assert pool.allocate(1) == cached


def test_owned_by_none_but_some_tables_are_the_blocks_that_no_other_shares():
    pool = BlockPool(6)
    mine, theirs = pool.allocate(3), pool.allocate(2)
    pool.share(mine[:1])
    pool.share(theirs[:1])
    assert pool.num_owned_by_none_but([mine]) == 2
    assert pool.num_owned_by_none_but([mine, mine[:1], theirs]) == 4
    assert pool.num_owned_by_none_but([]) == 0


def test_releasing_a_block_without_an_owner_is_an_error():
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="no owner"):
        pool.release([0])


def test_check_sees_a_leak_and_a_wrong_count():
    pool = BlockPool(2)
    table = pool.allocate(1)
    with pytest.raises(AssertionError, match="differ"):
        pool.check()
    with pytest.raises(AssertionError, match="differ"):
        pool.check([table, table])
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check([table])
