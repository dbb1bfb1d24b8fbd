from scheduler.simulated_worker import make_sequence, make_spans

from rayllm.scheduler.block_pool import BlockPool
from rayllm.scheduler.prefix_cache import CachedPrefix, PrefixCache
from rayllm.scheduler.sequence import BlockTable, Sequence, Status

BLOCK_SIZE = 4
PROMPT = list(range(1, 13))  # three blocks


class Cache:
    """A prefix cache over a small pool, and sequences for it."""

    def __init__(self, num_blocks: int = 8, *, enabled: bool = True, windows=(None,)):
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, make_spans(windows=windows, block_size=BLOCK_SIZE), enabled=enabled)
        self.num_arrivals = 0

    def sequence(self, tokens: list[int], **request) -> Sequence:
        self.num_arrivals += 1
        return make_sequence(tokens, arrival=self.num_arrivals, **request)

    def start(self, tokens: list[int], **request) -> Sequence:
        sequence = self.sequence(tokens, **request)
        sequence.status = Status.RUNNING
        end = -(-len(tokens) // BLOCK_SIZE)
        sequence.tables = [BlockTable(self.pool.allocate(end), end) for _ in self.cache._spans]
        self.cache.announce(sequence)
        return sequence

    def computed(self, tokens: list[int], **request) -> Sequence:
        sequence = self.start(tokens, **request)
        self.cache.publish(sequence, len(tokens) // BLOCK_SIZE)
        return sequence

    def lookup(self, tokens: list[int], **request) -> list[int] | None:
        """The blocks found in the only group."""
        return blocks_of(self.cache.lookup(self.sequence(tokens, **request)))


def blocks_of(found: Sequence | CachedPrefix | None) -> list[int] | None:
    if found is None:
        return None
    [table] = found.tables
    return table.blocks


def test_published_blocks_are_found_up_to_the_first_difference():
    cache = Cache()
    owner = cache.computed(PROMPT)
    assert cache.lookup([*PROMPT, 99]) == blocks_of(owner)
    assert cache.lookup([*PROMPT[:8], 50, 51, 52, 53, 54]) == blocks_of(owner)[:2]
    assert cache.lookup([99, *PROMPT]) == []
    cache.cache.check([owner])


def test_the_last_token_is_never_served_from_the_cache():
    cache = Cache()
    owner = cache.computed(PROMPT)
    assert cache.lookup(PROMPT) == blocks_of(owner)[:2]
    assert cache.lookup(PROMPT[:4]) == []
    assert cache.lookup(PROMPT[:5]) == blocks_of(owner)[:1]


def test_a_block_is_known_by_its_whole_prefix_and_not_by_its_own_tokens():
    cache = Cache()
    cache.computed(PROMPT)
    assert cache.lookup([*PROMPT[4:8], 99]) == []
    assert cache.lookup([90, 91, 92, 93, *PROMPT[4:]]) == []


def test_salts_do_not_share():
    cache = Cache()
    owner = cache.computed(PROMPT, cache_salt="a")
    assert cache.lookup([*PROMPT, 99], cache_salt="a") == blocks_of(owner)
    assert cache.lookup([*PROMPT, 99], cache_salt="b") == []
    assert cache.lookup([*PROMPT, 99]) == []


def test_blocks_on_either_side_of_the_rope_boundary_do_not_share():
    cache = Cache()
    cache.computed(PROMPT)
    beyond = cache.sequence([*PROMPT, 99])
    beyond.choose_rope(rope_boundary=12)
    assert beyond.is_beyond
    assert blocks_of(cache.cache.lookup(beyond)) == []
    assert cache.lookup([*PROMPT, 99]) != []


def test_an_evicted_block_is_forgotten():
    cache = Cache(num_blocks=3)
    owner = cache.computed(PROMPT)
    cache.pool.release(blocks_of(owner))
    assert cache.lookup([*PROMPT, 99]) == blocks_of(owner)
    cache.pool.allocate(1)
    assert cache.lookup([*PROMPT, 99]) == blocks_of(owner)[:2]
    cache.cache.check([])


def test_the_second_of_two_equal_blocks_stays_private():
    cache = Cache()
    first, second = cache.start(PROMPT), cache.start(PROMPT)
    cache.cache.publish(second, 1)
    cache.cache.publish(first, 3)
    assert cache.lookup([*PROMPT, 99]) == [blocks_of(second)[0], *blocks_of(first)[1:]]
    cache.cache.publish(second, 3)
    assert second.num_published == 3
    cache.cache.check([first, second])
    cache.pool.release(blocks_of(first))
    cache.pool.release(blocks_of(second))
    assert cache.lookup([*PROMPT, 99]) == [blocks_of(second)[0], *blocks_of(first)[1:]]


def test_a_block_that_a_running_sequence_computes_is_waited_for():
    cache = Cache()
    owner = cache.start(PROMPT)
    waiting = cache.sequence([*PROMPT, 99])
    assert cache.cache.lookup(waiting) is None
    cache.cache.publish(owner, 1)
    assert cache.cache.lookup(waiting) is None
    cache.cache.publish(owner, 3)
    assert blocks_of(cache.cache.lookup(waiting)) == blocks_of(owner)


def test_only_the_next_block_is_waited_for():
    cache = Cache()
    cache.start(PROMPT)
    assert cache.lookup([99, *PROMPT]) == []
    assert cache.lookup(PROMPT[:4]) == [], "its only block must be computed by itself"


def test_nothing_is_waited_for_once_its_owner_stops():
    cache = Cache()
    owner = cache.start(PROMPT)
    cache.cache.publish(owner, 1)
    waiting = cache.sequence([*PROMPT, 99])
    assert cache.cache.lookup(waiting) is None
    cache.cache.withdraw(owner)
    assert blocks_of(cache.cache.lookup(waiting)) == blocks_of(owner)[:1]
    cache.cache.check([])


def test_a_sequence_does_not_wait_for_one_of_lower_priority():
    cache = Cache()
    cache.start(PROMPT, priority=1)
    assert cache.lookup([*PROMPT, 99], priority=1) is None
    assert cache.lookup([*PROMPT, 99], priority=2) is None
    assert cache.lookup([*PROMPT, 99], priority=0) == []


def test_prompt_logprobs_use_no_hits_and_wait_for_nothing_but_serve_others():
    cache = Cache()
    first = cache.start(PROMPT)
    assert cache.lookup([*PROMPT, 99], prompt_logprobs=0) == []
    cache.cache.publish(first, 3)
    assert cache.lookup([*PROMPT, 99], prompt_logprobs=0) == []
    other = cache.computed([50, 51, 52, 53], prompt_logprobs=0)
    assert cache.lookup([50, 51, 52, 53, 99]) == blocks_of(other)


def test_a_disabled_cache_finds_and_defers_nothing():
    cache = Cache(enabled=False)
    owner = cache.start(PROMPT)
    assert cache.lookup([*PROMPT, 99]) == []
    cache.cache.withdraw(owner)
    cache.cache.check([])


def test_a_window_needs_only_the_blocks_that_the_next_token_sees():
    cache = Cache(num_blocks=20, windows=(5,))
    owner = cache.computed([*PROMPT, *PROMPT])
    [table] = owner.tables
    cache.cache._pool.forget(table.blocks[1])
    found = cache.cache.lookup(cache.sequence([*PROMPT, *PROMPT, 99]))
    assert (found.num_blocks, found.tables[0].first, found.tables[0].blocks) == (6, 5, table.blocks[5:])
    found = cache.cache.lookup(cache.sequence([*PROMPT, 50]))
    assert (found.num_blocks, found.tables[0].blocks) == (3, table.blocks[2:3])
    found = cache.cache.lookup(cache.sequence(PROMPT[:9]))
    assert (found.num_blocks, found.tables[0].blocks) == (1, table.blocks[:1]), "token 8 sees token 4, which is gone"
    cache.cache.check([owner])


def test_a_prefix_ends_where_one_group_lacks_what_is_seen():
    cache = Cache(num_blocks=40, windows=(None, 9, 5))
    owner = cache.computed([*PROMPT, *PROMPT])
    full, wide, narrow = owner.tables
    ask = [*PROMPT, *PROMPT, 99]

    def num_found() -> int:
        return cache.cache.lookup(cache.sequence(ask)).num_blocks

    assert num_found() == 6
    cache.pool.forget(narrow.blocks[5])
    assert num_found() == 5
    cache.pool.forget(wide.blocks[4])
    assert num_found() == 4
    cache.pool.forget(full.blocks[2])
    assert num_found() == 2, "all before is seen without a window"
    found = cache.cache.lookup(cache.sequence(ask))
    assert [table.blocks for table in found.tables] == [full.blocks[:2], wide.blocks[:2], narrow.blocks[1:2]]
    cache.pool.forget(narrow.blocks[1])
    assert num_found() == 1


def test_what_is_computed_again_is_announced_though_one_group_has_it():
    cache = Cache(num_blocks=40, windows=(None, 5))
    owner = cache.computed(PROMPT)
    cache.pool.forget(owner.tables[1].blocks[2])
    second = cache.start([*PROMPT, 99])
    second.num_published = 2
    assert cache.cache.lookup(cache.sequence([*PROMPT, 50])) is None


def test_an_invalid_sequence_is_forgotten_in_every_group():
    cache = Cache(num_blocks=20, windows=(None, 5))
    owner = cache.computed(PROMPT)
    cache.cache.invalidate(owner)
    assert cache.cache.lookup(cache.sequence([*PROMPT, 99])).num_blocks == 0
    cache.cache.check([owner])
