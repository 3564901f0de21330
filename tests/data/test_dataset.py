"""From places to batches: views drawn for their place, broken pictures counted and replaced, memory shared."""

import logging
import multiprocessing
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssd.batch import Batch
from ssd.data.broken import BrokenSamples
from ssd.data.cache import PictureCache, Pictures
from ssd.data.dataset import Collate, CollateEvaluation, EvaluationPictures, TrainingPictures
from ssd.data.folder import FolderSource
from ssd.data.memory import ByteTable, SharedArray
from ssd.data.parcel import Parcel
from ssd.data.pictures import decode
from ssd.data.sampler import permutation
from ssd.data.statistics import survey
from ssd.errors import UserError
from ssd.views import photometry
from ssd.views.geometry import crop_views
from ssd.views.parameters import draw
from ssd.views.recipes import DINOViews, PlainViews
from tests.data.files import encoded, scene, write

CONTEXT = multiprocessing.get_context("fork")
VIEWS = DINOViews(global_size=16, local_count=3, local_size=8)


def training(source, *, max_share=0.5, seed=1, cache=None, channels=3):
    broken = BrokenSamples(source, max_share, CONTEXT, "picture")
    return TrainingPictures(Pictures(source, channels, cache), VIEWS, broken, seed=seed)


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number:02}.png", encoded(scene(20 + number, 30, number)))
    return tmp_path


# ---------------------------------------------------------------- samples and batches


def test_a_sample_is_the_picture_in_the_views_drawn_for_its_place(folder):
    source = FolderSource(folder)
    sample = training(source, seed=5)[(3, 7)]
    picture = decode(source.open(7))
    boxes, colours = draw(VIEWS, *picture.shape[:2], 5, 3, 7)
    assert sample.index == [7] and sample.label == [-1]
    for kind, views in crop_views(picture, boxes, VIEWS).items():
        assert torch.equal(sample.views[kind][:, 0], views)
        assert np.array_equal(sample.boxes[kind][0], boxes[kind])
        assert np.array_equal(sample.photometry[kind][0], colours[kind])


def test_a_batch_holds_each_sample_in_its_column_and_photometry_may_be_applied_in_it(folder):
    dataset, places = training(FolderSource(folder)), [(0, 4), (0, 1), (0, 9)]
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    raw = Collate(total=6, labelled=False)(dataset.__getitems__(places))
    done = Collate(total=6, labelled=True, colours="float", normalisation=(mean, std))(dataset.__getitems__(places))
    assert raw.total == done.total == 6
    assert raw.index.tolist() == [4, 1, 9] and raw.label is None and done.label.tolist() == [-1] * 3
    assert done.photometry == {}
    levels = Collate(total=6, labelled=True, colours="levels")(dataset.__getitems__(places))
    assert levels.photometry == {}
    for kind, view in levels.views.items():
        assert view.dtype == torch.uint8
        assert_close(photometry.normalise(view, mean, std), done.views[kind], atol=0.51 / 255 / min(std), rtol=0)
    for column, sample in enumerate(dataset[place] for place in places):
        for kind in ("global", "local"):
            assert torch.equal(raw.views[kind][:, column], sample.views[kind][:, 0])
            assert np.array_equal(raw.photometry[kind][:, column].numpy(), sample.photometry[kind][0])
            assert np.array_equal(done.boxes[kind][:, column].numpy(), sample.boxes[kind][0])
            alone = photometry.apply(raw.views[kind][:, [column]], raw.photometry[kind][:, [column]], mean, std)
            # the batched and the single matrix product of the blur round apart
            assert_close(done.views[kind][:, [column]], alone, atol=1e-4, rtol=0)


