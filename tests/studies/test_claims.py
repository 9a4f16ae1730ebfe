"""A cell has one worker, whatever happens to the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

from pyprune.studies.claims import Claims


def test_a_cell_is_one_worker_s_until_it_ends(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.claim("a-0.5") as mine:
        assert mine and second.owner("a-0.5").pid == os.getpid()
        with second.claim("a-0.5") as also, second.claim("b") as other:
            assert not also and other
    assert second.owner("a-0.5") is None and not list(tmp_path.glob("*.[0-9]"))
    with second.claim("a-0.5") as mine:
        assert mine


def _race(folder, start, cells, results):
    claims, won = Claims(folder), []
    start.wait()
    for cell in cells:
        with claims.claim(cell) as mine:
            if mine and not (folder / f"{cell}.done").exists():
                time.sleep(0.002)
                with open(folder / f"{cell}.log", "a") as log:
                    log.write("x")
                (folder / f"{cell}.done").touch()
                won.append(cell)
    results.put(won)


def test_four_processes_share_the_cells_and_do_each_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    cells = [f"cell-{k}" for k in range(25)]
    workers = [context.Process(target=_race, args=(tmp_path, start, cells, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    won = [cell for _ in workers for cell in results.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(won) == sorted(cells)
    assert all((tmp_path / f"{cell}.log").read_text() == "x" for cell in cells)


def leave(folder, host: str, pid: int, age: float = 0.0):
    path = folder / "cell.0"
    path.write_text(json.dumps({"host": host, "pid": pid, "since": 0}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_dead_worker_s_cell_is_taken_over_at_once(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claims = Claims(tmp_path)
    leave(tmp_path, claims.me.host, dead.pid)
    assert claims.owner("cell") is None
    with claims.claim("cell") as mine:
        assert mine and {path.name for path in tmp_path.glob("cell.*")} == {"cell.0", "cell.1"}
    assert not list(tmp_path.glob("cell.*"))


def test_another_machine_s_cell_is_taken_over_when_it_is_silent(tmp_path):
    claims = Claims(tmp_path, stale=30)
    leave(tmp_path, "elsewhere", 1, age=20)
    assert str(claims.owner("cell")) == "process 1 on elsewhere"
    with claims.claim("cell") as mine:
        assert not mine
    leave(tmp_path, "elsewhere", 1, age=40)
    with claims.claim("cell") as mine:
        assert mine


def test_a_takeover_has_one_winner(tmp_path):
    leave(tmp_path, "elsewhere", 1, age=1000)
    barrier, won = threading.Barrier(8), []

    def take():
        claims = Claims(tmp_path)
        barrier.wait()
        path = claims._take("cell")
        won.append(path)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in won if path is not None] == ["cell.1"]


def test_who_works_shows_signs_of_life(tmp_path):
    claims = Claims(tmp_path, beat=0.02, stale=0.5)
    with claims.claim("cell") as mine:
        assert mine
        os.utime(tmp_path / "cell.0", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / "cell.0").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claims.owner("cell") is not None
