"""Groups stay whole, and a manifest says what they are."""

import os
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers

from ssd.data.counting import counted
from ssd.data.folder import FolderSource
from ssd.data.groups import Grouped, check_group_by, split
from ssd.data.inherited import groups_of
from ssd.data.manifest import read_manifest, write_manifest
from ssd.data.sources import Subset, held_out, open_source
from ssd.errors import UserError
from tests.data.files import encoded, scene, write
from tests.data.media_files import write_clip
from tests.data.test_sampling import Numbers

# ---------------------------------------------------------------- splits


@given(
    length=integers(2, 300),
    num_groups=integers(2, 40),
    classes=integers(0, 5),
    share=floats(0.02, 0.9),
    seed=integers(0, 20),
)
def test_no_group_is_on_both_sides_and_the_share_is_met(length, num_groups, classes, share, seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(-1, num_groups, length)
    labels = rng.integers(-1, classes, length) if classes else None
    if labels is not None and (labels < 0).all():
        labels = None
    source = Numbers(length, labels=labels, groups=groups)
    counted = groups if labels is None else groups[labels >= 0]
    if len(counted) == 1 or (len(set(counted.tolist())) == 1 and counted[0] >= 0):
        with pytest.raises(UserError, match="one group"):
            split(source, share)
        return
    kept, held = split(source, share)
    assert sorted([*kept, *held]) == list(range(length)) and len(held) and len(kept)
    assert not set(groups[kept][groups[kept] >= 0]) & set(groups[held][groups[held] >= 0])
    assert labels is None or ((labels[kept] >= 0).any() and (labels[held] >= 0).any()), "both can be evaluated"
    assert all(np.array_equal(a, b) for a, b in zip((kept, held), split(source, share), strict=True))
    if labels is None and 1 < len(held) < length - 1:
        sizes = np.bincount(groups[groups >= 0])
        assert abs(len(held) - share * length) <= max(1, sizes.max()) / 2 + 1


def test_a_grouped_split_keeps_the_share_of_every_class():
    """200 groups of 5, three classes of 70, 20 and 10 %: a fifth of each, to a group."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.choice(3, 200, p=[0.7, 0.2, 0.1]), 5)
    _, held = split(Numbers(1000, labels=labels, groups=np.repeat(np.arange(200), 5)), 0.2)
    np.testing.assert_allclose(np.bincount(labels[held]), 0.2 * np.bincount(labels), atol=5)


def test_without_groups_the_split_is_the_one_it_always_was():
    for length in (2, 20, 50):
        for ours, plain in zip(split(Numbers(length), 0.2), held_out(length, 0.2), strict=True):
            assert np.array_equal(ours, plain)


def test_samples_without_a_label_are_not_held_out():
    labels = np.where(np.arange(40) % 2, -1, 0)
    kept, held = split(Numbers(40, labels=labels), 0.25)
    assert len(held) == 5 and (labels[held] == 0).all() and len(kept) == 35


def test_labels_that_one_group_holds_cannot_be_divided():
    with pytest.raises(UserError, match="all 3 samples with a label are of one group"):
        split(Numbers(6, labels=[0, 1, 0, -1, -1, -1], groups=[0, 0, 0, 1, 1, 1]), 0.2)
    kept, _ = split(Numbers(12, labels=[0] * 10 + [-1] * 2, groups=[0] * 5 + [1] * 5 + [2] * 2), 0.9)
    assert 5 < len(kept) < 12 and 10 in kept, "one of the groups with labels, and the one without"


def test_groups_reach_through_what_is_made_from_a_source():
    source = Numbers(4, groups=[5, 5, 6, -1])
    assert groups_of(Subset(source, np.array([3, 1]))).tolist() == [-1, 5]
    assert groups_of(Numbers(3)) is None


# ---------------------------------------------------------------- what names a group


@pytest.fixture
def visits(tmp_path):
    for patient, visit in ((1, "a"), (1, "b"), (2, "a"), (3, "c")):
        for number in range(2):
            write(tmp_path / f"patient{patient}" / visit / f"{number}.png", encoded(scene(8, 8, patient)))
    return tmp_path


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        (1, [0, 0, 0, 0, 1, 1, 2, 2]),
        (2, [0, 0, 1, 1, 2, 2, 3, 3]),
        (r"patient(\d)", [0, 0, 0, 0, 1, 1, 2, 2]),
        (r"/([ab])/", [0, 0, 1, 1, 0, 0, -1, -1]),
        (r"\d\.png", [0, 1, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_folders_or_a_pattern_name_groups(visits, by, groups):
    assert Grouped(FolderSource(visits), by).groups.tolist() == groups


def test_a_rule_that_groups_nothing_is_said(visits):
    source = FolderSource(visits)
    with pytest.raises(UserError, match=r"fits none of the 8 samples; the first is 'patient1/a/0\.png'"):
        Grouped(source, "visit(.)")
    with pytest.raises(UserError, match="puts all of the 8 samples in one group"):
        Grouped(source, "patient")
    with pytest.raises(UserError, match="fits none"):
        Grouped(source, 3)
    with pytest.raises(UserError, match=r"counts folders, and numbers 0 lies in none"):
        Grouped(Numbers(3), 1)
    for by in (0, "", "(", True, 1.5):
        with pytest.raises(UserError, match="group_by is"):
            check_group_by(by)


# ---------------------------------------------------------------- manifests


def test_a_manifest_gives_labels_and_groups(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}, x.png", encoded(scene(8, 8, number)))
    table = 'path,group,label,height\n"0, x.png",p1,cat,8\n"1, x.png",,dog,\n"2, x.png",p1,,8\n'
    source = open_source(write(tmp_path / "m.csv", table.encode()))
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1, -1]
    assert source.groups.tolist() == [0, -1, 0] and source.open(2) == encoded(scene(8, 8, 2))
    read = read_manifest(tmp_path / "m.csv")
    assert read.counts.keys() == {"height"} and np.isnan(read.counts["height"]).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,labell\na.png,x\n", r"columns labell.*knows path, label, group, height, width, length, rate"),
        ("path,label,label\na.png,x,y\n", "label twice"),
        ("path,label\nsea, sun.png,x\n", "line 2 .* has 3 cells, and the header has 2.*double quotes"),
        ("path,rate\na.png,fast\n", "column rate .* 'fast' in row 1"),
        ("path,label\n", "is empty"),
        ("path,label\nb.png,x\n", "none of the first 1 files"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_where(tmp_path, table, message):
    write(tmp_path / "a.png", encoded(scene()))
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "m.csv", table.encode()))


def test_what_is_written_is_read_again(tmp_path):
    rows = [
        {"path": 'a "quoted", one.png', "label": "x y", "group": None, "height": 3, "width": 4},
        {"path": "b.png", "label": None, "group": "g", "height": 5, "width": 6},
    ]
    for name in ("m.csv", "m.tsv"):
        write_manifest(tmp_path / name, rows)
        table = read_manifest(tmp_path / name)
        assert table.names == [row["path"] for row in rows] and table.labels == ["x y", None]
        assert table.groups.tolist() == [-1, 0]
        assert {key: values.tolist() for key, values in table.counts.items()} == {"height": [3, 5], "width": [4, 6]}
    assert sorted(os.listdir(tmp_path)) == ["m.csv", "m.tsv"]


def test_sizes_and_lengths_are_counted_from_headers(tmp_path):
    from PIL import Image

    write(tmp_path / "a.png", encoded(scene(20, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "turned.jpg", encoded(scene(20, 30), "JPEG", exif=exif))
    np.save(tmp_path / "first.npy", np.zeros((13, 20, 30), np.uint16))
    np.save(tmp_path / "last.npy", np.zeros((20, 30, 13), np.uint16))
    with wave.open(str(tmp_path / "s.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(2 * 500))
    for name in ("a.png", "first.npy", "last.npy"):
        assert counted(str(tmp_path / name)) == {"height": 20, "width": 30}
    assert counted(str(tmp_path / "turned.jpg")) == {"height": 30, "width": 20}
    assert counted(str(tmp_path / "s.wav")) == {"length": 500, "rate": 8000}
    cut = (tmp_path / "s.wav").read_bytes()[:-200]
    assert counted(str(write(tmp_path / "cut.wav", cut))) == {"length": 400, "rate": 8000}, "what is there"
    pytest.importorskip("soundfile").write(str(tmp_path / "s.flac"), np.zeros(700), 16000)
    assert counted(str(tmp_path / "s.flac")) == {"length": 700, "rate": 16000}
    pytest.importorskip("av")
    assert counted(str(write_clip(tmp_path / "c.mp4", 24, fps=12))) == {"length": 24, "rate": 12}
    broken = ("x.png", "x.npy", "x.wav", "x.flac", "x.mp4")
    for name in (*broken, "x.doc"):
        with pytest.raises(OSError):
            counted(str(write(tmp_path / name, b"words")))
