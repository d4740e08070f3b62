"""Accounts of what moved between hosts."""

from __future__ import annotations

from worker_bootstrap.ledger import CLIENT, RATE_WINDOW_S, SHARED, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_one_host_receives_another_has_served() -> None:
    ledger = Ledger(Clock())
    ledger.moved("b", "a", 100)
    ledger.moved("b", CLIENT, 20)
    ledger.moved("b", SHARED, 3)
    accounts = ledger.to_dict()
    assert accounts["b"]["received"] == {"a": 100, CLIENT: 20, SHARED: 3}
    assert accounts["a"]["served_bytes"] == 100
    assert set(accounts) == {"a", "b"}, "clients and files are no hosts"


def test_a_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.moved("b", "a", 8_000_000)
    clock.now = 2.0
    ledger.moved("b", "c", 2_000_000)
    assert ledger.rate("b") == 5_000_000
    assert ledger.describe("b") == "5.0 MB/s from 2 sources"
    clock.now = 2.0 + RATE_WINDOW_S + 0.1
    assert ledger.rate("b") == 0.0
    assert ledger.describe("b") == ""
    assert ledger.rate("nobody") == 0.0


def test_who_is_to_blame_is_named_and_who_merely_lacks_is_not() -> None:
    ledger = Ledger(Clock())
    ledger.failed("b", "a", "it does not hold them", blame=False)
    ledger.failed("b", "c", "wrong bytes", blame=True)
    account = ledger.to_dict()["b"]
    assert account["failures"] == {"a": 1, "c": 1}
    assert account["blamed"] == {"c": "wrong bytes"}
