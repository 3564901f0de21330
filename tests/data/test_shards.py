"""Tar shards that lie elsewhere: read in ranges where there are some, fetched once where there are none."""

import http.server
import os
import shlex
import threading
from collections import Counter
from itertools import chain

import pytest

import ssd.data.shards
from datamodules.images import Images
from ssd.data.shards import LocalShard, ReadAhead, is_remote, open_shard
from ssd.data.sources import open_source
from ssd.data.tar import TarSource
from ssd.errors import UserError
from tests.data.test_tar import picture, samples, write
from tests.datamodules.test_pictures import batches, equal


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, in ranges where the server is told to give them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        path = self.translate_path(self.path)
        if server.failures:
            server.failures -= 1
            return self.send_error(503)
        if not os.path.isfile(path):
            return self.send_error(404)
        with open(path, "rb") as file:
            data = file.read()
        status, total = 200, len(data)
        if server.ranges and "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            status, data = 206, data[int(first) : int(last) + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        self.send_header("ETag", f'"{os.stat(path).st_mtime_ns}"')
        self.send_header("Content-Length", str(total if server.cut else len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if server.cut else data)
        self.close_connection = server.cut

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(ssd.data.shards, "FIRST_WAIT_S", 0.01)
    (tmp_path / "web").mkdir()
    handler = lambda *given: Handler(*given, directory=str(tmp_path / "web"))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.daemon_threads = True
    served.folder, served.url = tmp_path / "web", f"http://127.0.0.1:{served.server_address[1]}"
    served.ranges, served.failures, served.cut, served.asked = True, 0, False, []
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def shards(folder, count=3, each=8):
    for number in range(count):
        write(folder / f"s-{number:03d}.tar", samples(each, first=number * each))


# ---------------------------------------------------------------- in ranges


def test_a_url_is_read_like_a_file_and_indexed_once(server):
    shards(server.folder)
    local = TarSource(f"{server.folder}/s-{{000..002}}.tar")
    source = open_source(f"{server.url}/s-{{000..002}}.tar")
    assert source.fingerprint() == local.fingerprint() and source.labels.tolist() == local.labels.tolist()
    server.asked.clear()
    assert [source.open(i) for i in (23, 0, 9)] == [picture(i) for i in (23, 0, 9)]
    sizes = [
        int(last) - int(first) + 1 for first, last in (r.removeprefix("bytes=").split("-") for _, r in server.asked)
    ]
    assert sizes == [len(picture(i)) for i in (23, 0, 9)], "no more than is asked for"
    assert source.describe(9) == f"{server.url}/s-001.tar: 000009.png"

    server.asked.clear()
    again = open_source(f"{server.url}/s-{{000..002}}.tar")
    assert again.fingerprint() == source.fingerprint()
    assert [range for _, range in server.asked] == ["bytes=0-0"] * 3, "only whether they are the same"
    shards(server.folder, count=1, each=5)
    assert len(open_source(f"{server.url}/s-000.tar")) == 5, "another content, another index"


def test_a_server_that_fails_for_a_while_is_asked_again(server):
    shards(server.folder, count=1)
    source = open_source(f"{server.url}/s-000.tar")
    server.failures = 3
    assert source.open(2) == picture(2)
    server.failures = 2
    assert len(open_source(f"{server.url}/s-000.tar")) == 8
    server.failures = 99
    with pytest.raises(
        UserError, match=r"s-000\.tar' cannot be read, after 5 attempts.*go on from the last checkpoint"
    ):
        source.open(2)


def test_a_shard_that_is_gone_stops_the_run_and_is_no_broken_picture(server):
    shards(server.folder, count=1)
    source = open_source(f"{server.url}/s-000.tar")
    (server.folder / "s-000.tar").unlink()
    with pytest.raises(UserError, match="is gone"):
        source.open(2)


def test_two_ranks_of_two_workers_read_each_sample_once_and_go_on_exactly(server):
    shards(server.folder, count=4)
    url = f"{server.url}/s-{{000..003}}.tar"
    settings = {"batch_size": 4, "val_share": 0.0, "cache": False, "labels": False}
    whole = batches(Images(url, num_workers=0, **{**settings, "batch_size": 8}))
    ranks = [batches(Images(url, num_workers=2, **settings), rank=rank, world=2) for rank in (0, 1)]
    seen = Counter(chain.from_iterable(batch.index.tolist() for batch in chain(*ranks)))
    assert seen == dict.fromkeys(range(32), 1)
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert all(equal(part, batch.part(number, 2)) for number, part in enumerate(parts))
    later = batches(Images(url, num_workers=2, **settings), rank=1, world=2, step=2)
    assert len(later) == 2 and all(equal(a, b) for a, b in zip(later, ranks[1][2:], strict=True))


def test_a_connection_that_says_nothing_is_given_up_and_another_asked(server, monkeypatch):
    shards(server.folder, count=1)
    source = open_source(f"{server.url}/s-000.tar")
    filesystem, _ = ssd.data.shards.filesystem_of(f"{server.url}/s-000.tar")
    assert filesystem.async_impl
    read, silent = filesystem.cat_file, []

    def first_silent(*arguments, timeout, **settings):
        if not silent:
            silent.append(timeout)
            raise TimeoutError
        return read(*arguments, timeout=timeout, **settings)

    monkeypatch.setattr(filesystem, "cat_file", first_silent)
    monkeypatch.setattr(ssd.data.shards, "FIRST_WAIT_S", 0.01)
    assert source.open(5) == picture(5)
    assert silent and 60 <= silent[0] < 200


def test_other_places_are_read_by_fsspec(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SSD_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "s.tar", samples(4))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/s.tar", (tmp_path / "s.tar").read_bytes())
    source = open_source("memory://bucket/s.tar")
    assert [source.open(i) for i in (3, 1)] == [picture(3), picture(1)] and source.labels.tolist() == [0, 1, 2, 0]
    with pytest.raises(UserError, match=r"no shard 'memory://bucket/t\.tar'"):
        open_source("memory://bucket/t.tar")
    with pytest.raises(UserError, match=r"'nosuch://x/y\.tar'"):
        open_source("nosuch://x/y.tar")


# ---------------------------------------------------------------- fetched whole


def test_without_ranges_a_shard_is_fetched_once_and_that_is_said(server):
    shards(server.folder, count=1)
    server.ranges = False
    with pytest.warns(
        UserWarning, match=r"s-000\.tar: its server gives no ranges, so it is fetched whole into .*cache"
    ):
        source = open_source(f"{server.url}/s-000.tar")
    fetched = len(server.asked)
    assert source.open(5) == picture(5) and source.describe(5) == f"{server.url}/s-000.tar: 000005.png"
    assert len(server.asked) == fetched
    open_source(f"{server.url}/s-000.tar")
    assert len(server.asked) == fetched + 1, "whether it is the same"


def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    shards(server.folder, count=1)
    server.ranges, server.cut = False, True
    with (
        pytest.warns(UserWarning, match="no ranges"),
        pytest.raises(UserError, match=r"broke off after \d+ of \d+ bytes"),
    ):
        open_source(f"{server.url}/s-000.tar")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_download_that_is_cut_off_by_the_network_does_not_blame_the_disk(server, monkeypatch):
    shards(server.folder, count=1)
    server.ranges = False
    monkeypatch.setattr("http.client.HTTPResponse.read", lambda *_: (_ for _ in ()).throw(TimeoutError("timed out")))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="broke off: TimeoutError: timed out"):
        open_source(f"{server.url}/s-000.tar")


