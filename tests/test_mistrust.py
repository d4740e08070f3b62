"""Whom a host does not ask, for how long; and what clients have promised."""

from __future__ import annotations

from worker_bootstrap.mistrust import HOPELESS_S, LIED, LIED_S, SILENT, SILENT_LIMIT_S, SILENT_S, Mistrust
from worker_bootstrap.promises import Promises

HOSTS = 0b1111


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_liar_is_the_last_choice_of_everybody_until_it_is_forgiven() -> None:
    clock = Clock()
    mistrust = Mistrust(clock)
    mistrust.blame(0, 2, LIED)
    assert next(mistrust.sieve(1, HOSTS)) == 0b1011
    assert list(mistrust.sieve(1, 0b0100))[-1] == 0b0100, "what nobody else has"
    clock.now_s = LIED_S
    assert mistrust.trusts(1, 2)


def test_a_silent_peer_is_left_out_by_whom_it_kept_waiting_twice_as_long_each_time() -> None:
    clock = Clock()
    mistrust = Mistrust(clock)
    wait_s = SILENT_S
    for _ in range(8):
        mistrust.blame(0, 2, SILENT)
        assert not any(mask & 0b0100 for mask in mistrust.sieve(0, HOSTS))
        assert mistrust.trusts(1, 2)
        clock.now_s += wait_s - 0.001
        assert not mistrust.trusts(0, 2)
        clock.now_s += 0.001
        assert mistrust.trusts(0, 2)
        wait_s = min(2 * wait_s, SILENT_LIMIT_S)


def test_a_peer_of_which_two_complain_is_the_second_choice_of_others() -> None:
    mistrust = Mistrust(Clock())
    mistrust.blame(0, 3, SILENT)
    assert next(mistrust.sieve(2, HOSTS)) == HOSTS
    mistrust.blame(1, 3, SILENT)
    first, second, *_ = mistrust.sieve(2, HOSTS)
    assert (first, second) == (0b0111, HOSTS)


def test_a_peer_that_stays_silent_is_hopeless_when_two_agree_or_there_is_only_one() -> None:
    clock = Clock()
    mistrust = Mistrust(clock)
    while not mistrust.is_hopeless(3, others=1):
        mistrust.blame(0, 3, SILENT)
        clock.now_s += SILENT_LIMIT_S
        assert clock.now_s < HOPELESS_S * 20
    assert not mistrust.is_hopeless(3, others=5)
    for _ in range(5):
        mistrust.blame(1, 3, SILENT)
    assert mistrust.is_hopeless(3, others=5)


def test_a_number_that_is_given_again_starts_with_a_clean_record() -> None:
    mistrust = Mistrust(Clock())
    mistrust.blame(0, 2, LIED)
    mistrust.blame(0, 2, SILENT)
    mistrust.blame(2, 1, SILENT)
    mistrust.forget(2)
    assert mistrust.trusts(0, 2)
    assert mistrust.trusts(2, 1)


def test_a_promise_lasts_as_long_as_it_is_kept_now_and_then() -> None:
    clock = Clock()
    promises = Promises(clock, 60.0)
    promises.make("a", 0b0111)
    promises.make("b", 0b1000)
    clock.now_s = 50
    promises.keep(0b0001)
    clock.now_s = 100
    assert promises.mask() == 0b0110
    promises.withdraw("a")
    promises.withdraw("a")
    assert promises.mask() == 0
