"""`ssd check-data`: what would stop a run stops here, with status 1, and what would weaken it is said."""

import contextlib
import io
import json
import os
import shutil

import numpy as np
import pytest

from ssd.cli import main
from ssd.data.sources import open_source
from tests.data.files import class_folders, encoded, scene, write
from tests.verbs.conftest import typed

SMALL = ("--config", "method/dino_small", "--data.batch_size", 4)
QUICK = ("--workers", 0, "--seconds", 0)


@pytest.fixture
def folder(tmp_path):
    """Twenty colour pictures of 40 px in two classes, all fit for views of 32 px."""
    for number in range(20):
        picture = scene(40, 40, number, detail=3)
        write(tmp_path / "pets" / ("ant", "bee")[number % 2] / f"{number:02}.png", encoded(picture))
    return tmp_path / "pets"


@pytest.fixture
def check(tmp_path):
    """Runs the verb, and gives what it said and wrote."""

    def run(*argv):
        file = tmp_path / "found.json"
        file.unlink(missing_ok=True)
        said = typed("check-data", *argv, *QUICK, "--json", file)
        return said, json.loads(file.read_text()) if file.exists() else {}

    return run


def found(content: dict, check: str) -> list[dict]:
    return [finding for finding in content["findings"] if finding["check"] == check]


def test_data_without_a_fault_has_no_warning_and_status_0(folder, check):
    said, content = check(folder, *SMALL)
    assert (said.status, said.err) == (0, "")
    assert "nothing to mend" in said.out and content["findings"] == [] and content["stops"] is False
    training, held_out = content["parts"]["training"], content["parts"]["held-out"]
    assert (training["pictures"], held_out["pictures"]) == (18, 2)
    assert training["width"] == training["height"] == [40, 40, 40]
    assert sum(training["classes"].values()) == 18 and set(training["classes"]) == {"ant", "bee"}
    assert [kind["size"] for kind in content["views"]] == [32, 16], "the views of the config"


def test_a_path_and_data_are_the_same(folder, check):
    _, first = check(folder, *SMALL)
    _, second = check("--data", folder, *SMALL)
    assert first == second


def test_every_fault_of_a_picture_is_found_and_named(folder, check):
    write(folder / "ant" / "broken.jpg", b"words")
    write(folder / "ant" / "blank.png", encoded(np.full((40, 40, 3), 9, np.uint8)))
    write(folder / "ant" / "tiny.png", encoded(scene(5, 90)))
    write(folder / "ant" / "zcopy.bmp", encoded(scene(40, 40, 0, detail=3), "BMP"))
    write(folder / "ant" / "znear.jpg", encoded(scene(40, 40, 2, detail=3), "JPEG", quality=80))
    said, content = check(folder, *SMALL, "--data.max_broken_share", 0.5, "--data.val_share", 0)
    assert (said.status, said.err) == (0, ""), "each is named once, in the findings"
    training = content["parts"]["training"]
    (broken,) = training["broken"]
    assert broken["picture"].endswith("broken.jpg") and "5 bytes" in broken["reason"]
    assert [name.rpartition("/")[2] for name in training["blank"]] == ["blank.png"]
    names = [[(row["picture"][-9:], row["of"][-6:]) for row in training[key]] for key in ("copies", "look_alikes")]
    assert names == [[("zcopy.bmp", "00.png")], [("znear.jpg", "02.png")]]
    assert "tiny.png (90 x 5 px)" in found(content, "tiny")[0]["text"]
    for check_name in ("broken", "blank", "tiny", "duplicates"):
        for finding in found(content, check_name):
            assert finding["level"] == "warning" and finding["text"] in said.out


def test_too_many_broken_pictures_stop_a_run_as_the_run_says(folder, check):
    for number in range(3):
        write(folder / "ant" / f"broken{number}.jpg", b"words")
    said, content = check(folder, *SMALL)
    assert said.status == 1 and content["stops"] is True
    assert "max_broken_share = 0.01" in found(content, "broken")[0]["text"]
    assert content["findings"][0]["level"] == "stop", "what stops comes first"


def test_a_folder_of_words_is_no_data(tmp_path, check):
    for number in range(3):
        write(tmp_path / "words" / f"{number}.jpg", b"words")
    said, content = check(tmp_path / "words")
    assert said.status == 1 and "none of the 3 training pictures can be read" in said.out
    assert content["views"] == [] and content["parts"]["training"]["mean"] == []


def test_fewer_samples_than_a_step_stop_a_run(folder, check):
    said, content = check(folder, "--config", "method/dino_small")
    assert said.status == 1
    assert "18 training samples do not fill one step of 64" in found(content, "run")[0]["text"]


def test_labels_that_only_the_training_data_has_stop_a_run(folder, tmp_path, check):
    write(tmp_path / "loose" / "1.png", encoded(scene(40, 40, 77, detail=3)))
    said, content = check(folder, "--data.val_path", tmp_path / "loose", *SMALL)
    assert said.status == 1 and "val_path" in found(content, "parts")[0]["text"]
    assert content["parts"]["held-out"]["pictures"] == 1, "and is looked at all the same"


