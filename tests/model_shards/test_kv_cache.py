"""The pool of pages: nothing written that others have, nothing leaked, nothing changed when it is full."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from model_shards.config import RELEASED
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvCacheFull, KvSequence, KvShape, rotate

SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=4, rope_theta=100.0)
PAGE_SIZE = 3
NUM_PAGES = 12


def key_of(token: int, position: int, cache: KvCache) -> Tensor:
    base = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(token))
    cos, sin = cache.rotation(torch.tensor([position]), torch.float32)
    return rotate(base, cos, sin)[0]


def write(cache: KvCache, sequence: KvSequence, start: int, tokens: list[int]) -> None:
    """What a model does: put a rotated key and a value at each position; the value is the token itself."""
    table = cache.block_table([sequence], sequence.length)[0]
    for layer in range(SHAPE.num_layers):
        keys, values = cache.layer(layer)
        for position, token in enumerate(tokens, start=start):
            page, offset = int(table[position // PAGE_SIZE]), position % PAGE_SIZE
            keys[page, offset] = key_of(token, position, cache)
            values[page, offset] = float(token)


def small_cache() -> KvCache:
    return KvCache(SHAPE, NUM_PAGES, PAGE_SIZE)


def filled(cache: KvCache, num_tokens: int) -> KvSequence:
    sequence = KvSequence()
    cache.extend([(sequence, num_tokens)])
    write(cache, sequence, 0, list(range(num_tokens)))
    return sequence


class Sessions(RuleBasedStateMachine):
    """Any interleaving of sessions that begin alike, grow, forget and go."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = small_cache()
        self.sessions: list[tuple[KvSequence, list[int]]] = []
        self.next_token = 0

    def fresh(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def pick(self, data: st.DataObject) -> tuple[KvSequence, list[int]]:
        return data.draw(st.sampled_from(self.sessions))

    @rule()
    def arrive(self) -> None:
        self.sessions.append((KvSequence(), []))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def begin_like_another_one(self, data: st.DataObject) -> None:
        source, tokens = self.pick(data)
        length = data.draw(st.integers(0, len(tokens)))
        sequence = KvSequence()
        self.cache.fork(source, length, sequence)
        self.sessions.append((sequence, tokens[:length]))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def write_over_some(self, data: st.DataObject) -> None:
        sequence, tokens = self.pick(data)
        start = data.draw(st.integers(0, len(tokens)))
        before = list(sequence.pages)
        try:
            self.cache.own([(sequence, start)])
        except KvCacheFull:
            assert list(sequence.pages) == before
            return
        assert self.cache.is_own(sequence, start)
        tokens[start:] = self.fresh(len(tokens) - start)
        write(self.cache, sequence, start, tokens[start:])

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def feed_some(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.sessions), unique_by=id, min_size=1))
        requests = [(sequence, data.draw(st.integers(0, 10))) for sequence, _ in chosen]
        before = [(list(sequence.pages), sequence.length) for sequence, _ in chosen]
        try:
            self.cache.extend(requests)
        except KvCacheFull:
            assert before == [(list(sequence.pages), sequence.length) for sequence, _ in chosen]
            return
        for (sequence, tokens), (_, count) in zip(chosen, requests, strict=True):
            new = self.fresh(count)
            write(self.cache, sequence, len(tokens), new)
            tokens.extend(new)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def drop_a_range(self, data: st.DataObject) -> None:
        sequence, tokens = self.pick(data)
        start = data.draw(st.integers(0, len(tokens)))
        stop = data.draw(st.integers(start, len(tokens)))
        before = list(sequence.pages)
        try:
            self.cache.drop(sequence, start, stop)
        except KvCacheFull:
            assert list(sequence.pages) == before and not self.cache.is_own(sequence, start)
            return
        del tokens[start:stop]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def insert_a_range(self, data: st.DataObject) -> None:
        sequence, tokens = self.pick(data)
        start, count = data.draw(st.integers(0, len(tokens))), data.draw(st.integers(1, 8))
        before = (list(sequence.pages), sequence.length)
        try:
            self.cache.move_tail(sequence, start, start + count)
        except KvCacheFull:
            assert before == (list(sequence.pages), sequence.length)
            return
        new = self.fresh(count)
        write(self.cache, sequence, start, new)
        tokens[start:start] = new

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence, tokens = self.pick(data)
        length = data.draw(st.integers(0, len(tokens)))
        self.cache.truncate(sequence, length)
        del tokens[length:]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence, _ = self.pick(data)
        self.cache.free(sequence)
        self.sessions = [session for session in self.sessions if session[0] is not sequence]
        assert sequence.length == 0 and not sequence.pages

    @invariant()
    def every_page_is_free_or_has_an_owner(self) -> None:
        owned = {page for sequence, _ in self.sessions for page in sequence.pages}
        assert len(owned) == self.cache.num_used_pages
        assert self.cache.num_free_pages == NUM_PAGES - len(owned)

    @invariant()
    def every_session_finds_its_own_tokens_at_their_positions(self) -> None:
        for sequence, tokens in self.sessions:
            assert sequence.length == len(tokens)
            for layer in range(SHAPE.num_layers):
                keys, values = self.cache.read(sequence, layer)
                assert values[:, 0, 0].tolist() == tokens
                for position, token in enumerate(tokens):
                    torch.testing.assert_close(keys[position], key_of(token, position, self.cache), atol=1e-4, rtol=0)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_pool_takes_no_more_bytes_than_it_was_given():
    page_bytes = SHAPE.bytes_per_token(torch.float32) * 32
    assert KvCache.of_bytes(SHAPE, 5 * page_bytes - 1).num_pages == 4


def test_a_pool_without_a_page_is_refused():
    with pytest.raises(ModelError, match="0 pages"):
        KvCache.of_bytes(SHAPE, 100)


def test_a_released_token_takes_147456_bytes():
    assert KvShape.of(RELEASED.llm).bytes_per_token(torch.bfloat16) == 147_456


def test_admission_counts_whole_pages():
    cache = small_cache()
    filled(cache, (NUM_PAGES - 2) * PAGE_SIZE + 1)
    assert cache.can_admit(PAGE_SIZE)
    assert not cache.can_admit(PAGE_SIZE + 1)


def test_a_full_pool_serves_none_of_a_batch():
    cache = small_cache()
    first, second = filled(cache, 2), KvSequence()
    with pytest.raises(KvCacheFull, match="11 of 12 are free"):
        cache.extend([(first, 5), (second, NUM_PAGES * PAGE_SIZE)])
    assert first.length == 2 and len(first.pages) == 1 and not second.pages


def test_reserved_pages_serve_later_tokens_though_the_pool_is_full():
    cache = small_cache()
    careful = filled(cache, 1)
    cache.reserve([(careful, 8)])
    filled(cache, cache.num_free_pages * PAGE_SIZE)
    cache.extend([(careful, 8)])
    assert careful.length == 9


def test_a_freed_sequence_may_be_used_again():
    cache = small_cache()
    sequence = filled(cache, 10)
    cache.free(sequence)
    cache.extend([(sequence, 4)])
    assert cache.num_used_pages == 2


def test_many_small_drops_turn_keys_as_far_as_one_large_drop():
    cache = small_cache()
    piecewise, at_once = filled(cache, 16), filled(cache, 16)
    for _ in range(10):
        cache.drop(piecewise, 2, 3)
    cache.drop(at_once, 2, 12)
    torch.testing.assert_close(cache.read(piecewise, 1)[0], cache.read(at_once, 1)[0], atol=1e-5, rtol=0)
