"""What a run left is read as far as it can be, and what cannot is said."""

import copy
import json
import os
import time

import pytest

from ssd.errors import UserError
from ssd.report.page import page
from ssd.report.reading import flattened, read_run, seeds_of_one, setting_differences
from tests.report.runs import CONFIG, facts, png, rows_of, write_metrics, write_run


def test_a_whole_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", pictures={"views": [0], "attention": [10, 20, 30]}))
    assert (run.name, run.state, run.step, run.total, run.seconds) == ("a", "finished", 30, 30, 125.0)
    assert run.series["train/loss/total"] == {9: 3.0, 19: 2.0, 29: 1.5}
    assert [(number.name, number.value, number.chance) for number in run.numbers] == [
        ("knn/top1", 0.9, 0.104),
        ("spectrum/rankme", 31.25, None),
    ]
    assert run.baselines["pixels"]["linear_1pct"].value == 0.6
    assert [picture.step for picture in run.pictures["attention"]] == [10, 20, 30]
    assert run.pictures["views"][0].data.startswith(b"\x89PNG")
    assert run.problems == ["there is no checkpoint yet."]


def test_a_session_that_went_on_from_an_earlier_step_counts_from_there(tmp_path):
    """Steps 20 and 30 were logged, the checkpoint was of step 15, and the run went on from it."""
    folder = write_run(tmp_path / "a", [3.0, 2.0, 1.5])
    write_metrics(folder / "csv" / "version_1", [{**row, "step": row["step"] + 10} for row in rows_of([1.0, 0.5])])
    assert read_run(folder).series["train/loss/total"] == {9: 3.0, 19: 1.0, 29: 0.5}
    write_metrics(folder / "csv" / "version_10", [{"step": 29, "train/loss/total": 0.1}])
    assert read_run(folder).series["train/loss/total"] == {9: 3.0, 19: 1.0, 29: 0.1}, "10 comes after 1"


def test_the_quickstarts_summary_is_read(tmp_path):
    summary = {
        "pixels": {"knn": 0.98, "linear_1pct": 0.6},
        "pretrained": {"knn": 0.99, "linear_1pct": 0.92},
        "spread": {"pretrained": {"linear_1pct": 0.03}},
        "protocols": {"knn": "knn-v1 k=20"},
        "seconds": 125.2,
    }
    run = read_run(write_run(tmp_path / "a", run=facts(sessions=[]), summary=summary))
    assert run.baselines["pretrained"]["linear_1pct"].spread == 0.03
    assert run.baselines["pixels"]["knn"].protocol == "knn-v1 k=20" and run.seconds == 125.2


def test_findings_of_the_doctor_are_kept_and_what_is_none_is_left_out(tmp_path):
    finding = {"kind": "collapse", "step": 40, "message": "all alike", "suggestion": "lower the rate"}
    run = read_run(write_run(tmp_path / "a", summary={"findings": [finding, "odd"]}))
    assert run.findings == [finding]


def test_numbers_come_from_the_log_where_nothing_else_has_them(tmp_path):
    folder = write_run(tmp_path / "a", [], run={}, summary={})
    write_metrics(folder / "csv" / "version_0", [{"step": 4, "val/knn/top1": 0.5}, {"step": 9, "val/knn/top1": 0.7}])
    assert [(number.name, number.value) for number in read_run(folder).numbers] == [("knn/top1", 0.7)]


@pytest.mark.parametrize(
    ("sessions", "age_s", "state"),
    [
        ([{"step": 12, "seconds": 60}], 10, "going"),
        ([{"step": 12, "seconds": 60}], 3600, "stopped"),
        ([{"step": 12, "seconds": 60, "ended": True}], 10, "stopped"),
        ([{"step": 5, "seconds": 20}, {"step": 30, "seconds": 60, "ended": True}], 3600, "finished"),
    ],
)
def test_a_run_is_finished_going_or_stopped(tmp_path, sessions, age_s, state):
    folder = write_run(tmp_path / "a", [3.0], run=facts(sessions=sessions))
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - age_s,) * 2)
    run = read_run(folder)
    assert run.state == state and run.seconds == sum(session["seconds"] for session in sessions)


