"""The tracker among hosts that die, stall, crawl, lie, come late and lose each other; in virtual time, repeatable.

The same with real processes is in `tests.test_spread_faults`; how fast it is, in `benchmarks.spread`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from benchmarks.swarm import Swarm, SwarmHost, chunks_of
from worker_bootstrap.digest import Digest

CHUNKS = chunks_of(200)
RATE = 10e6
HORIZON = 600.0


def started(hosts: int, chunks: Mapping[Digest, int] = CHUNKS, **options: object) -> Swarm:
    """A swarm whose client has begun to upload and whose hosts have begun to fetch."""
    swarm = Swarm(hosts, chunks, rate=RATE, **options)  # type: ignore[arg-type]
    for host in list(swarm.hosts.values()):
        swarm.start(host)
    swarm.upload()
    return swarm


def finish(swarm: Swarm) -> float:
    """Let it run to its end; every living host must have everything. Returns the slowest, in units of F/b."""
    swarm.run(HORIZON)
    living = [host for host in swarm.hosts.values() if host.alive and not host.stalled]
    lacking = [host.name for host in living if host.complete_s is None]
    assert not lacking
    return max(host.complete_s or 0.0 for host in living) / swarm.limit_s


def again_and_finish(swarm: Swarm) -> None:
    """What a client does that is told of lost chunks: it uploads them once more."""
    if swarm.lost:
        swarm.lost.clear()
        for host in swarm.hosts.values():
            if host.alive and not host.stalled and host.complete_s is None:
                swarm.start(host, {})
        swarm.upload()
    finish(swarm)


def half_way(swarm: Swarm) -> float:
    return swarm.limit_s / 2


def test_hosts_are_complete_soon_after_the_client_has_sent_each_chunk_once() -> None:
    swarm = started(16)
    finish(swarm)
    assert swarm.uploaded_bytes == pytest.approx(swarm.wire_bytes)
    assert len(swarm.moved) + len(CHUNKS) == 16 * len(CHUNKS), "nobody fetched anything twice"


def test_the_same_swarm_runs_the_same_way_twice() -> None:
    first, second = started(8), started(8)
    finish(first)
    finish(second)
    assert first.moved == second.moved
    assert first.completions_s() == second.completions_s()


def test_a_host_that_dies_costs_the_others_a_retry() -> None:
    swarm = started(8)
    swarm.at(half_way(swarm) * 2.2, lambda: swarm.kill(swarm.hosts["h3"]))
    finish(swarm)


def test_thirty_percent_of_the_hosts_die_after_one_copy_is_in_the_swarm() -> None:
    swarm = started(20)
    doomed = random.Random(1).sample(sorted(swarm.hosts), 6)
    for number, name in enumerate(doomed):
        swarm.at(1.05 * swarm.limit_s + number * 0.01, lambda name=name: swarm.kill(swarm.hosts[name]))
    swarm.run(HORIZON)
    living = [host for host in swarm.hosts.values() if host.alive]
    # What only dead hosts had is known to be lost at once; everything else has arrived everywhere.
    assert len({host.complete_s is None for host in living}) == 1
    again_and_finish(swarm)


@pytest.mark.parametrize("number", [0, 5])
def test_a_host_that_stalls_is_given_up_and_its_chunks_come_from_others(number: int) -> None:
    swarm = started(8)
    swarm.at(1.01 * swarm.limit_s, lambda: swarm.stall(swarm.hosts[f"h{number}"]))
    swarm.run(HORIZON)
    # What nobody else had yet is given up in the end, and everybody told, so that the client brings it again.
    again_and_finish(swarm)
    assert swarm.uploaded_bytes < 1.2 * swarm.wire_bytes


def test_a_host_a_hundred_times_slower_is_left_behind_by_the_others() -> None:
    swarm = started(8)

    def join() -> None:
        crawler = swarm.join(8)
        swarm.slow(crawler, 100.0)
        swarm.tracker.received(crawler.name, list(CHUNKS)[:100])  # so it is asked, too

    swarm.at(half_way(swarm), join)
    swarm.run(HORIZON)
    quick = [swarm.hosts[f"h{number}"].complete_s or HORIZON for number in range(8)]
    assert max(quick) < 3 * swarm.limit_s, "one batch from the crawler takes about as long as all from the others"


def test_a_liar_serves_nobody_for_long() -> None:
    swarm = started(12)
    swarm.hosts["h4"].lies = True
    lies = []
    blame = swarm.tracker.failed

    def counting(host_id: str, source: str, digests: object, *, fault: str) -> None:
        lies.append((host_id, source, fault))
        blame(host_id, source, digests, fault=fault)  # type: ignore[arg-type]

    swarm.tracker.failed = counting  # type: ignore[method-assign]
    swarm.run(HORIZON)
    told = [entry for entry in lies if entry[2] == "lied"]
    assert told
    assert {source for _, source, _ in told} == {swarm.hosts["h4"].address}
    # Its uploads from the client are lost to the others; all else must have come from elsewhere.
    honest = [source for _, source, _ in swarm.moved]
    assert swarm.hosts["h4"].address not in honest
    swarm.hosts["h4"].lies = False
    again_and_finish(swarm)


def test_hosts_that_join_in_the_middle_are_served_by_those_that_are_there() -> None:
    swarm = started(6)

    def join() -> None:
        for number in (6, 7, 8):
            swarm.start(swarm.join(number))

    swarm.at(half_way(swarm), join)
    finish(swarm)
    assert swarm.uploaded_bytes == pytest.approx(swarm.wire_bytes), "the client is not asked again"


def test_two_environments_at_once_share_what_they_have_in_common() -> None:
    names = list(CHUNKS)
    first = {name: CHUNKS[name] for name in names[:150]}
    second = {name: CHUNKS[name] for name in names[50:]}
    swarm = Swarm(8, CHUNKS, rate=RATE)
    for number, host in enumerate(list(swarm.hosts.values())):
        swarm.start(host, first if number % 2 else second)
        swarm.start(host, second if number % 2 else first)
    swarm.upload()
    finish(swarm)
    assert len(swarm.moved) + len(CHUNKS) == 8 * len(CHUNKS)


def test_a_network_that_is_cut_in_two_heals() -> None:
    swarm = started(10)
    swarm.at(1.0 * swarm.limit_s, lambda: swarm.split(lambda host: int(host.name[1:]) % 2))
    swarm.at(3.0 * swarm.limit_s, lambda: swarm.split(lambda host: 0))
    finish(swarm)


def test_a_client_that_vanishes_after_one_full_copy_is_not_missed() -> None:
    swarm = started(8)
    swarm.at(1.1 * swarm.limit_s, swarm.vanish)
    finish(swarm)


def test_a_client_that_vanishes_before_ends_the_wait_and_what_arrived_stays() -> None:
    swarm = started(8)
    swarm.at(half_way(swarm), swarm.vanish)
    swarm.run(HORIZON)
    assert swarm.lost == set(swarm.hosts), "everybody is told, nobody waits for ever"
    before = {name: swarm.tracker.progress(name)[0] for name in swarm.hosts}
    assert all(before.values())
    absent = swarm.tracker.absent(CHUNKS)
    assert 0 < len(absent) < len(CHUNKS)
    swarm.client_up.rate = RATE
    again_and_finish(swarm)
    assert swarm.uploaded_bytes < 1.6 * swarm.wire_bytes, "only the rest is sent again"


def test_a_second_client_that_wants_the_same_sends_nothing() -> None:
    swarm = started(4)
    assert swarm.tracker.absent(CHUNKS) == []
    swarm.tracker.withdraw("client")
    assert set(swarm.tracker.absent(CHUNKS)) == set(CHUNKS)


def test_between_sites_each_chunk_travels_once() -> None:
    swarm = started(12, place=lambda number: (f"site-{number % 3}", f"rack-{number % 6}", f"m{number}"))
    finish(swarm)
    at = {host.address: host.place[0] for host in swarm.hosts.values()}
    crossings = [
        (swarm.hosts[receiver].place[0], digest)
        for receiver, source, digest in swarm.moved
        if at[source] != swarm.hosts[receiver].place[0]
    ]
    assert len(crossings) == len(set(crossings)), "no chunk came into a site twice"


def test_chunks_come_from_the_same_rack_where_it_has_them() -> None:
    placed = started(12, place=lambda number: ("site", f"rack-{number % 2}", f"m{number}"))
    plain = started(12)
    for swarm in (placed, plain):
        finish(swarm)

    def within(swarm: Swarm) -> float:
        rack: dict[str, int] = {host.address: int(host.name[1:]) % 2 for host in swarm.hosts.values()}
        near = [rack[source] == int(receiver[1:]) % 2 for receiver, source, _ in swarm.moved]
        return sum(near) / len(near)

    assert within(placed) > within(plain) + 0.03


def test_a_host_whose_disk_is_full_gives_up_and_holds_up_nobody() -> None:
    swarm = started(6)
    swarm.at(half_way(swarm), lambda: swarm.fill_disk(swarm.hosts["h2"]))
    swarm.run(HORIZON)
    others = [host for host in swarm.hosts.values() if host.name != "h2"]
    assert all(host.complete_s for host in others)
    assert max(host.complete_s or 0.0 for host in others) < 1.5 * swarm.limit_s
    there = swarm.tracker.progress("h2")[0]
    assert swarm.tracker.outstanding("h2") == 0
    swarm.hosts["h2"].full = False
    before = len(swarm.moved)
    swarm.start(swarm.hosts["h2"])
    finish(swarm)
    moved = [digest for receiver, _, digest in swarm.moved[before:]]
    assert 0 < sum(CHUNKS[digest] for digest in moved) <= sum(CHUNKS.values()) - there, "what it had is not sent again"


def test_a_site_whose_link_to_the_others_was_lost_in_the_middle_of_a_crossing_asks_again() -> None:
    swarm = Swarm(4, CHUNKS, rate=RATE, place=lambda number: (f"site-{number // 2}", f"m{number}"))
    hosts: list[SwarmHost] = list(swarm.hosts.values())
    for host in hosts:
        swarm.start(host)
    swarm.upload()
    swarm.at(half_way(swarm), lambda: swarm.kill(hosts[0]))
    swarm.run(HORIZON)
    again_and_finish(swarm)


def test_a_decision_is_bounded_however_many_hosts_and_chunks_there_are() -> None:
    """Seconds are measured in `benchmarks.swarm_sizes`; here, how much is looked at."""
    needed = chunks_of(1000)
    swarm = Swarm(300, needed, rate=RATE)
    looked = 0
    source = swarm.tracker._choice._source

    def counting(*arguments: object) -> object:
        nonlocal looked
        looked += 1
        return source(*arguments)  # type: ignore[arg-type]

    swarm.tracker._choice._source = counting  # type: ignore[assignment,method-assign]
    for name, host in list(swarm.hosts.items())[:150]:
        swarm.tracker.received(name, list(needed))
        host.complete_s = 0.0
    asked = 0
    for name in list(swarm.hosts)[150:]:
        swarm.tracker.want(name, needed)
        for _ in range(6):
            swarm.tracker.next_batch(name)
            asked += 1
    assert looked <= 16 * asked
