"""The benchmark runs, compares what is the same, and writes what it found."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssd.benchmarks import cached, masked
from ssd.benchmarks import data as benchmark
from ssd.benchmarks.evaluation import clouds, train_layers
from ssd.benchmarks.memory import peak_bytes
from ssd.benchmarks.packed import packed_pass
from ssd.benchmarks.paired import compare
from ssd.benchmarks.step import PARTS, Case, Lightlys, Ours
from ssd.cached_targets.forms import Form
from ssd.cli import main
from ssd.evaluation.linear import RATES, train_heads

TINY = Case("test_vit", batch=2, prototypes=32)


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


SMALL = ["--network", "test_vit", "--large", "test_vit", "--batch", "2", "--prototypes", "32", "--threads", "1"]


def rows_of_step(parts, folder):
    file = str(folder / "rows.json")
    assert main(["bench", "step", *SMALL, "--rounds", "1", "--json", file, "--parts", *parts]) == 0
    rows = json.loads((folder / "rows.json").read_text())
    for row in rows:
        assert row["low"] <= row["ratio"] <= row["high"] and row["ours"] > 0 and row["baseline"] > 0
    return rows


def test_bench_step_prints_and_writes_every_part(tmp_path, capsys):
    begins = {"steps": "step", "loss": "loss", "ema": "EMA", "packed": "packed", "settings": "setting"}
    assert set(begins) | {"memory"} == set(PARTS)
    rows = rows_of_step(begins, tmp_path)
    for begin in begins.values():
        assert any(row["case"].startswith(begin) for row in rows)
    assert "lowest to highest" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_step_measures_processes_of_their_own(tmp_path):
    rows = rows_of_step(["memory"], tmp_path)
    assert [row["unit"] for row in rows] == ["MiB", "MiB"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--parts", "everything"], "--parts"),
        (["--rounds", "0"], "--rounds"),
        (["--prototypes", "many"], "--prototypes"),
        (["--network", "resnet50"], "not a vision transformer"),
        (["--json", "/dev/null/rows.json"], "--json"),
    ],
)
def test_bench_step_says_what_is_wrong_before_it_measures(options, message, capsys):
    assert main(["bench", "step", *options]) == 2
    assert message in capsys.readouterr().err


def test_both_sides_take_the_same_step():
    """From the same weights the same loss, and after a step again."""
    ours, theirs = Ours(TINY), Lightlys(TINY)
    backbone, head = theirs.student
    for network in (ours.module.student, ours.module.teacher.network):
        network.backbone.model.load_state_dict(backbone.state_dict())
        linears = zip(
            *([m for m in mlp.modules() if isinstance(m, nn.Linear)] for mlp in (network.head.mlp, head.layers))
        )
        for mine, lightlys in linears:
            mine.load_state_dict(lightlys.state_dict())
        network.head.last_layer.load_state_dict(head.last_layer.state_dict())
    ours.module.weight_decay, ours.module.clip = 0.0, None  # which parameters decay differs
    theirs.optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(2):
        ours()
        assert_close(torch.tensor(ours.module.last_report.total), theirs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_a_packed_pass_answers_what_one_pass_for_each_size_does(half):
    backbone, views = TINY.backbone().eval(), TINY.views()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        packed = packed_pass(backbone, [kind.flatten(0, 1) for kind in views.values()])
        alone = torch.cat([backbone(kind.flatten(0, 1)).pooled() for kind in views.values()])
    assert_close(packed, alone, **({"rtol": 0.05, "atol": 0.05} if half else {"rtol": 1e-4, "atol": 1e-5}))


def test_peak_bytes_counts_what_lives_at_once():
    kept = torch.zeros(1000)
    assert peak_bytes(lambda: [torch.zeros(1000) for _ in range(3)]) == 12_000
    assert 4_000 <= peak_bytes(lambda: [torch.zeros(1000).sum() for _ in range(3)]) < 5_000
    assert peak_bytes(lambda: kept.view(10, 100)) == 0


def test_bench_masked_prints_and_writes_every_part(tmp_path, capsys):
    file = str(tmp_path / "rows.json")
    small = ["--network", "test_vit", "--size", "96", "--batch", "2", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "masked", *small, "--json", file]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    begins = {"encoder": "encoder", "teacher": "teacher", "masks": "data2vec", "leap": "LEAP"}
    assert set(begins) == set(masked.PARTS)
    assert {row["case"].partition(" ")[0].strip(",") for row in rows} == set(begins.values())
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["ours"] > 0 < row["baseline"] for row in rows)
    assert "lowest to highest" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--parts", "everything"], "--parts"),
        (["--ratio", "1"], "--ratio is 1"),
        (["--ratio", "0.999", "--size", "64"], "leaves none"),
        (["--network", "resnet50"], "not a vision transformer"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bench_masked_says_what_is_wrong_before_it_measures(options, message, capsys):
    assert main(["bench", "masked", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_masked_pass_is_of_a_quarter_of_the_patches():
    case = masked.Case("test_vit", size=64)
    network = case.backbone()
    visible = case.visible(network)
    places = network.grid(64, 64)[0] ** 2
    assert visible.shape == (16, places // 4) and visible.max() < places
    assert all(len(set(row)) == places // 4 for row in visible.tolist())


def test_bench_evaluation_compares_equal_answers(tmp_path, capsys):
    file = tmp_path / "rows.json"
    small = ["--rounds", "1", "--threads", "1", "--bank", "600", "--queries", "50", "--train", "520"]
    assert main(["bench", "evaluation", *small, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    pairs = [row for row in rows if row["ratio"] is not None]
    assert {row["against"] for row in pairs} == {"lightly", "a loop of layers", "scikit-learn"} and len(pairs) == 5
    for row in pairs:
        assert row["low"] <= row["ratio"] <= row["high"] and row["ours"] > 0 and row["baseline"] > 0
    answers = [row for row in rows if row["ratio"] is None and row["unit"] == "share"]
    assert len(answers) == 5
    for row in answers:
        assert row["ours"] == pytest.approx(row["baseline"], abs=0.05)  # five of 104; other batches in the loop
    assert "lowest to highest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"), [(["--train", "100"], "--train is 100"), (["--bank", "100"], "--bank is 100")]
)
def test_bench_evaluation_says_what_is_wrong_before_it_measures(options, message, capsys):
    assert main(["bench", "evaluation", *options]) == 2
    assert message in capsys.readouterr().err


def test_layers_in_a_loop_are_the_heads_of_one_product():
    """What is timed beside each other learns the same: on one batch a step, both from zero."""
    features, labels = clouds(256, 16, 4, seed=0)
    heads = train_heads(features, labels, RATES, 4, epochs=6, min_steps=1)
    for number, layer in enumerate(train_layers(features, labels, 4, steps=6)):
        assert_close(heads.weight[number].T, layer.weight.detach(), atol=1e-4, rtol=1e-4)


FEW_NUMBERS = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize(("name", "numbers"), [("dbot", 17 * 24), ("dmae", 5 * 24), ("leap", 17 * 24)])
def test_stored_targets_are_timed_beside_the_teacher_and_weighed(name, numbers):
    """A class token and 16 patches, or 4 of them, of 24 numbers in half precision."""
    case = masked.Case(arguments=FEW_NUMBERS, size=32, batch=2)
    found = cached.compare_step(name, case, "vit_tiny_patch16_224", Form("float16"), rounds=1)
    assert found.bytes_per_look == 2 * numbers
    assert 1e-5 < found.error < 1 / 2048, "rounding, and no more"
    row = found.row()
    assert row["low"] <= row["ratio"] <= row["high"] and row["against"] == "the teacher's pass"
