"""What each kind of path yields, and what is said where it yields nothing."""

import os

import numpy as np
import pytest

from ssd.data.digits import DigitsSource
from ssd.data.folder import FolderSource, split_line
from ssd.data.sources import Renamed, Subset, held_out, limited, open_source
from ssd.errors import UserError
from tests.data.files import class_folders, encoded, scene, write

# ---------------------------------------------------------------- digits


def test_digits_are_split_once_and_for_all_and_scaled_to_eight_bits():
    from sklearn.datasets import load_digits

    train, val = DigitsSource("train"), DigitsSource("val")
    assert (len(train), len(val)) == (1297, 500)
    pictures, labels = load_digits(return_X_y=True)
    rows = {tuple(np.rint(p * 255 / 16).astype(int)): int(y) for p, y in zip(pictures, labels, strict=True)}
    seen = [(tuple(s.open(i).ravel().tolist()), s.label(i)) for s in (train, val) for i in range(len(s))]
    assert all(rows[picture] == label for picture, label in seen)
    assert sorted(picture for picture, _ in seen) == sorted(tuple(np.rint(p * 255 / 16).astype(int)) for p in pictures)
    assert DigitsSource("train").fingerprint() == train.fingerprint() != val.fingerprint()
    # all ten digits are about as frequent in the held-out part
    assert np.bincount(val.labels, minlength=10).min() > 30


# ---------------------------------------------------------------- folders


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path):
    source = open_source(class_folders(tmp_path, {"cat": 3, "ant": 2}))
    assert source.classes == ["ant", "cat"]
    assert [source.label(i) for i in range(5)] == source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.open(1) == (tmp_path / "ant" / "001.png").read_bytes()
    assert source.describe(4) == str(tmp_path / "cat" / "002.png")


@pytest.mark.parametrize("folders", [["."], ["2021/may", "2022/june/5", "."], ["only"]])
def test_flat_and_nested_folders_have_no_labels(tmp_path, folders):
    for number, folder in enumerate(folders):
        write(tmp_path / folder / f"{number}.png", encoded(scene(4, 4, number)))
    source = open_source(tmp_path)
    assert len(source) == len(folders)
    assert source.labels is None and source.classes is None and source.label(0) == -1


def test_labels_can_be_forced_and_refused(tmp_path):
    write(tmp_path / "a" / "deep" / "1.png", encoded(scene()))
    write(tmp_path / "b" / "2.png", encoded(scene()))
    assert FolderSource(tmp_path).labels is None
    assert FolderSource(tmp_path, labels=True).classes == ["a", "b"]
    write(tmp_path / "3.png", encoded(scene()))
    with pytest.raises(UserError, match=r"3\.png"):
        FolderSource(tmp_path, labels=True)
    class_folders(tmp_path / "sorted", {"x": 1, "y": 1})
    assert FolderSource(tmp_path / "sorted", labels=False).labels is None


def test_only_picture_files_count_and_links_are_followed_once(tmp_path):
    write(tmp_path / "pictures" / "a.PNG", encoded(scene()))
    write(tmp_path / "pictures" / "notes.txt", b"words")
    write(tmp_path / "pictures" / "._a.png", b"hidden")
    write(tmp_path / "pictures" / ".cache" / "b.png", encoded(scene()))
    (tmp_path / "pictures" / "folder.jpg").mkdir()
    write(tmp_path / "elsewhere" / "c.jpg", encoded(scene(), "JPEG"))
    (tmp_path / "pictures" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "loop").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "gone.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(tmp_path / "pictures")
    found = {os.path.relpath(source.describe(i), tmp_path / "pictures") for i in range(len(source))}
    assert found == {"a.PNG", "gone.png", os.path.join("link", "c.jpg")}
    with pytest.raises(OSError):
        source.open(next(i for i in range(3) if "gone" in source.describe(i)))


def test_a_fingerprint_moves_with_the_folder_and_changes_with_names_and_labels(tmp_path):
    first = open_source(class_folders(tmp_path / "one", {"a": 2, "b": 2})).fingerprint()
    assert open_source(class_folders(tmp_path / "two", {"a": 2, "b": 2})).fingerprint() == first
    assert open_source(class_folders(tmp_path / "more", {"a": 2, "b": 3})).fingerprint() != first
    assert open_source(class_folders(tmp_path / "other", {"a": 2, "c": 2})).fingerprint() != first
    assert open_source(tmp_path / "one", labels=False).fingerprint() != first


