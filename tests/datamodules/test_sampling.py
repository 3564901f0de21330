"""Mixtures, groups and rules of drawing through whole datamodules: config, workers, ranks, resume."""

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from datamodules.images import Images
from datamodules.pictures import PictureData
from ssd.data.broken import BrokenSamples
from ssd.data.cache import Pictures
from ssd.data.clusters import Clusters, write_clusters
from ssd.data.dataset import TrainingPictures
from ssd.data.folder import FolderSource
from ssd.data.inherited import groups_of
from ssd.data.mixture import Mixture
from ssd.data.sampling import Balanced, Fraction, Weighted
from ssd.errors import UserError
from ssd.record import build, describe
from ssd.verbs.arguments import expand, import_choices
from tests.data.files import class_folders, encoded, scene, write
from tests.data.test_dataset import CONTEXT
from tests.datamodules.test_pictures import VIEWS, batches, equal, in_trainer


@pytest.fixture
def parts(tmp_path):
    class_folders(tmp_path / "photos", {"ant": 12, "bee": 12}, side=10)
    for number in range(8):
        write(tmp_path / "scans" / f"{number}.png", encoded(scene(10, 10, 100 + number)))
    return tmp_path


def mixed(parts, weight=1, **settings):
    path = {"photos": {"path": str(parts / "photos"), "weight": weight}, "scans": str(parts / "scans")}
    return Images(path, batch_size=8, num_workers=0, **settings)


# ---------------------------------------------------------------- mixtures


def test_a_mixture_trains_on_all_parts_by_weight_and_holds_out_what_has_labels(parts, capsys):
    data = in_trainer(mixed(parts, weight=3))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "sampling  Weighted: 30 draws an epoch: photos 23 of 22 samples (1.05 epochs, each at most 2"
    )
    assert "scans 7 of 8 samples (0.88 epochs, 1 left out)" in line and "the order of an epoch takes" in line
    _, bank, queries = data._parts
    assert len(data.source) == 30 and data.classes == ["ant", "bee"]
    assert len(bank) == 22 and len(queries) == 2 and (queries.labels >= 0).all()
    labels = np.concatenate([batch.label.numpy() for batch in batches(mixed(parts, weight=3))])
    assert len(labels) == 24 and (labels == -1).any()


def test_parts_with_their_own_held_out_folders_are_taken_as_such(parts):
    class_folders(parts / "other" / "train", {"bee": 4, "cat": 4})
    class_folders(parts / "other" / "val", {"bee": 1, "cat": 2})
    data = Images({"a": str(parts / "other"), "b": str(parts / "photos")}, batch_size=8, num_workers=0)
    data.prepare(VIEWS)
    assert data.classes == ["ant", "bee", "cat"] and len(data.source) == 32
    assert data._parts[2].labels.tolist() == [1, 2, 2]


@pytest.mark.parametrize("form", ["typed", "config", "data"])
def test_a_mixture_and_its_rule_arrive_from_command_line_and_config(parts, tmp_path, form):
    import_choices()
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(PictureData, "data")
    path = {"photos": {"path": "A", "weight": 2}, "scans": "B"}
    if form == "config":
        sampling = {"class_path": "Weighted", "init_args": {"length": 50}}
        content = {"data": {"class_path": "Images", "init_args": {"path": path, "sampling": sampling}}}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
        typed = ["--config", str(tmp_path / "c.yaml")]
    else:
        start = ["--data", "Images", "--data.path"] if form == "typed" else ["--data"]
        typed = [*start, "{photos: {path: A, weight: 2}, scans: B}"]
        typed += ["--data.sampling", "Weighted", "--data.sampling.length", "50"]
    data = parser.instantiate_classes(parser.parse_args(expand(typed))).data
    assert data.path == path and data.sampling == Weighted(50)
    assert describe(build(describe(data))) == describe(data)


def test_a_pattern_in_braces_is_a_path_and_no_mixture(tmp_path):
    from ssd.verbs.arguments import data_arguments

    assert data_arguments("{a,b}.tar")[-1].endswith("{a,b}.tar")


# ---------------------------------------------------------------- groups


def test_patients_stay_on_one_side(tmp_path):
    for number in range(40):
        name = f"p{number // 4}-{number % 4}.png"
        write(tmp_path / ("sick" if number % 8 < 4 else "well") / name, encoded(scene(8, 8, number)))
    data = Images(tmp_path, group_by=r"p\d+", val_share=0.2, batch_size=4, num_workers=0)
    data.prepare(VIEWS)
    training, _, held = data._parts
    assert not set(groups_of(training)) & set(groups_of(held)) and len(held) == 8
    assert sorted(held.labels.tolist()) == [0] * 4 + [1] * 4
    assert describe(build(describe(data))) == describe(data)
    with pytest.raises(UserError, match="group_by is 0"):
        Images(tmp_path, group_by=0)


