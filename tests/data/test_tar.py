"""Tar shards: every kind of header, labels, what is broken, and that reading needs no order."""

import io
import json
import multiprocessing
import os
import tarfile

import numpy as np
import pytest

from ssd.data.shards import OPEN_FILES
from ssd.data.sources import open_source
from ssd.data.tar import TarSource, expand_braces
from ssd.data.tar_headers import pax_value
from ssd.errors import UserError
from tests.data.files import encoded

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number: int) -> bytes:
    return encoded(np.full((5, 4, 3), number, np.uint8))


def write(path, files, form=tarfile.GNU_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=form) as shard:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def samples(count, first=0):
    for number in range(first, first + count):
        yield f"{number:06d}.png", picture(number)
        yield f"{number:06d}.cls", str(number % 3).encode()


@pytest.mark.parametrize("form", FORMATS)
def test_every_kind_of_header_is_read(tmp_path, form):
    long_name = f"{'folder-with-a-long-name/' * 3}{'x' * 60}.png"
    files = [("a.png", picture(1)), (long_name, picture(2)), ("dir.with.dots/b.seg.png", picture(3))]
    source = TarSource(write(tmp_path / "one.tar", files, FORMATS[form]))
    assert len(source) == 3 and source.labels is None
    assert [source.open(i) for i in range(3)] == [picture(n) for n in (1, 2, 3)]
    assert source.describe(1) == f"{tmp_path / 'one.tar'}: {long_name}"


@pytest.mark.parametrize("form", FORMATS)
def test_links_to_earlier_files_are_those_files(tmp_path, form):
    long_name = f"a/{'x' * 90}.png" if form == "ustar" else f"a/{'x' * 150}.png"
    with tarfile.open(tmp_path / "one.tar", "w", format=FORMATS[form]) as shard:
        for name, kind, target in (
            (long_name, tarfile.REGTYPE, ""),
            ("b/hard.png", tarfile.LNKTYPE, long_name),
            ("b/soft.png", tarfile.SYMTYPE, f"../{long_name}"),
            ("b/again.png", tarfile.SYMTYPE, "hard.png"),
            ("b/dangling.png", tarfile.SYMTYPE, "elsewhere.png"),
            ("last.png", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            content = picture(7 if name == "last.png" else 1) if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    source = TarSource(tmp_path / "one.tar")
    names = [source.describe(i).rpartition(": ")[2] for i in range(len(source))]
    assert names == [long_name, "b/hard.png", "b/soft.png", "b/again.png", "last.png"]
    assert [source.open(i) for i in range(5)] == [picture(1)] * 4 + [picture(7)]


def test_a_folder_of_pictures_with_a_shard_beside_them_is_asked_about(tmp_path):
    write(tmp_path / "packed.tar", samples(2))
    (tmp_path / "features.npy").write_bytes(b"not read")
    assert len(open_source(tmp_path)) == 2
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").write_bytes(picture(1))
    with pytest.raises(
        UserError, match=r"holds packed.tar and pictures as well, for instance cats/1.png. Give .*\*.tar"
    ):
        open_source(tmp_path)
    assert len(open_source(f"{tmp_path}/*.tar")) == 2


def test_shards_are_one_source_with_their_labels(tmp_path):
    write(tmp_path / "train-000.tar", samples(4))
    write(tmp_path / "train-001.tar", samples(3, first=4))
    for path in (f"{tmp_path}/train-{{000..001}}.tar", f"{tmp_path}/train-*.tar", tmp_path):
        source = open_source(path)
        assert len(source) == 7 and source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and source.classes is None
        assert [source.open(i) for i in (6, 0, 3)] == [picture(n) for n in (6, 0, 3)]
        assert source.label(5) == 2
    assert open_source(tmp_path, labels=False).labels is None


def test_labels_may_be_names_or_stand_in_json(tmp_path):
    files = [
        ("a.jpg", picture(0)), ("a.json", json.dumps({"label": "cat", "caption": "a, cat"}).encode()),
        ("b.json", b'{"cls": "dog"}'), ("b.jpg", picture(1)), ("b.txt", b"a caption is no label"),
        ("c.jpg", picture(2)), ("c.json", b"not json"),
        ("d.json", b'{"label": "cat"}'), ("d.cls", b"dog\n"), ("d.jpg", picture(3)),
    ]  # fmt: skip
    source = TarSource(write(tmp_path / "s.tar", files))
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1, -1, 1]


def test_what_is_passed_over_is_said(tmp_path, recwarn):
    files = [("a.txt", b"words"), ("b.png", picture(1)), (".hidden.png", picture(2)), ("c.cls", b"1")]
    path = write(tmp_path / "s.tar", files)
    for _ in range(2):  # from the shard, and from what was kept
        with pytest.warns(UserWarning, match="2 samples without a picture"):
            assert len(TarSource(path)) == 1
    frames = write(tmp_path / "t.tar", [(f"film.{number}.png", picture(number)) for number in range(5)])
    with pytest.warns(UserWarning, match=r"passed over: 4 pictures, for instance film\.1\.png, .* first dot"):
        assert len(TarSource(frames)) == 1
    recwarn.clear()
    TarSource(write(tmp_path / "u.tar", samples(3)))
    assert not recwarn


def test_the_index_is_kept_beside_the_shard_and_made_anew_for_another(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", samples(3))
    first = TarSource(path)
    assert (tmp_path / "s.tar.index.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("ssd.data.tar.members", lambda *_: pytest.fail("read again"))
        again = TarSource(path)
    assert again.fingerprint() == first.fingerprint() and again.open(2) == picture(2)
    write(path, samples(5))
    os.utime(path, ns=(1, 1))
    assert len(TarSource(path)) == 5


def test_a_folder_that_may_not_be_written_to_is_read_all_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", samples(3))
    monkeypatch.setattr("ssd.data.tar.os.replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    assert len(TarSource(path)) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar"]


def read(source, index, answers):
    answers.put(source.open(index))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same(tmp_path, method):
    source = TarSource(write(tmp_path / "s.tar", samples(4)))
    source.open(0)
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=read, args=(source, 2, answers))
    process.start()
    assert answers.get(timeout=60) == picture(2)
    process.join()


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda data: b"", "no pictures"),
        (lambda data: b"words " * 200, "is not a tar file"),
        (lambda data: data[:-10240], "is cut short|holds no pictures"),
        (lambda data: data[:1500], "is cut short in the header"),
        (lambda data: data[:1024] + b"?" * 512 + data[1536:], "is damaged at byte 1024"),
    ],
)
def test_what_is_no_whole_tar_is_said(tmp_path, damage, said):
    path = write(tmp_path / "s.tar", [("a.png", picture(1)), ("b.png", b"x" * 5000)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=said):
        TarSource(path)


def test_a_compressed_one_says_so(tmp_path):
    with pytest.raises(UserError, match="compressed"):
        TarSource(write(tmp_path / "s.tar", samples(2), mode="w:gz"))


def test_a_shard_that_shrank_is_a_broken_picture_and_not_half_of_one(tmp_path):
    path = write(tmp_path / "s.tar", samples(2))
    source = TarSource(path)
    os.truncate(path, 540)
    with pytest.raises(OSError, match="cut short"):
        source.open(0)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="asks the system which files are open")
