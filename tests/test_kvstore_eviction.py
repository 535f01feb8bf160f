"""Policies: who goes, who stays, and that a policy never forgets or invents a block."""

from __future__ import annotations

import random

import pytest

from kvstore.eviction import ADMISSIONS, LRU, POLICIES, S3FIFO, Eviction, SecondTouch


def fill(policy: Eviction[int], *keys: int) -> None:
    for key in keys:
        policy.insert(key)


def test_lru_takes_the_least_lately_used() -> None:
    policy: LRU[int] = LRU()
    fill(policy, 1, 2, 3)
    policy.touch(1)
    assert [policy.victim(), policy.victim(), policy.victim(), policy.victim()] == [2, 3, 1, None]


def test_lru_spares_what_was_read_once() -> None:
    policy: LRU[int] = LRU()
    fill(policy, 1, 2, 3)
    read = {1}
    assert policy.victim((), lambda key: key in read and not read.discard(key)) == 2
    assert [policy.victim(), policy.victim()] == [3, 1]


def test_s3fifo_lets_blocks_that_nobody_uses_pass_by_those_that_are_used() -> None:
    policy: S3FIFO[int] = S3FIFO(20)
    fill(policy, *range(10))
    for _ in range(2):
        policy.insert(100 + len(policy))
        for key in range(5):
            policy.touch(key)
    for key in range(1000, 1100):
        if len(policy) == 20:
            policy.victim()
        policy.insert(key)
    assert set(range(5)) <= set(policy) and not set(range(5, 10)) & set(policy)


def test_s3fifo_does_not_take_a_hand_off_for_a_second_use() -> None:
    policy: S3FIFO[int] = S3FIFO(100)
    for key in range(100):
        policy.insert(key)
        for _ in range(3):  # at once, by the nodes of one request
            policy.touch(key)
    assert policy.victim((), lambda _: True) == 0


def test_s3fifo_remembers_who_left() -> None:
    policy: S3FIFO[int] = S3FIFO(4)
    fill(policy, 1, 2, 3, 4)
    assert policy.victim() == 1
    policy.insert(1)  # to the main queue
    for key in range(10, 20):
        assert policy.victim() != 1
        policy.insert(key)
    assert 1 in set(policy)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_was_lent_goes_first_the_tail_of_a_chain_before_its_head(name: str) -> None:
    policy = POLICIES[name](40)
    fill(policy, *range(40))
    for key in (10, 11, 12):
        policy.lend(key)
    assert [policy.victim() for _ in range(4)] == [12, 11, 10, 0]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_was_lent_and_is_used_here_stays(name: str) -> None:
    policy = POLICIES[name](40)
    fill(policy, *range(40))
    policy.lend(10)
    read = {10}
    policy.touch(10)
    gone = [policy.victim((), lambda key: key in read and not read.discard(key)) for _ in range(5)]
    assert gone == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_hand_off_is_no_loan(name: str) -> None:
    policy = POLICIES[name](100)
    fill(policy, *range(100))
    policy.lend(99)
    assert policy.victim() == 0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_kept_blocks_stay(name: str) -> None:
    policy = POLICIES[name](4)
    fill(policy, 1, 2, 3, 4)
    assert policy.victim({1, 2, 3}) == 4
    assert policy.victim({1, 2, 3}) is None
    assert sorted(policy) == [1, 2, 3]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_sweep_ends_when_everything_is_read_all_the_time(name: str) -> None:
    policy = POLICIES[name](50)
    fill(policy, *range(50))
    gone = [policy.victim({0, 1}, lambda _: True) for _ in range(49)]
    assert gone[-1] is None and sorted(gone[:-1]) == list(range(2, 50))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_books_balance(name: str) -> None:
    generator = random.Random(name)
    policy, held = POLICIES[name](30), set[int]()
    for _ in range(20_000):
        key = generator.randrange(60)
        if key in held and generator.random() < 0.1:
            policy.remove(key)
            held.remove(key)
        elif key in held:
            (policy.lend if generator.random() < 0.2 else policy.touch)(key)
        else:
            if len(held) == 30:
                victim = policy.victim({key + 1}, lambda _: generator.random() < 0.3)
                assert victim in held and victim != key + 1
                held.remove(victim)
            policy.insert(key)
            held.add(key)
        assert len(policy) == len(held)
    assert set(policy) == held


def test_second_touch_counts_what_comes_later_and_not_the_hand_off() -> None:
    reuse: SecondTouch[int] = SecondTouch(100)
    reuse.came(range(1, 20))
    reuse.saw(1)
    assert not reuse.admits(1) and not reuse.admits(30)
    reuse.came(range(20, 25))
    reuse.saw(1)
    assert reuse.admits(1)


def test_second_touch_remembers_a_bounded_number_of_names() -> None:
    reuse: SecondTouch[int] = SecondTouch(10)
    reuse.came([1])
    for key in range(100, 180):
        reuse.came([key])
    reuse.saw(1)
    assert not reuse.admits(1)


def test_all_admits_what_nobody_asked_for_again() -> None:
    admits = {}
    for name, make in ADMISSIONS.items():
        admission = make(10)
        admission.came([1])
        admission.saw(1)
        admits[name] = admission.admits(1)
    assert admits == {"all": True, "second-touch": False}