def test_how_a_run_died_is_told(tmp_path):
    run = read_run(
        write_run(tmp_path / "a", run=facts(sessions=[{"step": 3, "ended": True, "error": "OSError: full"}]))
    )
    assert run.error == "OSError: full"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", b"model: [", "config.yaml cannot be read"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml cannot be read"),
        ("config.yaml", b"3", "config.yaml holds no settings"),
        ("run.json", b"{", "run.json cannot be read"),
        ("summary.json", b"{'", "summary.json cannot be read"),
        ("csv/version_0/metrics.csv", b"", "no logged numbers"),
        (
            "csv/version_0/metrics.csv",
            b"step,train/loss/total\n3,1.0\nx,2\n4,\n5,y\n",
            "2 lines of metrics.csv are broken",
        ),
        ("csv/version_0/metrics.csv", b"step,train/loss/total\n3,1.0\n4,\x00\x00", None),
        ("checkpoints/last.ckpt", b"PK\x03\x04", "checkpoints/last.ckpt cannot be read"),
        ("tensorboard/events.out.tfevents.1", b"\x00" * 100, None),
        ("sheet.png", b"no picture", None),
        ("odd.json", b"[1, 2]", None),
    ],
)
def test_a_broken_file_is_told_and_the_rest_is_read(tmp_path, file, content, words):
    folder = write_run(tmp_path / "a", pictures={"views": [0]})
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    run = read_run(folder)
    told = [problem for problem in run.problems if "no checkpoint" not in problem]
    assert len(told) == (words is not None) and (words is None or words in told[0]), told
    assert "views" in run.pictures and "sheet" not in run.pictures


def test_a_run_of_which_one_file_is_left_is_a_run_and_an_empty_folder_is_none(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="holds nothing that a run leaves"):
        read_run(tmp_path / "a")
    with pytest.raises(UserError, match="no folder of a run"):
        read_run(tmp_path / "gone")
    (tmp_path / "a" / "config.yaml").write_text("model: {}")
    run = read_run(tmp_path / "a")
    assert run.state == "going" or run.last_sign_s == float("inf")
    assert len(run.problems) == 2


def test_pictures_are_thinned_over_the_run_and_files_beside_it_are_shown(tmp_path):
    folder = write_run(tmp_path / "a", pictures={"components": list(range(0, 300, 10))})
    (folder / "pca.png").write_bytes(png())
    (folder / "curve.png").write_bytes(png())
    run = read_run(folder)
    steps = [picture.step for picture in run.pictures["components"]]
    assert len(steps) == 8 and (steps[0], steps[-1]) == (0, 290) and steps == sorted(steps)
    assert set(run.pictures) == {"components", "pca"}, "the page draws curves itself"


def test_settings_that_differ_are_found_without_where_runs_lie(tmp_path):
    other = copy.deepcopy(CONFIG)
    other["trainer"]["default_root_dir"] = "elsewhere"
    other["model"]["init_args"]["backbone"]["init_args"] = {"name": "resnet34", "depth": [1, 2]}
    runs = [read_run(write_run(tmp_path / name, config=config)) for name, config in (("a", CONFIG), ("b", other))]
    assert setting_differences(runs) == {
        "model.backbone.name": ["resnet18", "resnet34"],
        "model.backbone.depth": [None, [1, 2]],
    }
    assert flattened({"a": {"class_path": "x", "init_args": {"b": 1}}, "c": {}}) == {
        "a.class_path": "x",
        "a.b": 1,
        "c": {},
    }


def test_seeds_of_one_run_differ_in_nothing_but_the_seed(tmp_path):
    seeds, wider = copy.deepcopy(CONFIG), copy.deepcopy(CONFIG)
    seeds["seed_everything"] = seeds["data"]["init_args"]["seed"] = 1
    wider["model"]["init_args"]["num_prototypes"] = 64
    a, b, c, d = (
        read_run(write_run(tmp_path / name, config=config))
        for name, config in (("a", CONFIG), ("b", seeds), ("c", wider), ("d", {}))
    )
    assert seeds_of_one([a, b]) and not seeds_of_one([a, c]) and not seeds_of_one([d, d])


def test_what_probe_wrote_into_the_folder_is_read(tmp_path):
    folder = write_run(tmp_path / "a", summary={})
    rows = {"pretrained": {"knn": {"name": "knn/top1", "value": 0.8, "protocol": "p", "chance": 0.1, "spread": None}}}
    numbers = [{"name": "a", "value": None}, {"name": "knn/k10/top1", "value": 0.7}]
    (folder / "probe.json").write_text(json.dumps({"file": "x", "numbers": numbers, "baselines": rows}))
    run = read_run(folder)
    assert run.baselines["pretrained"]["knn"].value == 0.8 and run.numbers == []
    assert [(number.name, number.value) for number in run.probes["probe.json"]] == [("knn/k10/top1", 0.7)]
    assert "knn k10" in page([run]) and "probe.json" in page([run])
