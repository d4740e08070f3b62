"""The tracker: what is handed out to whom, what the client uploads, and what a failure costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest

from worker_bootstrap.assignments import BATCH_LIMIT_BYTES, BATCH_LIMIT_CHUNKS
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.tracker import AT_ONCE_LIMIT, Tracker

MIB = 1 << 20


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def chunks(count: int, size_bytes: int = MIB) -> dict[Digest, int]:
    return {digest_of(str(number).encode()): size_bytes for number in range(count)}


def tracker_with(hosts: Mapping[str, Mapping[Digest, int]], **options: float) -> tuple[Tracker, Clock]:
    clock = Clock()
    tracker = Tracker(clock=clock, **options)  # type: ignore[arg-type]
    for host_id, have in hosts.items():
        tracker.add_host(host_id, f"tcp://{host_id}:1", have)
    return tracker, clock


def exchange(tracker: Tracker, host_ids: list[str]) -> list[tuple[str, str, int]]:
    """Let every host fetch until nothing is outstanding; return (host, source, chunks) of each batch."""
    moved = []
    while any(tracker.outstanding(host_id) for host_id in host_ids):
        batches = [(host_id, tracker.next_batch(host_id)) for host_id in host_ids]
        assert any(batch for _, batch in batches), "nobody gets anything, but something is outstanding"
        for host_id, batch in batches:
            if batch:
                tracker.received(host_id, batch.digests)
                moved.append((host_id, batch.source, len(batch.digests)))
    return moved


def test_hosts_end_up_with_everything_and_fetch_each_chunk_once() -> None:
    needed = chunks(200)
    tracker, _ = tracker_with({"seed": needed, "b": {}, "c": {}, "d": {}})
    for host_id in ("b", "c", "d"):
        tracker.want(host_id, needed)
    moved = exchange(tracker, ["b", "c", "d"])
    for host_id in ("b", "c", "d"):
        assert sum(count for receiver, _, count in moved if receiver == host_id) == len(needed)
        assert tracker.progress(host_id) == (200 * MIB, 200 * MIB)
    assert len({source for _, source, _ in moved}) > 1, "everything came from the seed"


def test_batches_keep_within_bytes_and_chunks() -> None:
    big = chunks(100, 3 * MIB)
    small = {digest_of(f"small {n}".encode()): 10 for n in range(BATCH_LIMIT_CHUNKS + 5)}
    for needed in (big, small):
        tracker, _ = tracker_with({"seed": needed, "b": {}}, uploads_per_source=1000)
        tracker.want("b", needed)
        sizes = []
        while batch := tracker.next_batch("b"):
            sizes.append(sum(needed[digest] for digest in batch.digests))
            assert len(batch.digests) <= BATCH_LIMIT_CHUNKS
        assert max(sizes) <= BATCH_LIMIT_BYTES
        assert sum(sizes) == sum(needed.values())


def test_a_chunk_larger_than_a_batch_target_travels_alone() -> None:
    needed = chunks(3, 16 * MIB)
    tracker, _ = tracker_with({"seed": needed, "b": {}})
    tracker.want("b", needed)
    batch = tracker.next_batch("b")
    assert batch is not None
    assert len(batch.digests) == 1


def test_rarest_chunks_are_handed_out_first() -> None:
    common, rare = list(chunks(40)), [digest_of(b"rare")]
    sizes = dict.fromkeys([*common, *rare], MIB)
    everywhere = dict.fromkeys(common, MIB)
    tracker, _ = tracker_with({"a": everywhere, "b": everywhere, "c": sizes, "new": {}})
    tracker.want("new", sizes)
    batch = tracker.next_batch("new")
    assert batch is not None
    assert batch.source == "tcp://c:1"
    assert batch.digests[0] == rare[0]


def test_hosts_that_start_together_are_given_different_chunks() -> None:
    needed = chunks(100)
    tracker, _ = tracker_with({"seed": needed, "b": {}, "c": {}})
    first = []
    for host_id in ("b", "c"):
        tracker.want(host_id, needed)
        batch = tracker.next_batch(host_id)
        assert batch is not None
        first.append(set(batch.digests))
    assert not first[0] & first[1]


def test_a_source_serves_few_batches_at_a_time() -> None:
    needed = chunks(100)
    tracker, _ = tracker_with({"seed": needed, "b": {}}, uploads_per_source=2)
    tracker.want("b", needed)
    first = tracker.next_batch("b")
    assert first is not None
    assert tracker.next_batch("b") is not None
    assert tracker.next_batch("b") is None
    tracker.received("b", first.digests)
    assert tracker.next_batch("b") is not None


def test_agents_that_share_a_store_count_as_one_host() -> None:
    needed = chunks(3)
    tracker, _ = tracker_with({"seed": needed})
    tracker.add_host("b", "tcp://b:1")
    tracker.add_host("b", "tcp://b:2")
    tracker.add_host("b", "tcp://b:2")
    assert tracker.hosts()["b"] == ("tcp://b:1", "tcp://b:2")
    tracker.want("b", needed)
    tracker.want("b", needed)
    assert tracker.outstanding("b") == 3
    exchange(tracker, ["b"])
    tracker.remove_address("tcp://b:1")
    assert not tracker.absent(needed)
    tracker.remove_address("tcp://seed:1")
    assert not tracker.absent(needed), "b still has an agent"
    tracker.remove_address("tcp://b:2")
    tracker.remove_address("tcp://b:2")
    assert tracker.absent(needed) == list(needed)


def test_a_new_store_at_a_known_address_replaces_the_old_one() -> None:
    needed = chunks(3)
    tracker, _ = tracker_with({"old": needed})
    tracker.add_host("new", "tcp://old:1")
    assert tracker.hosts() == {"new": ("tcp://old:1",)}
    assert tracker.absent(needed) == list(needed)


def test_a_host_that_lost_chunks_says_so_when_it_is_asked_again() -> None:
    needed = chunks(3)
    evicted = next(iter(needed))
    tracker, _ = tracker_with({"a": needed})
    tracker.add_host("a", "tcp://a:1", have=list(needed)[1:], lacks=[evicted])
    assert tracker.absent(needed) == [evicted]


def test_the_nearest_source_is_asked_until_it_is_busy() -> None:
    """The same machine (its containers), then the same rack, then the same site, then anybody."""
    needed = chunks(400)
    tracker = Tracker(clock=lambda: 0.0, uploads_per_source=2)
    places = {
        "far": ("other", "r9", "m9"),
        "site": ("site", "r2", "m3"),
        "rack": ("site", "r1", "m2"),
        "machine": ("site", "r1", "m1"),
    }
    for host_id, place in places.items():
        tracker.add_host(host_id, f"tcp://{host_id}:1", needed, place=place)
    tracker.add_host("new", "tcp://new:1", place=("site", "r1", "m1"))
    tracker.want("new", needed)
    asked = [batch.source if (batch := tracker.next_batch("new")) else None for _ in range(7)]
    nearest_first = [f"tcp://{host_id}:1" for host_id in ("machine", "rack", "site") for _ in range(2)]
    assert asked == [*nearest_first, None], "what the site holds does not cross into it again"


def test_where_there_are_many_hosts_each_gets_several_batches_at_once() -> None:
    """One after the other: so the second may take twice as long before it is handed out again."""
    needed = chunks(400)
    now_s = 0.0
    tracker = Tracker(clock=lambda: now_s, patience_s=60.0)
    for number in range(1000):
        tracker.add_host(f"h{number}", f"tcp://h{number}:1", needed if number % 2 else ())
    tracker.want("h0", needed)
    batches, outstanding = tracker.offer("h0")
    assert len(batches) == AT_ONCE_LIMIT
    assert len({digest for batch in batches for digest in batch.digests}) == sum(len(b.digests) for b in batches)
    assert outstanding == 400
    now_s = 61.0
    again = tracker.next_batch("h0")
    assert again is not None
    tracker.received("h0", batches[1].digests)
    still = {digest for batch in batches[1:] for digest in batch.digests}
    assert not still & set(again.digests)


def test_the_client_uploads_what_is_absent_to_hosts_in_turn() -> None:
    needed = chunks(64)
    there = dict(list(needed.items())[:10])
    tracker, _ = tracker_with({"a": there, "b": {}, "c": {}})
    missing = tracker.absent(needed)
    assert missing == list(needed)[10:]
    plan = tracker.plan_uploads(missing)
    assert [digest for upload in plan for digest in upload.digests] == missing
    assert len({upload.address for upload in plan}) == 3
    for upload in plan:
        assert sum(needed[digest] for digest in upload.digests) <= BATCH_LIMIT_BYTES
        tracker.received(upload.address[len("tcp://") : -len(":1")], upload.digests)
    assert tracker.absent(needed) == []
    assert tracker.plan_uploads([]) == []


def test_uploads_go_around_what_cannot_be_reached() -> None:
    tracker, _ = tracker_with({"a": {}, "b": {}})
    missing = tracker.absent(chunks(64))
    assert {upload.address for upload in tracker.plan_uploads(missing, avoid=["tcp://a:1"])} == {"tcp://b:1"}
    with pytest.raises(ValueError, match="no host"):
        tracker.plan_uploads(missing, avoid=["tcp://a:1", "tcp://b:1"])


def test_nothing_is_handed_out_before_somebody_holds_it() -> None:
    needed = chunks(2)
    tracker, _ = tracker_with({"a": {}, "b": {}})
    tracker.want("b", needed)
    offer = tracker.offer("b")
    assert offer.batches == ()
    assert offer.outstanding == 2
    tracker.received("a", needed)
    assert tracker.next_batch("b") is not None


def test_a_blamed_source_is_left_out_where_there_is_another() -> None:
    needed = chunks(60)
    tracker, _ = tracker_with({"liar": needed, "good": needed, "b": {}}, uploads_per_source=1)
    tracker.want("b", needed)
    batches = [tracker.next_batch("b"), tracker.next_batch("b")]
    lies = next(batch for batch in batches if batch and batch.source == "tcp://liar:1")
    tracker.failed("b", lies.source, lies.digests, fault="lied")
    assert tracker.next_batch("b") is None, "the good source is busy, and the liar is not asked"
    for batch in batches:
        if batch and batch is not lies:
            tracker.received("b", batch.digests)
    assert {source for _, source, _ in exchange(tracker, ["b"])} == {"tcp://good:1"}


def test_one_bad_chunk_of_the_only_source_costs_that_chunk_only() -> None:
    needed = chunks(30)
    tracker, _ = tracker_with({"seed": needed, "b": {}})
    tracker.want("b", needed)
    batch = tracker.next_batch("b")
    assert batch is not None
    bad = batch.digests[0]
    tracker.received("b", batch.digests[1:])
    tracker.failed("b", batch.source, [bad], fault="lied")
    while batch := tracker.next_batch("b"):
        assert bad not in batch.digests
        tracker.received("b", batch.digests)
    assert tracker.outstanding("b") == 1
    assert tracker.absent(needed) == [bad], "the client is asked for it again"
    tracker.received("seed", [bad])
    exchange(tracker, ["b"])


def test_a_source_that_lacks_a_chunk_stays_a_source_of_others() -> None:
    needed = chunks(2)
    evicted, kept = needed
    tracker, _ = tracker_with({"seed": needed, "b": {}})
    tracker.want("b", needed)
    batch = tracker.next_batch("b")
    assert batch is not None
    tracker.failed("b", batch.source, [evicted], fault="lacks")
    tracker.received("b", [kept])
    assert tracker.absent(needed) == [evicted]
    assert tracker.next_batch("b") is None


def test_batches_of_a_source_that_leaves_are_handed_out_elsewhere() -> None:
    needed = chunks(4)
    tracker, _ = tracker_with({"a": needed, "c": needed, "b": {}})
    tracker.want("b", needed)
    first = tracker.next_batch("b")
    assert first is not None
    tracker.remove_address(first.source)
    second = tracker.next_batch("b")
    assert second is not None
    assert second.source != first.source
    assert set(second.digests) == set(first.digests)


def test_a_batch_not_reported_in_time_is_handed_out_again_from_another_source() -> None:
    needed = chunks(4)
    tracker, clock = tracker_with({"a": needed, "c": needed, "b": {}}, patience_s=10)
    tracker.want("b", needed)
    first = tracker.next_batch("b")
    assert first is not None
    assert tracker.next_batch("b") is None
    clock.now_s = 11
    second = tracker.next_batch("b")
    assert second is not None
    assert second.source != first.source
    tracker.received("b", first.digests)  # late, but there
    assert tracker.outstanding("b") == 0
    tracker.received("b", second.digests)
    assert tracker.progress("b") == (4 * MIB, 4 * MIB)


def test_a_receiver_that_dies_frees_its_source() -> None:
    needed = chunks(100)
    tracker, clock = tracker_with({"a": needed, "b": {}, "c": {}}, uploads_per_source=1, patience_s=10)
    tracker.want("b", needed)
    tracker.want("c", needed)
    assert tracker.next_batch("b") is not None
    assert tracker.next_batch("c") is None
    tracker.remove_address("tcp://b:1")
    assert tracker.next_batch("c") is not None
    clock.now_s = 11  # c is silent, too, which might be the fault of its source
    assert tracker.next_batch("c") is None
    clock.now_s = 14
    assert tracker.next_batch("c") is not None


def test_reports_of_unknown_hosts_are_ignored() -> None:
    tracker, _ = tracker_with({"a": {}})
    tracker.received("gone", chunks(1))
    tracker.failed("gone", "tcp://nobody:1", chunks(1), fault="lied")
    tracker.remove_address("tcp://nobody:1")
    assert tracker.next_batch("gone") is None
    assert tracker.outstanding("gone") == 0
    assert tracker.absent(chunks(1)) == list(chunks(1))


def test_a_second_environment_starts_its_own_count_and_needs_only_what_is_new() -> None:
    first, second = chunks(5), chunks(8)
    tracker, _ = tracker_with({"a": second, "b": {}})
    tracker.want("b", first)
    exchange(tracker, ["b"])
    tracker.want("b", second)
    assert tracker.outstanding("b") == 3
    assert tracker.progress("b") == (5 * MIB, 8 * MIB)


def test_a_holder_that_lost_and_regained_a_chunk_is_counted_once() -> None:
    needed = chunks(2)
    tracker, _ = tracker_with({"a": needed, "b": {}, "c": {}})
    tracker.want("b", needed)
    exchange(tracker, ["b"])
    tracker.failed("c", "tcp://b:1", list(needed), fault="lacks")
    tracker.received("b", needed)
    assert tracker.progress("b") == (2 * MIB, 2 * MIB)


def test_decisions_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    script = (
        "from worker_bootstrap.tracker import Tracker\n"
        "from worker_bootstrap.digest import digest_of\n"
        "needed = {digest_of(str(n).encode()): 1 << 20 for n in range(50)}\n"
        "tracker = Tracker(clock=lambda: 0.0)\n"
        "tracker.add_host('a', 'tcp://a:1', needed); tracker.add_host('c', 'tcp://c:1', needed)\n"
        "tracker.add_host('b', 'tcp://b:1'); tracker.want('b', needed)\n"
        "batch = tracker.next_batch('b'); tracker.failed('b', batch.source, batch.digests, fault='lied')\n"
        "print(batch, tracker.next_batch('b'), tracker.next_batch('b'))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def test_what_one_purpose_lacks_is_not_lost_for_another() -> None:
    there, nowhere = chunks(2), {Digest("f" * 64): MIB}
    tracker, _ = tracker_with({"a": there, "b": {}})
    tracker.want("b", nowhere, "one")
    tracker.want("b", there, "other")
    assert (tracker.lost("b", "one"), tracker.lost("b", "other")) == (1, 0)
    assert (tracker.outstanding("b", "one"), tracker.outstanding("b", "other")) == (1, 2)
    tracker.give_up("b", "one")
    assert tracker.lost("b") == 0
    assert tracker.progress("b") == (0, 2 * MIB)
    tracker.received("b", there)
    assert tracker.outstanding("b") == 0
    tracker.give_up("b", "nothing that it ever wanted")


def test_a_chunk_for_two_purposes_is_still_wanted_when_one_is_given_up() -> None:
    needed = chunks(1)
    tracker, _ = tracker_with({"a": needed, "b": {}})
    tracker.want("b", needed, "one")
    tracker.want("b", needed, "other")
    tracker.give_up("b", "one")
    assert tracker.outstanding("b", "other") == 1
    assert tracker.next_batch("b") is not None
