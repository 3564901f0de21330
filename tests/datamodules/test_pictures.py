"""Loaders of whole datamodules: the same batches however they are loaded, each evaluation sample once."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.digits import Digits
from datamodules.images import Images
from datamodules.pictures import PictureData
from ssd.batch import Batch, map_tensors
from ssd.data.pictures import decode
from ssd.errors import UserError
from ssd.record import build, describe
from ssd.views.geometry import evaluation_picture
from ssd.views.recipes import DINOViews, PlainViews
from tests.data.files import class_folders, encoded, scene, write

VIEWS = DINOViews(global_size=16, local_count=2, local_size=8)


def in_trainer(data: PictureData, *, rank=0, world=1, step=0, views=VIEWS, micro_batches=1, device="cpu"):
    """The datamodule as a trainer would set it up on that rank."""
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(views=views, step=step, micro_batches=micro_batches),
        global_rank=rank,
        world_size=world,
        num_devices=world,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )
    data.setup("fit")
    return data


def batches(data: PictureData, **place) -> list[Batch]:
    return list(in_trainer(data, **place).train_dataloader())


def equal(first: Batch, second: Batch) -> bool:
    tensors: list[list[torch.Tensor]] = [[], []]
    for side, batch in zip(tensors, (first, second), strict=True):
        map_tensors(batch, side.append)
    same = all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    return same and first.total == second.total and first.views.keys() == second.views.keys()


@pytest.fixture
def folder(tmp_path) -> Path:
    class_folders(tmp_path / "some", {"ant": 13, "bee": 14, "cat": 13}, side=12)
    return tmp_path / "some"


# ---------------------------------------------------------------- the same batches


@pytest.mark.parametrize("workers, method", [(1, "fork"), (4, "fork"), (2, "spawn")])
def test_workers_change_no_bit_of_any_batch(folder, workers, method):
    write(folder / "bee" / "003.png", b"broken")
    settings = {"batch_size": 8, "max_broken_share": 0.1, "seed": 3}
    alone = batches(Images(folder, num_workers=0, cache=False, **settings), step=6)
    apart = batches(Images(folder, num_workers=workers, start_method=method, **settings), step=6)
    assert len(alone) == len(apart) == 2, "36 to train on make 4 steps; 6 steps are done"
    assert all(equal(a, b) for a, b in zip(alone, apart, strict=True))


def test_spawned_and_forked_workers_read_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": encoded(scene(8, 8, i)), "path": None} for i in range(20)]
    parquet.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(20)]}), tmp_path / "a.parquet")
    runs = [
        batches(Images(tmp_path / "a.parquet", batch_size=6, num_workers=n, start_method=method))
        for n, method in [(0, None), (1, "fork"), (1, "spawn")]
    ]
    assert all(equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_two_ranks_see_the_halves_of_what_one_process_sees(folder):
    whole = batches(Images(folder, batch_size=8, num_workers=0))
    halves = [batches(Images(folder, batch_size=4, num_workers=0), rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for number, part in enumerate(parts):
            assert part.total == 8
            assert equal(part, batch.part(number, 2))


def test_a_restart_in_the_middle_of_an_epoch_goes_on_with_the_very_next_batch(folder):
    data = in_trainer(Images(folder, batch_size=8, num_workers=1))
    loader = data.train_dataloader()
    run = []
    while len(run) < 10:  # workers are ahead of what is taken; the position follows the steps alone
        data.trainer.lightning_module.step = len(run)
        run += list(loader)
    resumed = batches(Images(folder, batch_size=8, num_workers=0), step=6)
    assert len(resumed) == 2
    assert equal(resumed[0], run[6]) and equal(resumed[1], run[7])


def test_photometry_on_the_device_gives_what_the_worker_gives(folder):
    worker = batches(Images(folder, batch_size=8, num_workers=0))
    data = in_trainer(Images(folder, batch_size=8, num_workers=0, photometry="device"))
    for ready, raw in zip(worker, data.train_dataloader(), strict=True):
        assert raw.views["global"].dtype == torch.uint8 and raw.photometry
        assert equal(data.on_after_batch_transfer(raw, 0), ready)


def test_colour_is_left_to_an_accelerator_and_done_by_workers_on_a_cpu(folder):
    data = in_trainer(Images(folder, batch_size=8), device="cuda")
    assert data._colours_in_workers() == "none" and data._workers() >= 1
    assert in_trainer(Images(folder, batch_size=8))._colours_in_workers() == "float"


def test_colours_that_workers_make_for_an_accelerator_travel_as_levels(folder):
    for_cpu = in_trainer(Images(folder, batch_size=8, num_workers=0, photometry="worker"))
    data = in_trainer(Images(folder, batch_size=8, num_workers=0, photometry="worker"), device="cuda")
    assert data._colours_in_workers() == "levels"
    loader = data.train_dataloader()
    loader.pin_memory = False
    batch, expected = next(iter(loader)), next(iter(for_cpu.train_dataloader()))
    assert batch.views["global"].dtype == torch.uint8 and not batch.photometry
    batch = data.on_after_batch_transfer(batch, 0)
    for kind, view in expected.views.items():
        torch.testing.assert_close(batch.views[kind], view, atol=0.51 / 255 / min(data.std), rtol=0)


def test_a_limit_trains_on_so_many_and_stays_apart_from_what_is_held_out(folder):
    full = in_trainer(Images(folder, batch_size=4, num_workers=0))
    few = in_trainer(Images(folder, batch_size=4, num_workers=0, limit=9))
    paths = [{s.describe(i) for i in range(len(s))} for s in (few.source, full.source, full._parts[2], few._parts[2])]
    assert len(paths[0]) == 9 and paths[0] < paths[1]
    assert not paths[1] & paths[2] and paths[2] == paths[3] and len(paths[2]) == 4
    assert len({full.fingerprint(), few.fingerprint()}) == 2


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_loaders_cover_each_sample_once_over_ranks(folder, world, workers):
    seen = [[], []]
    for rank in range(world):
        data = in_trainer(Images(folder, batch_size=5, num_workers=workers), rank=rank, world=world)
        for places, loader in zip(seen, data.val_dataloader(), strict=True):
            places.append([index for batch in loader for index in batch["index"].tolist()])
    assert all(len({len(of_rank) for of_rank in places}) == 1 for places in seen), (
        "as many on each, for sharded networks"
    )
    bank, queries = ([index for of_rank in places for index in of_rank] for places in seen)
    assert sorted(bank) == list(range(36)) and set(queries) == set(range(4)) and len(queries) < 4 + world


def test_an_evaluation_batch_is_the_recipes_look_normalised(folder):
    data = in_trainer(Images(folder, batch_size=5, num_workers=0, normalize="imagenet"))
    bank, queries = data.val_dataloader()
    source = data._parts[2]
    batch = next(iter(queries))
    for place, index in enumerate(batch["index"].tolist()):
        look = evaluation_picture(decode(source.open(index)), VIEWS.evaluation_size, VIEWS.evaluation_crop)
        mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
        torch.testing.assert_close(batch["sample"][place], (look / 255 - mean) / std, atol=1e-5, rtol=0)
        assert batch["label"][place] == source.label(index)
    assert len(bank.dataset) == 36


def test_the_bank_is_limited_online_and_whole_in_a_test(folder):
    data = in_trainer(Images(folder, batch_size=5, num_workers=0, evaluation_limit=10))
    assert [len(loader.dataset) for loader in data.val_dataloader()] == [10, 4]
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [36, 4]
    assert len(data.predict_dataloader().dataset) == 40


def test_without_labels_there_are_only_pictures_to_look_at(tmp_path):
    for number in range(8):
        write(tmp_path / f"{number}.png", encoded(scene(8, 8, number)))
    data = in_trainer(Images(tmp_path, batch_size=4, num_workers=0, evaluation_limit=6))
    assert data.num_classes == 0 and data.classes is None
    assert next(iter(data.train_dataloader())).label is None
    (loader,) = data.val_dataloader()
    assert len(loader.dataset) == 6
    assert next(iter(loader))["label"].tolist() == [-1] * 4


def test_labels_in_the_held_out_part_alone_make_it_bank_and_queries(tmp_path):
    for number in range(8):
        write(tmp_path / "loose" / f"{number}.png", encoded(scene(8, 8, number)))
    class_folders(tmp_path / "sorted", {"x": 5, "y": 5})
    data = in_trainer(Images(tmp_path / "loose", tmp_path / "sorted", batch_size=4, num_workers=0))
    bank, queries = (loader.dataset.pictures.source for loader in data.val_dataloader())
    paths = [{s.describe(i) for i in range(len(s))} for s in (bank, queries)]
    assert len(paths[0]) == len(paths[1]) == 5 and len(paths[0] | paths[1]) == 10
    assert data.num_classes == 2 and len(data.source) == 8


def test_a_held_out_sample_without_a_label_is_in_no_bank(tmp_path):
    class_folders(tmp_path, {"loose": 8})
    np.save(tmp_path / "val.npy", np.zeros((10, 8, 8, 3), np.uint8))
    np.save(tmp_path / "val-labels.npy", np.array([-1, 0, 1] * 3 + [-1]))
    data = in_trainer(Images(tmp_path / "loose", tmp_path / "val.npy", batch_size=4, num_workers=0))
    labels = [loader.dataset.pictures.source.labels for loader in data.val_dataloader()]
    assert sorted(np.concatenate(labels).tolist()) == [0, 0, 0, 1, 1, 1] and len(labels[1]) == 3


def test_names_and_numbers_are_not_taken_for_the_same_classes(folder, tmp_path):
    np.save(tmp_path / "val.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.save(tmp_path / "val-labels.npy", np.array([1, 2, 3]))
    with pytest.raises(UserError, match="training data has names of classes and the held-out data has plain numbers"):
        in_trainer(Images(folder, tmp_path / "val.npy"))
    np.save(tmp_path / "val-labels.npy", np.array([-1, -1, -1]))
    with pytest.raises(UserError, match=r"held-out data .* has none"):
        in_trainer(Images(folder, tmp_path / "val.npy"))


def test_train_and_val_folders_side_by_side_are_taken_as_such(tmp_path):
    class_folders(tmp_path / "train", {"a": 4, "b": 4, "c": 4})
    class_folders(tmp_path / "val", {"b": 2, "c": 2})
    data = in_trainer(Images(tmp_path, batch_size=4, num_workers=0))
    assert len(data.source) == 12 and data.classes == ["a", "b", "c"]
    _, queries = data.val_dataloader()
    assert next(iter(queries))["label"].tolist() == [1, 1, 2, 2], "by name, not by place"


def test_a_broken_picture_is_left_out_of_evaluation_and_too_many_stop_it(folder):
    data = in_trainer(Images(folder, batch_size=5, num_workers=0, max_broken_share=0.3))
    held = data._parts[2]
    write(Path(held.describe(1)), b"words")
    _, queries = data.val_dataloader()
    assert [index for batch in queries for index in batch["index"].tolist()] == [0, 2, 3]
    write(Path(held.describe(2)), b"words")
    with pytest.raises(UserError, match="2 of 4"):
        list(data.val_dataloader()[1])


def test_a_worker_tells_of_too_many_broken_pictures_without_its_traceback(folder):
    """Broken after the survey, so that the worker is the first to see it."""
    data = in_trainer(Images(folder, batch_size=4, num_workers=2, max_broken_share=0.05, cache=False))
    loader = data.train_dataloader()
    for path in (folder / "cat").iterdir():
        write(path, b"words")
    with pytest.raises(UserError) as caught:
        list(loader)
    assert "max_broken_share" in str(caught.value) and "Traceback" not in str(caught.value)


# ---------------------------------------------------------------- normalisation


def test_measured_normalisation_makes_the_data_standard(folder):
    data = Images(folder, num_workers=0, batch_size=8)
    data.prepare(PlainViews(size=12))
    pictures = torch.cat([batch["sample"] for batch in data.test_dataloader()[0]])
    # the bank is what was measured, at its own size
    assert pictures.mean((0, 2, 3)).abs().max() < 1e-4
    assert (pictures.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    again = Images(folder, num_workers=0, batch_size=8)
    again.prepare(PlainViews(size=12))
    assert (again.mean, again.std, again.fingerprint()) == (data.mean, data.std, data.fingerprint())
    assert data.describe_state() == {
        "mean": data.mean, "std": data.std, "value_range": "type", "channels": 3, "seed": data.seed,
        "fingerprint": data.fingerprint(),
    }  # fmt: skip


def test_given_normalisation_is_taken_as_it_is(folder):
    data = Images(folder, normalize={"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2]}, num_workers=0, batch_size=4)
    data.prepare(VIEWS)
    assert data.mean == [0.1, 0.2, 0.3] and data.std == [1.0, 1.0, 2.0]
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.normalisation, torch.tensor([[0.1, 0.2, 0.3], [1, 1, 2]]))


# ---------------------------------------------------------------- digits, records, Lightning


def test_digits_are_grey_at_any_size_and_their_labels_are_right():
    from ssd.data.digits import DigitsSource

    data = in_trainer(Digits(batch_size=64))
    batch = next(iter(data.train_dataloader()))
    assert batch.views["global"].shape == (2, 64, 1, 16, 16)
    source = DigitsSource("train")
    assert batch.label.tolist() == [source.label(i) for i in batch.index.tolist()]
    assert data.num_classes == 10
    colour = in_trainer(Digits(batch_size=64, channels=3))
    views = next(iter(colour.train_dataloader())).views["local"]
    assert views.shape[2] == 3


def test_a_record_builds_the_same_data(folder):
    data = Images(folder, batch_size=8, num_workers=0, normalize={"mean": [0.5] * 3, "std": [0.2] * 3}, limit=20)
    other = build(describe(data))
    assert equal(batches(data)[0], batches(other)[0])


class Looker(pl.LightningModule):
    """Takes steps without learning, and remembers what it was shown."""

    def __init__(self, steps_done: int = 0):
        super().__init__()
        self.automatic_optimization = False
        self.views, self.micro_batches, self.step = VIEWS, 1, steps_done
        self.seen: list[list[int]] = []
        self.looked: list[list[int]] = []

    def training_step(self, batch, _):
        assert batch.views["global"].dtype == torch.float32 and not batch.photometry
        self.seen.append(batch.index.tolist())
        self.step += 1

    def validation_step(self, batch, _, dataloader_idx=0):
        self.looked.append([dataloader_idx, *batch["index"].tolist()])

    def predict_step(self, batch, _):
        return batch["index"]

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("photometry", ["worker", "device"])
def test_a_trainer_runs_on_it_and_each_epoch_has_its_order(folder, photometry):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    data = Images(folder, batch_size=8, num_workers=1, photometry=photometry)
    module = Looker()
    trainer = pl.Trainer(max_epochs=2, num_sanity_val_steps=0, enable_model_summary=False, **quiet)
    trainer.fit(module, datamodule=data)
    alone = [batch.index.tolist() for epoch in (0, 4) for batch in batches(Images(folder, batch_size=8), step=epoch)]
    assert module.seen == alone
    assert [loader for loader, *_ in module.looked] == ([0] * 5 + [1]) * 2
    found = trainer.predict(module, data)
    assert torch.cat(found).tolist() == list(range(40))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"normalize": "cifar"}, "'data', 'imagenet', 'clip' or"),
        ({"normalize": {"mean": [0.5], "std": [0.5]}}, "for 3 channels"),
        ({"normalize": {"mean": [0.5] * 3, "std": [0.5, 0.5, 0]}}, "std above 0"),
        ({"normalize": "imagenet", "channels": 1}, "for 3 channels"),
        ({"max_broken_share": 3}, "max_broken_share is 3"),
        ({"val_share": 1.0}, "val_share is 1"),
        ({"cache": "maybe"}, "'auto', True, False"),
        ({"photometry": "gpu"}, "'auto', 'worker', 'device'"),
        ({"start_method": "thread"}, "start_method is 'thread'"),
        ({"limit": 0}, "limit is 0"),
        ({"evaluation_limit": 0}, "evaluation_limit is 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        Images("anywhere", **settings)


def test_mistakes_that_show_with_the_data_or_the_method(folder, tmp_path):
    with pytest.raises(UserError, match=r"36 training samples do not fill one step of 64.*batch_size 36"):
        in_trainer(Images(folder, batch_size=64)).train_dataloader()
    with pytest.raises(UserError, match="micro_batches: 3 does not divide"):
        in_trainer(Images(folder, batch_size=8), micro_batches=3)
    with pytest.raises(UserError, match="there is no"):
        in_trainer(Images(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="Call prepare"):
        Images(folder).train_dataloader()
    for name in ("clip", "speech"):
        with pytest.raises(
            UserError, match=r"Images makes views by PictureViews, and the method's are (Clip|Sound)Views"
        ):
            Images(folder).prepare(name)
    write(tmp_path / "loose" / "1.png", encoded(scene()))
    with pytest.raises(UserError, match="Leave val_path out"):
        in_trainer(Images(folder, tmp_path / "loose"))
    data = Images(folder)
    with pytest.raises(UserError, match=r"data\.limit"):
        data.trainer = SimpleNamespace(overfit_batches=3)
        data.setup("fit")


# ---------------------------------------------------------------- real data


@pytest.mark.data
def test_cifar10_parquet_has_its_classes_and_known_statistics(real_data):
    """Channel means 125.3, 123.0, 113.9 of 255 (Krizhevsky's set); these are JPEG copies, measured on 2,000."""
    data = Images(real_data / "cifar10-train.parquet", real_data / "cifar10-test.parquet", num_workers=0)
    data.prepare("dino_small")
    assert len(data.source) == 50_000 and data.num_classes == 10
    np.testing.assert_allclose(np.array(data.mean) * 255, [125.3, 123.0, 113.9], atol=3)
    np.testing.assert_allclose(np.array(data.std) * 255, [63.0, 62.1, 66.7], atol=3)
    assert [len(loader.dataset) for loader in data.val_dataloader()] == [10_000, 10_000]


@pytest.mark.data
def test_photographs_in_class_folders_some_of_them_grey(real_data):
    data = Images(real_data / "caltech20", num_workers=0, batch_size=16)
    data.prepare(dataclasses.replace(VIEWS, global_size=32))
    assert data.num_classes == 20 and len(data.source) == 1152
    batch = next(iter(data.train_dataloader()))
    assert batch.views["global"].isfinite().all() and batch.views["global"].shape == (2, 16, 3, 32, 32)
    names = {os.path.basename(os.path.dirname(data.source.describe(i))) for i in batch.index.tolist()}
    assert names == {data.classes[label] for label in batch.label.tolist()}


# ---------------------------------------------------------------- more than eight bits, and many channels


def many_channels(folder, count=48, channels=13):
    """Pictures of 13 channels in 16 bits that use a sixth of their range, as satellites send them."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    for number in range(count):
        picture = random.integers(300, 300 + 800 * (1 + np.arange(channels)), (20, 24, channels))
        np.save(folder / "train" / f"{number:03d}.npy", picture.astype(np.uint16))
    return folder / "train"


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_pictures_of_any_number_of_channels_go_all_the_way(tmp_path, channels):
    folder = many_channels(tmp_path, channels=channels)
    data = Images(folder, channels=channels, value_range="data", batch_size=16, num_workers=0, cache=False)
    data.prepare(DINOViews(global_size=16, local_count=2, local_size=8))
    batch = next(iter(data.train_dataloader()))
    assert batch.views["global"].shape == (2, 16, channels, 16, 16)
    assert batch.views["global"].isfinite().all()
    assert len(data.levels.low) == channels
    np.testing.assert_allclose(data.levels.high, 300 + 800 * (1 + np.arange(channels)), rtol=0.02)
    # each channel fills its range
    np.testing.assert_allclose(data.mean, 0.5, atol=0.02)
    np.testing.assert_allclose(data.std, np.sqrt(1 / 12), atol=0.02)


def test_without_a_range_they_would_be_almost_black(tmp_path):
    data = Images(many_channels(tmp_path), channels=13, batch_size=16, num_workers=0)
    data.prepare(VIEWS)
    assert max(data.mean) < 0.1


def test_a_range_is_kept_for_whoever_looks_again(tmp_path):
    folder = many_channels(tmp_path)
    data = Images(folder, channels=13, value_range="data", batch_size=16, num_workers=0)
    data.prepare(VIEWS)
    kept = data.describe_state()["value_range"]
    again = Images(folder, channels=13, value_range=kept, batch_size=16, num_workers=0)
    again.prepare(VIEWS)
    assert again.levels == data.levels and again.mean == data.mean
    assert again.describe_state() == data.describe_state()


@pytest.mark.parametrize("value_range", ["all", [1], [5, 5], [[0, 1], [2]], ["a", "b"], 7])
def test_a_range_that_is_none_is_said(value_range):
    with pytest.raises(UserError, match="value_range"):
        Images("x", value_range=value_range)