def test_pictures_of_other_channels_stop_a_run(tmp_path, check):
    for number in range(3):
        (tmp_path / "four").mkdir(exist_ok=True)
        np.save(tmp_path / "four" / f"{number}.npy", np.zeros((20, 20, 5), np.uint8))
    said, content = check(tmp_path / "four", *SMALL)
    assert said.status == 1 and "5 channels where 3 are expected" in content["parts"]["training"]["broken"][0]["reason"]
    assert check(tmp_path / "four", *SMALL, "--data.channels", 5, "--data.batch_size", 2)[0].status == 0


def test_what_is_trained_on_and_held_out_is_found(folder, tmp_path, check):
    shutil.copytree(folder, tmp_path / "val")
    for picture in sorted((tmp_path / "val").rglob("*.png"))[1:]:
        write(picture, encoded(scene(40, 40, 100 + int(picture.stem), detail=3)))
    said, content = check(folder, "--data.val_path", tmp_path / "val", *SMALL)
    assert said.status == 0, "a run would not stop"
    assert "1 of 20 (5.0%) held-out pictures are in the training data" in found(content, "leakage")[0]["text"]
    assert [name.rpartition("/")[2] for name in content["parts"]["held-out"]["in_training"]] == ["00.png"]
    write(tmp_path / "val" / "torn.png", b"no picture")
    _, content = check(folder, "--against", tmp_path / "val", *SMALL, "--data.val_share", 0)
    assert "1 of 21 (4.8%) other pictures cannot be read and were not compared" in found(content, "broken")[0]["text"]
    assert "1 of 21 (4.8%) other pictures are in the training data" in found(content, "leakage")[0]["text"]
    assert list(content["parts"]) == ["training", "other"]


def test_train_and_val_folders_are_held_against_each_other(tmp_path, check):
    for part in ("train", "val"):
        for number in range(6):
            seed = number if part == "train" or number == 0 else 50 + number
            write(tmp_path / "all" / part / "ab"[number % 2] / f"{number}.png", encoded(scene(40, 40, seed, detail=3)))
    _, content = check(tmp_path / "all", *SMALL)
    assert "1 of 6" in found(content, "leakage")[0]["text"]


def test_uneven_classes_and_missing_labels_are_notes(tmp_path, check):
    lines = []
    for number in range(24):
        write(tmp_path / f"{number}.png", encoded(scene(40, 40, number, detail=3)))
        lines.append(f"{number}.png" + ("\trare" if number == 0 else "\toften" if number < 22 else ""))
    write(tmp_path / "list.txt", "\n".join(lines).encode())
    said, content = check(tmp_path / "list.txt", *SMALL, "--data.val_share", 0)
    texts = [finding["text"] for finding in found(content, "classes")]
    assert said.status == 0 and content["parts"]["training"]["classes"] == {"often": 21, "rare": 1}
    assert any("2 of 24" in text and "no label" in text for text in texts)
    assert any("21 pictures of 'often' and 1 of 'rare'" in text for text in texts)


def test_views_too_large_for_the_pictures_are_a_warning_with_a_size_that_fits(folder, check):
    _, content = check(folder, "--views", "dino", "--views.local_count", 0, "--data.batch_size", 4)
    (finding,) = found(content, "crops")
    (kind,) = content["views"]
    assert finding["level"] == "warning" and kind["share"] == 1.0
    assert kind["median"] == pytest.approx(224 / kind["crop"]) and 25 < kind["crop"] < 40
    assert "about 32 px" in finding["text"]


def test_grey_pictures_are_counted(tmp_path, check):
    for number in range(6):
        write(tmp_path / "grey" / f"{number}.png", encoded(scene(40, 40, number, detail=3)[:, :, 0]))
    _, content = check(tmp_path / "grey", *SMALL)
    assert "all 6 pictures have no colour" in found(content, "grey")[0]["text"]


def test_a_limit_looks_at_so_many_and_counts_all(folder, check):
    said, content = check(folder, *SMALL, "--limit", 5)
    training = content["parts"]["training"]
    assert (training["pictures"], training["looked_at"]) == (18, 5) and sum(training["classes"].values()) == 18
    assert "looked at" in said.out


def test_the_list_of_good_pictures_is_data_without_the_faults(folder, tmp_path, check):
    write(folder / "ant" / "broken.jpg", b"words")
    write(folder / "bee" / "blank.png", encoded(np.full((40, 40, 3), 9, np.uint8)))
    write(folder / "bee" / "zcopy.bmp", encoded(scene(40, 40, 1, detail=3), "BMP"))
    said, _ = check(folder, *SMALL, "--data.max_broken_share", 1, "--out", tmp_path / "good.txt")
    assert "20 good pictures of 23" in said.out, "of both parts, and each once over both"
    listed = open_source(tmp_path / "good.txt")
    assert sorted(listed.describe(index)[-10:] for index in range(20)) == sorted(
        f"{('ant', 'bee')[n % 2]}/{n:02}.png" for n in range(20)
    )
    assert listed.classes == ["ant", "bee"] and np.bincount(listed.labels).tolist() == [10, 10]
    _, content = check(tmp_path / "good.txt", *SMALL)
    assert content["findings"] == []


