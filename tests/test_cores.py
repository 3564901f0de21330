"""Whether other work has the cores, and that a run is told."""

import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

import ssd.cores
from ssd import cli_checks
from ssd.cores import busy_cores


def stat(monkeypatch, tmp_path, *lines: str) -> None:
    """/proc/stat says these one after the other."""
    texts = iter(lines)
    file = tmp_path / "stat"
    file.write_text("")
    monkeypatch.setattr(ssd.cores, "STAT", file)
    monkeypatch.setattr(ssd.cores, "ticks", lambda: [int(number) for number in next(texts).split()[1:9]])


def test_the_share_that_is_not_idle_counts(monkeypatch, tmp_path):
    stat(monkeypatch, tmp_path, "cpu 100 0 50 800 10 0 5 0", "cpu 160 0 60 810 20 0 15 0")  # 80 of 100 ticks
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert busy_cores(0.0) == pytest.approx(3.2)


def test_where_the_system_does_not_say_nothing_is_busy(monkeypatch, tmp_path):
    monkeypatch.setattr(ssd.cores, "STAT", tmp_path / "none")
    assert busy_cores(0.0) == 0


@pytest.mark.skipif(not ssd.cores.STAT.is_file(), reason="the system does not say what its cores do")
def test_a_core_that_works_is_seen():
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.05)
    found = busy_cores(0.5)
    over.set()
    thread.join()
    assert found > 0.5


@pytest.mark.parametrize(
    ("busy", "threads", "device", "world", "told"),
    [
        (2.0, 2, "cpu", 1, True),
        (1.0, 2, "cpu", 1, False),
        (2.0, 1, "cpu", 1, False),
        (2.0, 2, "cuda", 1, False),
        (2.0, 2, "cpu", 2, False),
    ],
)
def test_a_run_of_several_threads_on_a_busy_machine_is_warned(monkeypatch, busy, threads, device, world, told):
    monkeypatch.setattr(cli_checks, "busy_cores", lambda: busy)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), world_size=world)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cli_checks.warn_if_busy(trainer)
    assert bool(said) == told
    assert not told or "other work has 2.0 of this machine's 2 cores" in str(said[0].message)