def test_a_cache_folder_that_cannot_be_made_names_the_variable(server, monkeypatch, tmp_path):
    shards(server.folder, count=1)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SSD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cache folder .* cannot be made .*SSD_CACHE"):
        open_source(f"{server.url}/s-000.tar")


def test_a_full_disk_is_said_before_it_is_filled(server, monkeypatch):
    shards(server.folder, count=1)
    server.ranges = False
    monkeypatch.setattr(ssd.data.shards.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"do not fit.*SSD_CACHE"):
        open_source(f"{server.url}/s-000.tar")


def test_a_pipe_runs_its_command_once(server, tmp_path):
    shards(server.folder, count=2)
    counter = tmp_path / "runs"
    folder = shlex.quote(str(server.folder))
    pipe = f"pipe:echo x >> {shlex.quote(str(counter))}; cat {folder}/s-{{000..001}}.tar"
    source = open_source(pipe)
    assert len(source) == 16 and source.open(12) == picture(12)
    assert open_source(pipe).fingerprint() == source.fingerprint()
    assert counter.read_text() == "x\n" * 2, "one for each shard"
    with pytest.raises(UserError, match="status 3: no luck"):
        open_source("pipe:echo no luck >&2; exit 3")
    with pytest.raises(UserError, match="status 0 and printed nothing"):
        open_source("pipe:true")


# ---------------------------------------------------------------- what is wrong


def test_what_is_not_there_or_no_tar_is_said(server):
    (server.folder / "words.tar").write_bytes(b"words " * 200)
    (server.folder / "cut.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no shard 'http.*none\.tar' \(404"):
        open_source(f"{server.url}/none.tar")
    with pytest.raises(UserError, match="is not a tar file"):
        open_source(f"{server.url}/words.tar")
    server.failures = 99
    with pytest.raises(UserError, match="is refused: 503"):
        open_source(f"{server.url}/words.tar")


def test_a_place_that_does_not_answer_is_said(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be reached.*refused"):
        open_source(f"{server.url}/s.tar")


def test_reading_ahead_gives_the_same_bytes(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4)
    plain = LocalShard(tmp_path / "file")
    ahead = ReadAhead(open_shard(str(tmp_path / "file")), block=100)
    for offset, size in (
        (0, 10),
        (5, 60),
        (90, 20),
        (91, 5),
        (80, 10),
        (300, 400),
        (1000, 100),
        (1020, 50),
        (1024, 10),
    ):
        assert ahead.read(offset, size) == plain.read(offset, size)


@pytest.mark.parametrize("path", ["https://a.b/c.tar", "s3://b/c-{0..3}.tar", "pipe:cat x", "gs://b/c"])
def test_what_lies_elsewhere_is_told_by_how_it_starts(path, monkeypatch, tmp_path):
    from ssd.cli import from_anywhere
    from ssd.verbs.arguments import data_arguments

    monkeypatch.chdir(tmp_path)
    assert is_remote(path) and from_anywhere(path) == path
    assert data_arguments(path) == ["--data", "Images", "--data.path", path]
    assert not any(map(is_remote, ("a/b.tar", "torchvision:CIFAR10:x", "hf:a/b", "C:/x", "{a,b}.tar")))