def test_a_name_that_no_line_can_hold_costs_the_list_and_not_the_report(folder, tmp_path, check):
    write(folder / "bee" / "new\nline.png", encoded(scene(40, 40, 60, detail=3)))
    said, content = check(folder, *SMALL, "--out", tmp_path / "good.txt")
    assert said.status == 2 and "'new\\nline.png" in said.err.replace(str(folder / "bee") + "/", "")
    assert content["parts"]["training"]["pictures"] == 19 and "training" in said.out
    assert not (tmp_path / "good.txt").exists()


def test_a_broken_file_whose_name_is_no_text_is_named_all_the_same(folder):
    with open(os.fsencode(folder) + b"/ant/p\xff.png", "wb") as file:
        file.write(b"words")
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    with contextlib.redirect_stdout(out):
        words = ["check-data", folder, *SMALL, *QUICK, "--data.val_share", 0, "--data.max_broken_share", 0.5]
        assert main([str(word) for word in words]) == 0
    out.flush()
    assert b"ant/p\\udcff.png: not a picture" in out.buffer.getvalue()


def test_broken_held_out_pictures_are_left_out_and_not_replaced(folder, tmp_path, check):
    shutil.copytree(folder, tmp_path / "val")
    write(tmp_path / "val" / "ant" / "00.png", b"words")
    _, content = check(folder, "--data.val_path", tmp_path / "val", *SMALL, "--data.max_broken_share", 0.5)
    assert "held-out pictures cannot be read and are left out: " in found(content, "broken")[0]["text"]


def test_the_loader_is_timed_with_each_number_of_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ssd.verbs.check_data.available_cores", lambda: 1)
    file = tmp_path / "found.json"
    said = typed("check-data", folder, *SMALL, "--workers", 1, "--seconds", 0.2, "--json", file)
    content = json.loads(file.read_text())
    assert said.status == 0 and [speed["workers"] for speed in content["loader"]] == [0, 1]
    assert all(speed["pictures_per_s"] > 0 for speed in content["loader"])
    assert content["workers"] in (0, 1) and f"{content['workers']} (use this)" in said.out


def test_values_of_sixteen_bits_are_looked_at_in_the_range_they_have(tmp_path, check):
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for number in range(6):
        np.save(tmp_path / "deep" / f"{number}.npy", rng.integers(300, 1100, (40, 40, 4)).astype(np.uint16))
    _, content = check(tmp_path / "deep", *SMALL, "--data.channels", 4, "--data.value_range", "data")
    assert content["parts"]["training"]["mean"] == pytest.approx([0.5] * 4, abs=0.03)
    _, content = check(tmp_path / "deep", *SMALL, "--data.channels", 4)
    assert len(found(content, "blank")) == 1, "in the range of 16 bits they show nothing"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], ["--data nowhere", "path that exists"]),
        ([], ["ssd check-data needs data"]),
        (["pets", "--views", "dinno"], ["'dinno'", "dino_small"]),
        (["pets", "--views.global_sizes", "9"], ["'global_sizes' is not a setting of views"]),
        (["pets", "--data.bach_size", "9"], ["'bach_size' is not a setting of data"]),
        (["pets", "--limit", "0"], ["--limit", "at least 1"]),
        (["pets", "--workers", "-1"], ["--workers"]),
        (["pets", "--seconds", "soon"], ["--seconds", "number of seconds"]),
        (["pets", "--against", "nowhere"], ["there is no 'nowhere'"]),
        (["pets", "--out", "good.png"], ["--out good.png", ".txt"]),
        (["stack.npy", "--out", "good.txt"], ["--out good.txt lists files", "stack.npy, picture"]),
        (["pets", "--views", "speech"], ["makes views by PictureViews", "SoundViews"]),
        (["pets", "--views", "clip"], ["makes views by PictureViews", "ClipViews"]),
        (["pets", "--json", "/"], ["--json / cannot be written"]),
        (["empty"], ["holds no pictures"]),
    ],
)
def test_a_mistake_is_one_message(folder, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "stack.npy", np.zeros((4, 40, 40, 3), np.uint8))
    said = typed("check-data", *argv)
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err


@pytest.mark.data
def test_a_set_of_photographs_is_fit_to_run_on(real_data, check):
    said, content = check(real_data / "caltech20", "--limit", 400)
    assert said.status == 0 and content["parts"]["training"]["broken"] == []
    assert 0 < content["parts"]["training"]["grey"] < 40
    assert len(content["parts"]["training"]["classes"]) == 20


def test_class_folders_that_are_even_are_not_told_so(tmp_path, check):
    class_folders(tmp_path / "even", {"a": 6, "b": 6}, side=40)
    _, content = check(tmp_path / "even", *SMALL)
    assert found(content, "classes") == []
