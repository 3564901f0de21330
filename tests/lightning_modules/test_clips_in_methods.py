"""Methods for pictures, on clips: the same engine, another backbone and other views."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from datamodules.clips import Clips
from lightning_modules.dino import DINO
from lightning_modules.mae import MAE
from ssd.backbones.video import VideoViT
from ssd.batch import Batch
from ssd.data.moving_shapes import FRAMES, MOTIONS, SIDE, moved, moving_shapes, write_moving_shapes
from ssd.masking.recipes import RandomMasks
from ssd.normalisers import patchified, standardised
from ssd.views.clips import ClipViews
from tests.contract import MethodContract
from tests.lightning_modules.runs import HEAD, At, differences, everything, fit, last

pytest.importorskip("av")
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
VIEWS = ClipViews(global_size=16, global_frames=4, local_size=8, local_frames=2, local_count=1)


def video() -> VideoViT:
    torch.manual_seed(0)
    return VideoViT("vit_tiny_patch16_224", arguments=VIT)


def random_clips(samples: int, seed: int, views: ClipViews) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    kinds = {
        kind: torch.randn(len(members), samples, 3, *members[0].lengths, generator=generator)
        for kind, members in views.kinds().items()
    }
    return Batch(views=kinds, index=torch.arange(samples), total=samples)


class TestDINO(MethodContract):
    def make(self, **engine):
        return DINO(video(), views=VIEWS, lr=1e-4, lr_rule="none", **HEAD, **engine)

    def batch(self, samples, seed):
        return random_clips(samples, seed, VIEWS)


def mae(**settings) -> MAE:
    decoder = {"decoder_dim": 18, "decoder_depth": 1, "decoder_heads": 2}
    views = dataclasses.replace(VIEWS, global_count=1, local_count=0, evaluation_size=16)
    return MAE(video(), views=views, masks=RandomMasks(0.5, tube=True), **decoder, **settings)


def test_tubes_of_pixels_are_cut_as_their_tokens_lie():
    clips = torch.arange(2 * 3 * 4 * 16 * 16, dtype=torch.float32).reshape(2, 3, 4, 16, 16)
    cut = patchified(clips, (2, 8, 8))
    assert cut.shape == (2, 8, 2 * 8 * 8 * 3)
    tube = clips[1, :, 2:4, 8:16, :8]  # time 1, row 1, column 0
    assert torch.equal(cut[1, 4 + 2], tube.permute(1, 2, 3, 0).flatten())
    assert torch.equal(patchified(clips[:, :, 0], 8), patchified(clips[:, :, 0], (8, 8)))


def test_mae_predicts_the_pixels_of_hidden_tubes():
    module = mae()
    batch = random_clips(2, 0, module.views)
    masks = batch.masks["global"] = module.mask_plans()["global"].draw(2, 0)
    by_time = masks.boolean.unflatten(2, (2, 4))
    assert torch.equal(by_time[:, :, 0], by_time[:, :, 1]) and masks.visible.shape == (1, 2, 4)
    with torch.no_grad():
        targets = module.targets(batch)
        found = module.losses(batch, targets)["pixels"]
        decoded = module.student(batch.views["global"], masks.visible).patches
        wanted = standardised(patchified(batch.views["global"][0], (2, 8, 8)))[None]
    error = (decoded - wanted).square().mean(-1)[masks.boolean]
    assert_close(found, error.mean(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- clips that are made here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shapes(folder, 4, seed=0)
    return folder


def test_shapes_move_as_their_class_says_from_anywhere_and_a_frame_does_not_tell():
    clips = {motion: moving_shapes(motion, 0, 0, 1) for motion in MOTIONS}
    for motion, clip in clips.items():
        assert clip.shape == (FRAMES, SIDE, SIDE, 3)
        assert (clip == moving_shapes(motion, 0, 0, 1)).all() and (clip != moving_shapes(motion, 0, 0, 2)).any()
        assert (clip[0] == clips["left"][0]).all(), "all begin alike"
        changed = abs(clip[1:].astype(float) - clip[:-1]).max(-1) > 40
        assert changed.any((1, 2)).all()
    for one, other in (("left", "right"), ("up", "down"), ("clockwise", "anticlockwise")):
        assert (clips[one][-1] != clips[other][-1]).any()


def test_each_motion_goes_where_its_name_says():
    above = np.array([[SIDE / 2 - 8, SIDE / 2]])  # row and column of what lies above the middle
    for motion, way in {
        "left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "clockwise": (0, 1), "anticlockwise": (0, -1)
    }.items():  # fmt: skip
        step = (moved(motion, above, 0.01) - above)[0]
        assert_close(step / abs(step).max(), np.array(way, float), atol=1e-3, rtol=0)


def test_a_run_on_clips_is_evaluated_and_goes_on_as_if_never_stopped(folder, tmp_path):
    def module(steps):
        torch.manual_seed(1)
        return DINO(video(), views=VIEWS, lr=1e-3, lr_rule="none", steps=steps, **HEAD)

    def data():
        return Clips(folder, batch_size=8, num_workers=0, val_share=0.25)

    whole = fit(tmp_path / "whole", module(4), data())
    assert {"val/knn/top1", "val/spectrum/lidar"} <= whole.callback_metrics.keys()
    assert "val/dense/correspondence" not in whole.callback_metrics, "that is of pictures"

    fit(tmp_path / "part", module(4), data(), callbacks=[At(2, lambda trainer, module: module._stop())])
    fit(tmp_path / "rest", module(4), data(), resume=last(tmp_path / "part"))
    assert not differences(everything(last(tmp_path / "rest")), everything(last(tmp_path / "whole")))