# ---------------------------------------------------------------- drawing


@pytest.fixture
def balanced(parts):
    folder = parts / "scans"
    source = FolderSource(folder)
    leaf = np.array([0, 0, 0, 0, 0, 1, 2, 2], np.int32)
    write_clusters(parts / "c.npz", Clusters(leaf, (), 3), data="scans", fingerprint=source.fingerprint())
    return Images(
        folder, batch_size=4, num_workers=0, sampling=Balanced(str(parts / "c.npz"), length=12, max_repeats=5)
    )


def test_workers_ranks_and_a_stop_change_no_bit_of_balanced_batches(balanced, parts):
    settings = describe(balanced)
    whole = batches(balanced)
    assert len(whole) == 3
    (parts / "scans" / "5.png").write_bytes(b"words")  # a sample that is drawn four times an epoch
    more = {"max_broken_share": 0.5}
    alone = batches(build({**settings, "init_args": settings["init_args"] | more}))
    apart = batches(build({**settings, "init_args": settings["init_args"] | more | {"num_workers": 2}}))
    assert all(equal(a, b) for a, b in zip(alone, apart, strict=True)) and 5 not in np.concatenate(
        [b.index for b in alone]
    )
    halves = [
        batches(build({**settings, "init_args": settings["init_args"] | more | {"batch_size": 2}}), rank=r, world=2)
        for r in (0, 1)
    ]
    for batch, *own in zip(alone, *halves, strict=True):
        assert all(equal(part, batch.part(number, 2)) for number, part in enumerate(own))
    resumed = batches(build({**settings, "init_args": settings["init_args"] | more}), step=4)
    second = batches(build({**settings, "init_args": settings["init_args"] | more}), step=3)
    assert len(resumed) == 2 and all(equal(a, b) for a, b in zip(resumed, second[1:], strict=True))


def test_a_sample_drawn_twice_in_an_epoch_has_other_views(balanced):
    drawn = {}
    for batch in batches(balanced):
        for place, index in enumerate(batch.index.tolist()):
            drawn.setdefault(index, []).append(batch.boxes["local"][:, place].numpy())
    assert [len(views) for index, views in sorted(drawn.items()) if index >= 5] == [4, 2, 2]
    views = [view.tobytes() for views in drawn.values() for view in views]
    assert len(set(views)) == len(views) == 12


def test_each_draw_of_a_broken_picture_is_replaced_by_the_next_of_its_own_place(balanced, parts):
    (parts / "scans" / "5.png").write_bytes(b"words")
    source = FolderSource(parts / "scans")
    draws = balanced.sampling.over(source)
    dataset = TrainingPictures(Pictures(source, 3), VIEWS, BrokenSamples(source, 0.5, CONTEXT), seed=1, draws=draws)
    order = draws.order(1, 2).tolist()
    places = [place for place, index in enumerate(order) if index == 5]
    assert len(places) == 4
    for turn, place in enumerate(places):
        following = next(index for index in order[place:] + order[:place] if index != 5)
        assert dataset[(2, 5, turn)].index == [following]


def test_a_fraction_shortens_the_epoch_of_a_trainer(parts, capsys):
    data = in_trainer(Images(parts / "photos", batch_size=4, num_workers=0, sampling=Fraction(0.5)))
    assert len(data.train_dataloader()) == 2, "half of 22 fills two steps of 4"
    assert "Fraction: 11 of 22 samples an epoch, 11 left out (50.0%)" in capsys.readouterr().out
    assert data.describe_state()["sampling"].startswith("Fraction: 11 of 22")
    with pytest.raises(UserError, match="2 draws of an epoch do not fill one step of 4"):
        in_trainer(Images(parts / "photos", batch_size=4, num_workers=0, sampling=Fraction(0.1))).train_dataloader()


def test_every_sample_once_says_nothing(parts, capsys):
    in_trainer(Images(parts / "photos", batch_size=4, num_workers=0)).train_dataloader()
    assert capsys.readouterr().out == ""
    plain = Mixture({"a": FolderSource(parts / "photos"), "b": FolderSource(parts / "scans")})
    assert not plain.weighted
