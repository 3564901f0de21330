"""Pictures of a run: they are there, they compare over time, and the run is the same without them."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.ibot import IBOT
from ssd.callbacks import pictures as ours
from ssd.callbacks.pictures import RunPictures
from ssd.data.digits import DigitsSource
from ssd.errors import UserError
from tests.lightning_modules.runs import At, best, convnet, differences, digits, everything, fit, last, vit


def few():
    """3 steps an epoch."""
    return digits(limit=48, evaluation_limit=32)


def with_pictures(folder: Path, module, callback: RunPictures | None = None, extra=(), **settings) -> dict:
    """Names of pictures -> steps, of a run of 9 steps with an evaluation after every third."""
    logger = TensorBoardLogger(folder, name="tensorboard", version="")
    fit(folder, module, few(), callbacks=[callback or RunPictures(), *extra], logger=logger, **settings)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize("build", [convnet, vit])
def test_a_run_is_the_same_with_and_without_pictures(tmp_path, build):
    """Weights, statistics, optimiser and generators of the last and the best checkpoint are equal to the bit. A
    transformer has attention and, with four patches, a map; the tiny convnet answers one patch and has neither."""
    drop = {"drop_path_rate": 0.2} if build is vit else {}
    torch.manual_seed(1)
    fit(tmp_path / "plain", build(**drop), few())
    torch.manual_seed(1)
    shown = with_pictures(tmp_path / "shown", build(**drop))
    inside = ("attention", "components") if build is vit else ()
    assert shown == {"pictures/views": [0], **{f"pictures/{name}": [3, 6, 9] for name in (*inside, "neighbours")}}
    for which in (last, best):
        assert differences(everything(which(tmp_path / "plain")), everything(which(tmp_path / "shown"))) == []


def test_a_run_that_goes_on_draws_what_is_left_and_turns_its_colours_to_the_last_ones(tmp_path):
    """Stopped after 6 of 9 steps: the pictures of both halves are those of a run without a stop."""
    whole = RunPictures(times=3)
    with_pictures(tmp_path / "whole", vit(), whole)
    with_pictures(tmp_path / "half", vit(), RunPictures(times=3), [At(6, lambda trainer, module: stop(trainer))])
    again = RunPictures(times=3)
    steps = with_pictures(tmp_path / "half", vit(), again, resume=last(tmp_path / "half"))
    assert steps["pictures/components"] == [3, 6, 9] and steps["pictures/views"] == [0]
    assert torch.equal(again._scores, whole._scores)


def stop(trainer) -> None:
    trainer.should_stop = True


def test_pictures_are_spread_over_the_run_and_its_end_is_shown(tmp_path):
    assert with_pictures(tmp_path, vit(), RunPictures(times=2))["pictures/attention"] == [6, 9]


def test_masks_are_shown_with_the_views(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ours, "sheet", lambda batch, *rest: seen.append(batch) or Image.new("RGB", (8, 8)))
    with_pictures(tmp_path, vit(IBOT), RunPictures(samples=4), max_epochs=1)
    (batch,) = seen
    assert batch.masks["global"].boolean.shape[:2] == (2, 4) and batch.boxes["local"].shape == (2, 4, 5)


def test_without_a_log_or_with_no_times_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "looked_at", None)
    monkeypatch.setattr(ours, "sheet", None)
    assert with_pictures(tmp_path / "none", vit(), RunPictures(times=0), max_epochs=1) == {}
    fit(tmp_path / "unlogged", vit(), few(), callbacks=[RunPictures()], max_epochs=1)


def test_data_without_labels_shows_neighbours_that_are_not_the_picture_itself(tmp_path, monkeypatch):
    asked = []
    found = ours.nearest
    monkeypatch.setattr(ours, "nearest", lambda *given: asked.append((given, found(*given))) or asked[-1][1])
    monkeypatch.setattr("datamodules.digits.Digits.sources", lambda self: (Unlabelled("train"), None))
    with_pictures(tmp_path, vit(), RunPictures(times=1), max_epochs=1)
    ((queries, bank, _, own), (_, rows)) = asked[0]
    torch.testing.assert_close(queries, bank[own], atol=1e-4, rtol=1e-4)
    assert not (rows == own[:, None]).any()


class Unlabelled(DigitsSource):
    def __init__(self, split: str):
        super().__init__(split)
        self.labels = None

    def label(self, index: int) -> int:
        return -1

    def fingerprint(self) -> str:
        return "unlabelled"


@pytest.mark.parametrize(("settings", "word"), [({"samples": 0}, "samples is 0"), ({"times": -1}, "times is -1")])
def test_settings_that_make_no_sense_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        RunPictures(**settings)