def test_pictures_are_worked_off_in_chunks_that_make_no_difference(folder, monkeypatch):
    places = [(2, index) for index in (4, 1, 9, 3, 3)]
    whole = training(FolderSource(folder)).__getitems__(places)
    monkeypatch.setattr("ssd.data.dataset.CHUNK_BYTES", 4000)  # two pictures
    parts = training(FolderSource(folder)).__getitems__(places)
    for kind in whole.views:
        assert torch.equal(whole.views[kind], parts.views[kind])
        assert np.array_equal(whole.boxes[kind], parts.boxes[kind])
        assert np.array_equal(whole.photometry[kind], parts.photometry[kind])


def test_a_parcel_brings_every_tensor_and_nothing_else():
    batch = Batch(
        views={"global": torch.randint(0, 255, (2, 3, 1, 5, 5), dtype=torch.uint8), "empty": torch.zeros(2, 0)},
        index=torch.tensor([5, 1, 2]),
        total=12,
        boxes={"global": torch.rand(2, 3, 5)},
    )
    back = Parcel.pack(batch).unpack()
    assert back.total == 12 and back.label is None and back.photometry == {}
    for name in ("views", "boxes"):
        for kind, tensor in getattr(batch, name).items():
            assert torch.equal(getattr(back, name)[kind], tensor) and getattr(back, name)[kind].dtype == tensor.dtype
    assert torch.equal(back.index, batch.index)


def test_evaluation_shows_every_whole_picture_once_and_leaves_broken_ones_out(folder):
    write(folder / "03.png", b"nothing")
    source = FolderSource(folder)
    views = PlainViews(size=8)
    broken = BrokenSamples(source, 0.2, CONTEXT)
    dataset = EvaluationPictures(Pictures(source, 3), views, broken)
    collate = CollateEvaluation([0.5] * 3, [0.25] * 3, 8)
    batch = collate([dataset[index] for index in range(12)])
    assert batch["index"].tolist() == [i for i in range(12) if i != 3] and len(broken) == 1
    assert batch["sample"].shape == (11, 3, 8, 8) and batch["sample"].dtype == torch.float32
    assert collate([dataset[3]])["sample"].shape == (0, 3, 8, 8)


# ---------------------------------------------------------------- broken pictures


def break_some(folder):
    """A cut JPEG, words under a picture's name, and a link to nothing."""
    write(folder / "02.png", encoded(scene(), "JPEG")[:300])
    write(folder / "05.png", b"these are words")
    (folder / "07.png").unlink()
    (folder / "07.png").symlink_to(folder / "gone.png")
    return {2, 5, 7}


def test_the_next_readable_sample_of_the_order_stands_in_for_a_broken_one(folder, caplog):
    broken = break_some(folder)
    dataset = training(FolderSource(folder), seed=1)
    with caplog.at_level(logging.WARNING):
        for epoch in (0, 1):
            order = permutation(12, 1, epoch).tolist()
            for index in range(12):
                following = order[order.index(index) :] + order[: order.index(index)]
                expected = next(i for i in following if i not in broken)
                assert dataset[(epoch, index)].index == [expected]
    assert len(dataset.broken) == 3
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 3, "once each"
    for index in broken:
        assert sum(str(folder / f"{index:02}.png") in message for message in logged) == 1


def test_a_stand_in_is_not_a_copy_of_the_sample_in_its_own_place(folder):
    break_some(folder)
    dataset = training(FolderSource(folder))
    stand_in = dataset[(0, 2)]
    own = dataset[(0, *stand_in.index)]
    assert stand_in.index == own.index
    assert not np.array_equal(stand_in.boxes["local"], own.boxes["local"])


def test_too_many_broken_pictures_stop_the_run_with_their_names(folder):
    break_some(folder)
    dataset = training(FolderSource(folder), max_share=0.2)
    dataset[(0, 2)]
    dataset[(0, 2)]
    with pytest.raises(UserError, match=r"3 of 12 pictures cannot be read.*0\.2.*02\.png.*05\.png.*07\.png.*raise"):
        for index in range(12):
            dataset[(0, index)]


