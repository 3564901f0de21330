"""Shards on disk: read as written, and every fault of them named."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from ssd.batch import Batch
from ssd.cached_targets import folder as folders
from ssd.cached_targets.folder import Layout, ShardWriter, TargetFolder
from ssd.cached_targets.identity import VERSION
from ssd.errors import UserError

IDENTITY = {"version": VERSION, "teacher": {"weights": "a" * 64}, "views": {"global": [{"size": 32}], "variants": 2}}
FORM = {"dtype": "float16", "tokens": None, "classes": None}
SAMPLES, VARIANTS = 10, 2


def answers(sample: int, variant: int) -> dict[str, np.ndarray]:
    """Of one look: (1, V, ...)"""
    value = 10 * sample + variant
    return {
        "features": np.full((1, 1, 3, 4), value, np.float16) + np.arange(4, dtype=np.float16),
        "places": np.array([[[value, 2, 3]]], np.int32),
    }


def begun(path, identity=IDENTITY, form=FORM, per_shard=4) -> TargetFolder:
    layout = Layout.of(answers(0, 0), SAMPLES, VARIANTS, per_shard)
    return TargetFolder.begin(path, identity, form, layout, {"torch": "any"})


def write_shard(folder: TargetFolder, shard: int, missing=()) -> None:
    with ShardWriter(folder, shard) as writer:
        for sample in writer.samples:
            if sample in missing:
                writer.missing.add(sample)
                continue
            for variant in range(VARIANTS):
                writer.put(sample, variant, 0, answers(sample, variant))
        writer.finish()


@pytest.fixture
def filled(tmp_path) -> TargetFolder:
    folder = begun(tmp_path / "targets")
    for shard in folder.missing():
        write_shard(folder, shard)
    return TargetFolder(tmp_path / "targets")


def test_rows_come_back_in_any_order_as_they_were_written(filled):
    filled.check_whole()
    assert filled.layout.shards == 3 and [len(filled.layout.samples_of(shard)) for shard in range(3)] == [4, 4, 2]
    found = filled.read([9, 0, 5, 0], [1, 0, 1, 1])
    assert found["features"].shape == (1, 4, 3, 4) and found["features"].dtype == torch.float16
    assert found["features"][0, :, 0, 0].tolist() == [91, 0, 51, 1]
    assert found["places"][0, :, 0].tolist() == [91, 0, 51, 1]
    assert torch.equal(found["features"][0, 2], torch.from_numpy(answers(5, 1)["features"][0, 0]))
    assert filled.layout.bytes_per_look == 3 * 4 * 2 + 3 * 4


def test_a_batch_gets_the_rows_of_its_samples_and_slices_keep_them(filled):
    batch = Batch(
        {"global": torch.zeros(1, 4, 1, 2, 2)}, torch.tensor([3, 8, 1, 6]), 4, variant=torch.tensor([0, 1, 1, 0])
    )
    filled.attach(batch)
    assert batch.part(1, 2).taught["features"][0, :, 0, 0].tolist() == [11, 60]
    assert batch.part(1, 2).variant.tolist() == [1, 0]


def test_few_files_are_open_at_once_and_a_worker_opens_its_own(filled, monkeypatch):
    monkeypatch.setattr(folders, "OPEN_FILES", 2)
    open_before = len(os.listdir("/proc/self/fd"))
    filled.read([0, 4, 8, 1, 5], [0] * 5)
    assert len(os.listdir("/proc/self/fd")) - open_before <= 2
    other = pickle.loads(pickle.dumps(filled))
    assert other.read([7], [1])["features"][0, 0, 0, 0] == 71
    other.close()
    filled.close()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_what_is_not_stored_is_an_error_that_names_it(filled, tmp_path):
    with pytest.raises(UserError, match="look 2 at sample 0 is not among them"):
        filled.read([0], [2])
    with pytest.raises(UserError, match="look 0 at sample 10"):
        filled.read([10], [0])
    gaps = begun(tmp_path / "gaps")
    write_shard(gaps, 1, missing=(5,))
    with pytest.raises(UserError, match="holds nothing of sample 5"):
        gaps.read([4, 5], [0, 0])
    assert gaps.read([4], [0])["places"][0, 0, 0] == 40


def test_a_file_that_was_cut_short_is_named_before_a_run_and_in_it(filled):
    path = filled.file(1, "features")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 30)
    with pytest.raises(UserError, match=r"1 of 3 shards .*shard-00001.features.npy has \d+ bytes of \d+"):
        filled.check_whole()
    with pytest.raises(UserError, match="ends before the targets of sample 7"):
        filled.read([7], [1])
    assert list(filled.missing()) == [1]


def test_hashes_tell_what_lengths_do_not(filled):
    path = filled.file(2, "places")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert list(filled.missing()) == [] and list(filled.missing(contents=True)) == [2]


def test_a_stop_leaves_whole_shards_and_what_is_missing_is_made_by_anyone(tmp_path):
    folder = begun(tmp_path)
    write_shard(folder, 1)
    with pytest.raises(KeyboardInterrupt), ShardWriter(folder, 0) as writer:
        writer.put(0, 0, 0, answers(0, 0))
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("*.unfinished"))
    again = begun(tmp_path)
    assert list(again.missing()) == [0, 2]
    assert list(again.missing(0, 2)) == [0, 2] and list(again.missing(1, 2)) == []
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        again.check_whole()
    for shard in (0, 2):
        write_shard(again, shard)
    again.check_whole()


def test_each_part_of_many_makes_shards_of_its_own(tmp_path):
    folder = begun(tmp_path, per_shard=1)
    parts = [list(folder.missing(part, 3)) for part in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_other_targets_are_not_mixed_in_and_what_differs_is_named(filled):
    other = {**IDENTITY, "teacher": {"weights": "b" * 64}, "views": {"global": [{"size": 48}], "variants": 2}}
    with pytest.raises(UserError) as said:
        begun(filled.path, other)
    assert "teacher.weights is aaaaaaaaaaaa... there and bbbbbbbbbbbb... here" in str(said.value)
    assert "views.global.0.size is 32 there and 48 here" in str(said.value)
    assert "variants" not in str(said.value)
    with pytest.raises(UserError, match=r"form\.dtype is float16 there and float32 here"):
        begun(filled.path, form={**FORM, "dtype": "float32"})
    assert filled.differences(IDENTITY) == []


def test_another_version_is_all_that_is_said_of_it(filled):
    older = {**IDENTITY, "version": VERSION + 1, "teacher": {"weights": "c"}}
    assert filled.differences(older) == [f"version is {VERSION} there and {VERSION + 1} here"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no stored targets"):
        TargetFolder(tmp_path)
    with pytest.raises(UserError, match="holds other files"):
        begun(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": {}}))
    with pytest.raises(UserError, match="is not what ssd cache writes"):
        TargetFolder(tmp_path)


def test_a_shard_is_as_large_as_is_asked_or_as_its_bytes_allow():
    assert Layout.of(answers(0, 0), 10**9, 1, None).per_shard == folders.SHARD_BYTES // 36
    large = {"features": np.broadcast_to(np.float16(0), (1, 1, 1, 2**28))}
    assert Layout.of(large, 5, 1, None).per_shard == 1