def test_names_of_any_bytes_are_kept(tmp_path):
    name = os.fsencode(str(tmp_path)) + b"/p\xff\xc3\xa9.png"
    with open(name, "wb") as file:
        file.write(encoded(scene()))
    assert open_source(tmp_path).open(0) == encoded(scene())


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a/b.jpg", ("a/b.jpg", None)),
        ("a/b.jpg\tcat", ("a/b.jpg", "cat")),
        ("a/b.jpg,3", ("a/b.jpg", "3")),
        ("a/b.jpg 3", ("a/b.jpg", "3")),
        ("my holiday.jpg", ("my holiday.jpg", None)),
        ("my holiday.jpg 4", ("my holiday.jpg", "4")),
        ("my holiday.jpg\tgood dog", ("my holiday.jpg", "good dog")),
        ("a/b.jpg,", ("a/b.jpg", None)),
        ("sea, sun.jpg", ("sea, sun.jpg", None)),
        ("sea, sun.jpg,beach", ("sea, sun.jpg", "beach")),
    ],
)
def test_a_line_is_a_path_and_perhaps_a_label(line, parts):
    assert split_line(line) == parts


def test_a_list_names_files_beside_it_or_anywhere(tmp_path):
    write(tmp_path / "here" / "a.png", encoded(scene(seed=1)))
    far = write(tmp_path / "far" / "b.png", encoded(scene(seed=2)))
    listing = write(tmp_path / "here" / "list.csv", f"path,label\na.png,dog\n\n{far},cat\n".encode())
    source = open_source(listing)
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 0]
    assert source.open(0) == encoded(scene(seed=1)) and source.open(1) == encoded(scene(seed=2))


def test_numbers_in_a_list_are_labels_as_they_are(tmp_path):
    write(tmp_path / "a.png", encoded(scene()))
    source = open_source(write(tmp_path / "list.txt", b"a.png 7\na.png 2\na.png\n"))
    assert source.classes is None and source.labels.tolist() == [7, 2, -1]


# ---------------------------------------------------------------- Parquet


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def make(name="data.parquet", count=10, *, column="image", labels="int", struct=True, first=0):
        pictures = [encoded(scene(8, 8, first + i)) for i in range(count)]
        cells = [{"bytes": p, "path": None} for p in pictures] if struct else pictures
        table = {column: pa.array(cells), "note": pa.array(["x"] * count)}
        if labels == "int":
            table["label"] = pa.array([i % 3 for i in range(count)])
        if labels == "name":
            table["label"] = pa.array(["cat" if i % 2 else None for i in range(count)])
        parquet.write_table(pa.table(table), tmp_path / name, row_group_size=4)
        return tmp_path / name

    return make


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("memory_gib", [2.0, 0.0])
def test_parquet_rows_are_the_bytes_that_were_stored(parquet, struct, memory_gib):
    """In memory as a whole or group by group, in any order."""
    from ssd.data.parquet import ParquetSource

    path = parquet(struct=struct)
    if memory_gib == 0:
        with pytest.warns(UserWarning, match="slow"):
            source = ParquetSource(path, memory_gib=memory_gib)
    else:
        source = ParquetSource(path, memory_gib=memory_gib)
    assert len(source) == 10
    for index in (9, 0, 4, 3, 8, 5, 9):
        assert source.open(index) == encoded(scene(8, 8, index))
    assert source.labels.tolist() == [0, 1, 2] * 3 + [0]


def test_parquet_shards_are_read_as_one(parquet, tmp_path):
    parquet("train-00000-of-00002.parquet", 5)
    parquet("train-00001-of-00002.parquet", 6, first=5)
    for path in (tmp_path, tmp_path / "train-*.parquet"):
        source = open_source(path)
        assert [source.open(i) for i in range(11)] == [encoded(scene(8, 8, i)) for i in range(11)]
        assert source.describe(7).endswith("train-00001-of-00002.parquet, row 2")
    parquet("test-00000-of-00001.parquet", 3)
    with pytest.raises(UserError, match=r"test, train.*train-\*\.parquet"):
        open_source(tmp_path)


def test_parquet_finds_the_only_column_of_pictures_and_names_of_classes(parquet, tmp_path):
    source = open_source(parquet("a.parquet", column="img", labels="name"))
    assert source.open(3) == encoded(scene(8, 8, 3))
    assert source.classes == ["cat"] and source.labels.tolist() == [-1, 0] * 5
    assert open_source(parquet("b.parquet", labels=None)).labels is None


