"""The benchmark runs, compares what is the same, and writes what it found."""

import json

import pytest
import torch

from ssd.benchmarks import data as benchmark
from ssd.benchmarks.paired import compare
from ssd.cli import main


def test_bench_data_prints_and_writes_every_pair(tmp_path, capsys):
    assert main(["bench", "data", "--rounds", "1", "--pictures", "2", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    pairs = [row for row in rows if not row["case"].startswith("stage")]
    assert {row["against"] for row in pairs} == {"lightly", "torchvision", "Pillow", "a loop"}
    for row in pairs:
        assert row["low"] <= row["ratio"] <= row["high"] and row["ours"] > 0 and row["baseline"] > 0
    stages = [row for row in rows if row["case"].startswith("stage")]
    assert len(stages) == 4 and all(row["unit"] == "ms/picture" and row["ours"] > 0 for row in stages)
    out = capsys.readouterr().out
    assert "lowest to highest" in out and "decode" in out


@pytest.mark.parametrize("option", ["--rounds", "--pictures"])
def test_bench_refuses_no_work(option, capsys):
    assert main(["bench", "data", option, "0"]) == 2
    assert option in capsys.readouterr().err


def test_both_sides_make_the_same_views():
    files = benchmark.photographs(2, 500, 375, 90)
    assert files == benchmark.photographs(2, 500, 375, 90), "the same pictures in every run"
    sizes = [(224, 224)] * 2 + [(96, 96)] * 8
    for theirs in (benchmark.lightlys(files, benchmark.LARGE), benchmark.torchvisions(files, benchmark.LARGE)):
        views = theirs()[0]
        assert [tuple(view.shape[-2:]) for view in views] == sizes
        assert all(view.dtype == torch.float32 for view in views)
    ours = benchmark.Ours(files, benchmark.LARGE)()
    assert {kind: tuple(view.shape) for kind, view in ours.views.items()} == {
        "global": (2, 2, 3, 224, 224),
        "local": (8, 2, 3, 96, 96),
    }
    assert all(view.dtype == torch.float32 for view in ours.views.values())


def test_ratios_are_those_of_each_round():
    times = iter([9.0, 9.0, 1.0, 2.0, 1.0, 4.0, 2.0, 2.0])
    now = 0.0

    def clock() -> float:
        return now

    def work() -> None:
        nonlocal now
        now += next(times)

    pair = compare("case", work, work, count=8, rounds=3, unit="x/s", clock=clock)
    assert (pair.ratio, pair.low, pair.high) == (2.0, 1.0, 4.0)
    assert (pair.ours, pair.baseline) == (8.0, 4.0)