def test_a_folder_of_words_is_told_as_such(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.jpg", b"words")
    with pytest.raises(UserError, match="none of the 3 pictures can be read"):
        training(FolderSource(tmp_path), max_share=1.0)[(0, 0)]


def test_the_share_is_between_0_and_1(folder):
    with pytest.raises(UserError, match="max_broken_share is 5"):
        BrokenSamples(FolderSource(folder), 5, CONTEXT)


# ---------------------------------------------------------------- statistics


def test_statistics_are_those_of_all_pixels_with_every_picture_counting_alike(folder):
    source = FolderSource(folder)
    pictures = Pictures(source, 3)
    found = survey(pictures, BrokenSamples(source, 0.5, CONTEXT))
    values = [pictures[i].reshape(-1, 3) / 255 for i in range(12)]
    mean = np.mean([v.mean(0) for v in values], 0)
    variance = np.mean([(v**2).mean(0) for v in values], 0) - mean**2
    # squares of 8-bit values are summed in float64 from exact float32
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=1e-6)
    assert found.bytes_per_picture == np.mean([pictures[i].nbytes for i in range(12)])
    assert found == survey(pictures, BrokenSamples(source, 0.5, CONTEXT)), "nothing random in it"


def test_broken_pictures_do_not_enter_statistics_and_blank_ones_have_a_spread(tmp_path):
    for number in range(9):
        write(tmp_path / f"{number}.png", encoded(np.full((4, 4), 100, np.uint8)))
    write(tmp_path / "x.png", b"words")
    source = FolderSource(tmp_path)
    broken = BrokenSamples(source, 0.2, CONTEXT)
    found = survey(Pictures(source, 1), broken)
    assert len(broken) == 1
    assert found.mean == [pytest.approx(100 / 255)] and found.std == [pytest.approx(1 / 255)]


# ---------------------------------------------------------------- memory


def test_a_cached_picture_is_decoded_once_and_one_that_does_not_fit_each_time(folder):
    source = FolderSource(folder)
    opened = []
    original = source.open
    source.open = lambda index: opened.append(index) or original(index)
    plain = [decode(original(i)) for i in range(12)]
    capacity = sum(p.nbytes for p in plain[:6])
    pictures = Pictures(source, 3, PictureCache(12, capacity, CONTEXT))
    for _ in range(3):
        for index in range(12):
            assert np.array_equal(pictures[index], plain[index])
    assert [opened.count(i) for i in range(12)] == [1] * 6 + [3] * 6


def fill(array: SharedArray, cache: PictureCache, table: ByteTable) -> None:
    array.array[1] = 7
    cache.put(2, np.full((2, 3, 1), int(table[1]), np.uint8))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_one_process_writes_the_others_see(method):
    context = multiprocessing.get_context(method)
    array, cache = SharedArray((3,), np.int64), PictureCache(4, 100, context)
    process = context.Process(target=fill, args=(array, cache, ByteTable.of([b"", b"42"])))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert array.array.tolist() == [0, 7, 0]
    assert cache.get(2).tolist() == np.full((2, 3, 1), 42).tolist() and cache.get(1) is None


def test_a_million_paths_take_their_bytes_and_travel_as_a_handle():
    names = [b"class_%03d/picture_%07d.jpg" % (i % 1000, i) for i in range(1_000_000)]
    table = ByteTable.of(names)
    assert table[0] == names[0] and table[999_999] == names[-1] and table[123_456] == names[123_456]
    assert table.content().nbytes + table.ends().nbytes == sum(map(len, names)) + 8_000_000

    class Starting:
        """Stands for a process that is being started, to which handles are passed on."""

        def duplicate_for_child(self, handle):
            return handle

        def DupFd(self, handle):
            return handle

    set_spawning_popen(Starting())
    try:
        assert len(ForkingPickler.dumps(table)) < 2000
    finally:
        set_spawning_popen(None)