def test_hub_metadata_names_the_classes(parquet):
    import json

    from pyarrow import parquet as pq

    path = parquet()
    about = json.dumps({"info": {"features": {"label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}})
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": about}), path)
    assert open_source(path).classes == ["x", "y", "z"]


def test_parquet_fingerprints_tell_files_apart(parquet):
    first, again, other = parquet("a.parquet"), parquet("b.parquet"), parquet("c.parquet", first=1)
    assert open_source(first).fingerprint() == open_source(again).fingerprint() != open_source(other).fingerprint()


def test_labels_of_minus_one_throughout_are_none(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4), np.uint8))
    for labels, expected in ([[-1, -1, -1], None], [[-1, 0, 2], [-1, 0, 2]]):
        np.save(tmp_path / "x-labels.npy", np.array(labels))
        source = open_source(tmp_path / "x.npy")
        assert (source.labels if expected is None else source.labels.tolist()) == expected


def test_a_parquet_file_without_a_single_label_has_none(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = [encoded(scene(8, 8, number)) for number in range(3)]
    parquet.write_table(pa.table({"image": pictures, "label": [-1, -1, -1]}), tmp_path / "test.parquet")
    assert open_source(tmp_path / "test.parquet").labels is None


def test_hidden_files_are_no_shards(tmp_path):
    class_folders(tmp_path, {"a": 1, "b": 1})
    write(tmp_path / "._a.tar", b"what some systems leave beside a file")
    assert len(open_source(tmp_path)) == 2


# ---------------------------------------------------------------- parts of sources


def test_the_held_out_part_is_the_complement_and_never_moves():
    kept, held = held_out(50, 0.2)
    assert sorted([*kept, *held]) == list(range(50)) and len(held) == 10
    assert np.array_equal(held, held_out(50, 0.2)[1])
    # written down: a changed split would make numbers of different versions incomparable
    assert held_out(20, 0.2)[1].tolist() == SPLIT_OF_20
    assert len(held_out(2, 0.01)[1]) == 1 and len(held_out(2, 0.99)[0]) == 1


SPLIT_OF_20 = [2, 3, 6, 13]


def test_smaller_limits_are_parts_of_larger_ones():
    digits = DigitsSource("train")
    small, large = limited(digits, 30), limited(digits, 100)
    assert set(small.rows) < set(large.rows) and len(small) == 30
    assert limited(digits, 5000) is digits
    assert small.fingerprint() != large.fingerprint() != digits.fingerprint()
    assert small.label(4) == small.labels[4] == digits.label(int(small.rows[4]))
    assert np.array_equal(small.open(4), digits.open(int(small.rows[4])))


def test_held_out_labels_follow_the_training_classes_by_name(tmp_path):
    training = open_source(class_folders(tmp_path / "train", {"a": 1, "b": 1, "c": 1}))
    separate = open_source(class_folders(tmp_path / "val", {"b": 2, "c": 1}))
    assert separate.labels.tolist() == [0, 0, 1]
    assert Renamed(separate, training.classes).labels.tolist() == [1, 1, 2]
    stranger = open_source(class_folders(tmp_path / "other", {"b": 1, "z": 1}))
    with pytest.raises(UserError, match="lacks: z"):
        Renamed(stranger, training.classes)
    assert len(Subset(training, np.array([2, 0]))) == 2


# ---------------------------------------------------------------- mistakes


def mistakes(tmp_path):
    write(tmp_path / "words" / "readme.md", b"no pictures here")
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "one.jpg", encoded(scene(), "JPEG"))
    write(tmp_path / "empty.txt", b"\n\n")
    write(tmp_path / "gone.txt", b"a.png\nb.png\n")
    write(tmp_path / "binary.txt", b"\xff\xfe\x00\x80")
    write(tmp_path / "film.mov", b"film")
    write(tmp_path / "torn.parquet", b"PAR1 and no more")
    return {
        "not there": "there is no",
        "words": "holds no pictures",
        "nothing": "holds no pictures",
        "one.jpg": "single picture",
        "empty.txt": "is empty",
        "gone.txt": "none of the first 2",
        "binary.txt": "not a text file",
        "film.mov": "no known kind",
        "torn.parquet": "cannot be read as Parquet",
        "shard-*.parquet": "no file fits",
        "o*.jpg": "for Parquet",
    }


def test_each_mistake_has_its_own_message(tmp_path):
    for name, message in mistakes(tmp_path).items():
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import sys

    write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'ssd\[hub\]'"):
        open_source(tmp_path / "a.parquet")


def test_a_parquet_without_pictures_lists_its_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"name": ["x"], "age": [3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="name, age"):
        open_source(tmp_path / "a.parquet")
