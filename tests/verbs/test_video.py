"""The verbs on clips, from one small run on shapes that move."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssd.data.moving_shapes import MOTIONS, write_moving_shapes
from ssd.evaluation.features import pixels
from ssd.verbs.arguments import config_file
from ssd.verbs.loading import load_data, load_module
from ssd.verbs.quickstart import MADE
from tests.verbs.conftest import typed

pytest.importorskip("av")
NETWORK = {
    "name": "vit_tiny_patch16_224",
    "img_size": 16,
    "arguments": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
CONFIG = {
    "model": {
        "class_path": "DISCOVR",
        "init_args": {
            "backbone": {"class_path": "VideoViT", "init_args": NETWORK},
            "image_backbone": {"class_path": "ViT", "init_args": NETWORK},
            "views": {
                "class_path": "ClipViews",
                "init_args": {
                    "global_count": 1, "global_size": 16, "global_frames": 4, "global_fps": 2.0, "local_count": 0,
                    "evaluation_crop": 1.0,
                },
            },
            "masks": {"class_path": "RandomMasks", "init_args": {"ratio": 0.5, "tube": True}},
            "num_masks": 2, "num_prototypes": 16, "num_clusters": 8, "head_hidden_dim": 16, "head_bottleneck_dim": 8,
            "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "teacher_temperature": 0.04, "steps": 3,
        },
    },
    "trainer": {"accelerator": "cpu", "log_every_n_steps": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_moving_shapes(folder / "shapes", 5, seed=0)
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    said = typed(
        *("fit", "--config", folder / "config.yaml", "--data", folder / "shapes", "--data.batch_size", 8),
        *("--data.num_workers", 0, "--trainer.default_root_dir", folder / "run"),
    )
    assert said.status == 0 and "knn/top1" in said.out, said
    return folder


def last(folder: Path) -> str:
    return str(folder / "run" / "checkpoints" / "last.ckpt")


def test_probe_judges_clips_beside_the_mean_of_their_frames(folder, tmp_path):
    words = ("--measures", "knn", "outputs", "frames", "--baselines", "--cache", "none", "--draws", 2)
    said = typed("probe", last(folder), *words, "--json", tmp_path / "probe.json")
    assert said.status == 0, said
    found = json.loads((tmp_path / "probe.json").read_text())
    assert set(found["baselines"]) == {"pixels", "untrained", "pretrained"} and "mean_patch" in said.out
    assert all("frames" in row for row in found["baselines"].values())
    _, about = load_module(last(folder))
    loader = load_data([], about, "probe").test_dataloader()[1]
    raw = pixels(loader).features
    clips = torch.cat([batch["sample"] for batch in loader])
    assert raw.shape[1] == 3 * 16 * 16
    assert torch.allclose(raw, torch.stack([clip.mean(1).flatten() for clip in clips]))


def test_embed_export_and_look_take_clips(folder, tmp_path):
    said = typed("embed", last(folder), "--out", tmp_path / "embedded")
    assert said.status == 0 and f"{5 * len(MOTIONS)} x 16" in said.out, said
    said = typed("export", last(folder), "--out", tmp_path / "exported")
    assert said.status == 0 and "from ssd.record import build" in said.out, said
    again = typed("embed", tmp_path / "exported", "--data", folder / "shapes", "--out", tmp_path / "again")
    assert again.status == 0, again
    ours, theirs = (
        np.concatenate([np.load(file) for file in sorted((tmp_path / name).glob("*.npy"))])
        for name in ("embedded", "again")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    said = typed("look", last(folder), "--samples", 2, "--cell", 40, "--out", tmp_path / "look.png")
    assert said.status == 0 and "1 global of 4 frames of 16 px" in said.out, said
    strip = np.asarray(Image.open(tmp_path / "look.png"))
    assert strip.shape[0] > 2 * 40


def test_what_a_network_sees_is_shown_as_filmstrips(folder, tmp_path):
    for what in ("pca", "neighbours"):
        said = typed("look", last(folder), "--show", what, "--samples", 2, "--out", tmp_path / f"{what}.png")
        assert said.status == 0 and "2 clips" in said.out, said
    assert Image.open(tmp_path / "pca.png").width > 4 * 160
    events = EventAccumulator(str(next((folder / "run").glob("tensorboard*"))), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["pictures/views", "pictures/components", "pictures/neighbours"]


def test_clips_are_fine_tuned_and_compared(folder, tmp_path):
    words = ("--shares", 1.0, "--seeds", 1, "--epochs", 1, "--mixup", 0.8, "--jitter", 0.2, "--device", "cpu")
    said = typed("finetune", last(folder), *words, "--out", tmp_path / "out", "--json", tmp_path / "f.json")
    assert said.status == 0 and "Classifier(build(" in said.out, said
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["model"]["difference"] < 1e-4 and content["classes"] == len(MOTIONS)
    views = content["settings"]["views"]["init_args"]
    assert (
        views["global_scale"] == [0.35, 1.0] and views["jitter"] == [0.2, 0.2, 0.2, 0.0] and views["global_frames"] == 4
    )
    said = typed("finetune", last(folder), "--cutmix", 1.0)
    assert said.status == 2 and "these are clips. Use --mixup" in said.err, said
    said = typed("compare", last(folder), "pixels", "--draws", 2, "--device", "cpu", "--json", tmp_path / "c.json")
    assert said.status == 0 and "pixels" in said.out, said


@pytest.mark.parametrize("verb", ["plan", "doctor", "report"])
def test_verbs_about_runs_take_runs_on_clips(verb, folder, tmp_path):
    words = {
        "plan": (
            "--config",
            folder / "config.yaml",
            "--data",
            folder / "shapes",
            "--data.batch_size",
            8,
            "--no-measure",
        ),
        "doctor": (folder / "run",),
        "report": (folder / "run", "--out", tmp_path / "page.html"),
    }[verb]
    said = typed(verb, *words)
    assert said.status == 0, said
    assert {"plan": "2 x 2 x 2 patches", "doctor": "DISCOVR", "report": "page.html"}[verb] in said.out


def test_what_is_for_pictures_says_so(folder):
    for words in (("look", last(folder), "--show", "attention"), ("check-data", "--data", folder / "shapes")):
        said = typed(*words)
        assert said.status == 2 and "is for pictures, and the data is Clips" in said.err, said
    said = typed(
        "fit", "--model", "DINO", "--model.backbone", "ViT", "--model.views", "clip", "--data", folder / "shapes"
    )
    assert said.status == 2 and "the views are ClipViews and ViT takes pictures" in said.err, said
    said = typed("fit", "--model", "DINO", "--model.backbone", "VideoViT", "--data", "Digits")
    assert said.status == 2 and "the views are DINOViews and VideoViT takes clips" in said.err, said


def test_quickstart_makes_its_own_clips_or_takes_some_and_says_which(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = partial(write_moving_shapes, each=5)
    monkeypatch.setitem(MADE, "Clips", (*MADE["Clips"][:2], few))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(CONFIG | {"data": {"class_path": "Clips", "init_args": {"batch_size": 8}}}))
    said = typed("quickstart", "--config", config, "--draws", 2, "--out", "own")
    assert said.status == 0, said
    assert "No clips were given" in said.out and "moving shapes that were made for it, in own/made" in said.out
    summary = json.loads(Path("own/summary.json").read_text())
    assert summary["data"] == "Clips made" and {"pixels", "untrained", "pretrained"} <= set(summary)
    said = typed("quickstart", "--config", config, "--draws", 2, "--out", "given", "--data.path", folder / "shapes")
    assert said.status == 0 and "made for it" not in said.out, said
    assert json.loads(Path("given/summary.json").read_text())["data"] == "Clips shapes"


@pytest.mark.slow
def test_the_quickstart_learns_to_tell_motions_that_neither_pixels_nor_the_untrained_network_tell(
    tmp_path, monkeypatch
):
    """A third of its steps on half of its clips: 96 are held out, of six motions, where chance is .17 with deviation .04."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MADE, "Clips", (*MADE["Clips"][:2], partial(write_moving_shapes, each=80)))
    config = yaml.safe_load(config_file("quickstart-video").read_text())
    config["model"]["init_args"]["steps"] = 100
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    said = typed("quickstart", "--config", "config.yaml", "--draws", 2, "--out", "run")
    assert said.status == 0, said
    found = json.loads(Path("run/summary.json").read_text())
    assert found["pretrained"]["knn"] > 0.6
    assert found["pixels"]["knn"] < 0.5
    assert found["pretrained"]["knn"] > found["untrained"]["knn"] + 0.15


def test_what_is_made_is_the_same_for_a_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_moving_shapes(tmp_path / name, 2, seed)
    one, same, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.mp4")}
        for name in "abc"
    )
    assert one == same and len(one) == 2 * len(MOTIONS)
    assert all(one[path] != other[path] for path in one)
