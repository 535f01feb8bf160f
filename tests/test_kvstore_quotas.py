"""Whose a block is, and how many a tenant has: the books alone, without an arena."""

from __future__ import annotations

import hashlib

import pytest

from kvstore.blocks import BlockHash
from kvstore.quotas import NO_TENANT, SHARED, Owner, Quotas

ONE, TWO = b"1" * 16, b"2" * 16


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def filled(*numbers: int, owner: Owner) -> Quotas:
    quotas = Quotas()
    for number in numbers:
        quotas.began(name(number), owner)
        quotas.finished(name(number))
    return quotas


def never(_: BlockHash) -> bool:
    return False


def test_a_salt_names_its_tenant_and_no_salt_nobody() -> None:
    assert Owner.of_salt(b"salt", 3) == Owner(hashlib.sha256(b"salt").digest()[:16], 3)
    assert Owner.of_salt(b"", 3) == SHARED == Owner(NO_TENANT, None)


def test_reached_by_what_is_ready_and_what_is_being_written() -> None:
    quotas, owner = Quotas(), Owner(ONE, 2)
    assert not quotas.is_reached(owner) and quotas.is_reached(Owner(ONE, 0))
    quotas.began(name(1), owner)
    quotas.began(name(2), owner)
    assert quotas.is_reached(owner)
    assert quotas.victim(ONE, (), never) is None, "what is being written stays"
    quotas.finished(name(1))
    assert quotas.victim(ONE, (), never) == name(1) and quotas.is_reached(owner)
    quotas.gone(name(1))
    assert not quotas.is_reached(owner) and not quotas.is_reached(Owner(TWO, 1))
    quotas.check_integrity([], [name(2)])


def test_the_least_lately_used_goes_but_none_of_the_kept() -> None:
    quotas = filled(1, 2, 3, 4, owner=Owner(ONE, 4))
    quotas.touch(name(1))
    assert quotas.victim(ONE, {name(2)}, never) == name(3)
    quotas.gone(name(3))
    assert quotas.victim(ONE, {name(2)}, lambda key: key == name(4)) == name(1)
    assert quotas.victim(ONE, {name(number) for number in range(9)}, never) is None
    assert quotas.victim(TWO, (), never) is None
    quotas.check_integrity([name(1), name(2), name(4)], [])


@pytest.mark.parametrize("owner", [SHARED, Owner(NO_TENANT, 1)])
def test_blocks_of_nobody_are_not_kept_books_of(owner: Owner) -> None:
    quotas = filled(1, 2, owner=owner)
    quotas.touch(name(1))
    assert not quotas.is_reached(owner) and not quotas.is_bounded(name(1))
    quotas.gone(name(1))
    assert quotas.num_blocks(NO_TENANT) == 0
    quotas.check_integrity([name(2)], [])


def test_a_tenant_is_bounded_as_he_last_said_and_forgotten_with_his_last_block() -> None:
    quotas = filled(1, owner=Owner(ONE))
    assert not quotas.is_bounded(name(1))
    quotas.began(name(2), Owner(ONE, 5))
    assert quotas.is_bounded(name(1)) and quotas.is_bounded(name(2))
    quotas.gone(name(1))
    quotas.gone(name(2))
    quotas.gone(name(2))
    assert not quotas.is_bounded(name(2)) and quotas.num_blocks(ONE) == 0
    quotas.check_integrity([], [])


def test_integrity_is_checked() -> None:
    quotas = filled(1, owner=Owner(ONE, 5))
    with pytest.raises(AssertionError, match="not there"):
        quotas.check_integrity([], [])
    with pytest.raises(AssertionError, match="than are ready"):
        quotas.check_integrity([], [name(1)])
