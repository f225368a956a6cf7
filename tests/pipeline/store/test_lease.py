"""One run at a time: on a disk, in memory and on a real S3 server."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.store.lease import PATH, Holder, Lease, LeaseHeld, hold_lease
from pipeline.store.storage import RunStore

ELSEWHERE = dataclasses.replace(
    Holder.for_this_process(), run="theirs", host="another-host", process=77, machine="another"
)


def lease(store: RunStore, seconds: float = 0.6) -> Lease:
    return Lease(store, seconds, on_lost=lambda: None)


def test_it_is_there_while_it_is_held_and_then_no_more(root: str) -> None:
    store = RunStore(root)
    with hold_lease(store, 60):
        assert Holder.from_bytes(store.get(PATH)).process == os.getpid()
    assert not store.exists(PATH)
    with hold_lease(store, 60), hold_lease(store, 0):  # 0 asks nobody
        pass


def test_a_second_run_refuses_while_the_first_lives_and_says_which_it_is(root: str) -> None:
    store = RunStore(root)
    first, is_over = Lease(store, 2, on_lost=lambda: None), threading.Event()
    first._mine = ELSEWHERE
    first.acquire()
    keeper = threading.Thread(target=first.renew_until_released, daemon=True)
    keeper.start()
    with pytest.raises(LeaseHeld, match=r"in use by another run: on another-host, process 77, since .*--output"):
        lease(store, 30).acquire()
    first.release()
    lease(store).acquire()
    assert not is_over.is_set()


def test_a_lease_without_a_sign_of_life_ends(root: str) -> None:
    store = RunStore(root)
    store.put(PATH, ELSEWHERE.to_bytes())
    began = time.monotonic()
    lease(store).acquire()
    assert time.monotonic() - began >= 0.6
    assert Holder.from_bytes(store.get(PATH)).host != "another-host"


@pytest.mark.parametrize("text", ["{not json", "", "[]", '{"process": "1"}', "[" * 100_000])
def test_what_is_no_lease_ends_as_well(text: str, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.put(PATH, text.encode())
    lease(store, 0.1).acquire()


def test_the_term_that_the_lease_states_is_waited_for(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.put(PATH, dataclasses.replace(ELSEWHERE, term_s=1.5).to_bytes())
    began = time.monotonic()
    lease(store, 0.1).acquire()
    assert time.monotonic() - began >= 1.5
    assert Holder.from_bytes(store.get(PATH)).term_s == 0.1


@pytest.mark.parametrize("stated", ["inf", "-5", "NaN", "1e300", '"long"', "null"])
def test_a_term_that_no_setting_may_have_is_not_waited_for(stated: str, tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    text = dataclasses.replace(ELSEWHERE, term_s=7.0).to_bytes().decode()
    store.put(PATH, text.replace("7.0", stated).encode())
    lease(store, 0.1).acquire()


def test_a_lease_of_an_earlier_release_is_known_by_its_run() -> None:
    text = json.dumps({name: value for name, value in dataclasses.asdict(ELSEWHERE).items() if name != "term_s"})
    assert Holder.from_bytes(text.encode()) == ELSEWHERE


def test_a_short_setting_takes_no_lease_from_a_run_that_lives(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    first = Lease(store, 12, on_lost=lambda: None)
    first._mine = dataclasses.replace(ELSEWHERE, term_s=12)
    first.acquire()
    keeper = threading.Thread(target=first.renew_until_released, daemon=True)
    keeper.start()
    with pytest.raises(LeaseHeld, match="ends by itself 12 s later"):
        lease(store, 0.2).acquire()
    first.release()


def test_temporary_files_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    old, young = tmp_path / "concepts" / "a" / ".partial-old", tmp_path / ".partial-young"
    for path in (old, young, tmp_path / "kept.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    os.utime(tmp_path / "kept.json", (hour_ago, hour_ago))
    with hold_lease(RunStore(str(tmp_path)), 60):
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
            ".partial-young", "kept.json", "lease.json"
        ]  # fmt: skip


def test_a_dead_process_of_this_machine_is_not_waited_for(root: str) -> None:
    store = RunStore(root)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    store.put(PATH, dataclasses.replace(Holder.for_this_process(), process=gone.pid).to_bytes())
    began = time.monotonic()
    Lease(store, 60, on_lost=lambda: None).acquire()
    assert time.monotonic() - began < 30
    living = dataclasses.replace(Holder.for_this_process(), process=os.getppid())
    assert not living.is_dead()


def test_of_many_at_once_one_gets_it(root: str) -> None:
    if root.startswith("memory:"):
        pytest.skip("memory knows no conditional writes, and is one process's own")
    store = RunStore(root)

    def put(number: int) -> bool:
        try:
            store.put_if_match(PATH, str(number).encode(), "")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put, range(24))) == 1
        _, tag = store.get_with_etag(PATH)
        won = list(pool.map(lambda number: _replaced(store, number, tag), range(24)))
    assert sum(won) == 1


def _replaced(store: RunStore, number: int, tag: str) -> bool:
    try:
        store.put_if_match(PATH, f"new {number}".encode(), tag)
    except FileExistsError:
        return False
    return True


def test_whoever_has_lost_it_is_told(root: str) -> None:
    store, lost = RunStore(root), threading.Event()
    mine = Lease(store, 0.4, on_lost=lost.set)
    mine.acquire()
    store.put(PATH, ELSEWHERE.to_bytes())
    mine.renew_until_released()
    assert lost.is_set()
    mine.release()
    assert Holder.from_bytes(store.get(PATH)) == ELSEWHERE  # not ours to delete


def test_a_lease_that_was_tidied_away_is_put_back(root: str) -> None:
    store = RunStore(root)
    mine = lease(store)
    mine.acquire()
    store.delete(PATH)
    assert mine.renew()
    assert mine.renew()
    assert store.exists(PATH)


def test_a_run_that_lost_it_is_stopped_as_by_its_scheduler(root: str, sent: list[int]) -> None:
    store = RunStore(root)
    with hold_lease(store, 0.4):
        store.put(PATH, ELSEWHERE.to_bytes())
        _wait_for(lambda: sent == [signal.SIGTERM])


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals this process would have sent itself."""
    signals: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number) if number else kill(pid, number))
    return signals


def _wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