def test_there_may_be_more_shards_than_a_process_may_have_open(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = max(map(int, os.listdir("/dev/fd"))) + OPEN_FILES + 20
    for number in range(count):
        write(tmp_path / f"s-{number:03}.tar", [("a.png", picture(number % 256))])
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        source = TarSource([tmp_path / f"s-{number:03}.tar" for number in range(count)])
        for _ in range(2):
            assert [source.open(i) for i in range(count)] == [picture(n % 256) for n in range(count)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_was_written_again_is_not_read_through_the_old_file(tmp_path):
    source = TarSource(write(tmp_path / "s.tar", samples(2)))
    assert source.open(0) == picture(0)
    write(tmp_path / "new.tar", samples(2, first=7))
    os.replace(tmp_path / "new.tar", tmp_path / "s.tar")
    assert TarSource(tmp_path / "s.tar").open(0) == picture(7)


def test_a_pax_header_of_no_length_is_read_to_its_end():
    assert pax_value(b"0 path=x\n", b"path") is None and pax_value(b"9 path=x\n", b"path") == "x"


def test_missing_shards_are_counted(tmp_path):
    write(tmp_path / "s-0.tar", samples(1))
    with pytest.raises(UserError, match=r"2 of 3 are missing"):
        open_source(f"{tmp_path}/s-{{0..2}}.tar")


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}-{1..2}") == ["x-1", "x-2", "y-1", "y-2"]
    assert expand_braces("plain") == ["plain"]


def test_other_files_of_a_pattern_are_refused(tmp_path):
    write(tmp_path / "a.tar", samples(1))
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"all of one kind"):
        open_source(f"{tmp_path}/a.*")
