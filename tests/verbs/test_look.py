"""`ssd look`: the sheet shows the views of the run, of a checkpoint's own data or of any."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import Images
from datamodules.sound import Sound
from lightning_modules.dino import DINO
from lightning_modules.ibot import IBOT
from ssd.data.dataset import looked_at
from ssd.data.sound import Sound as SoundFile
from ssd.masking.recipes import RandomMasks
from ssd.pictures.attention import spread
from ssd.verbs.loading import load_module
from ssd.views.parameters import draw
from ssd.views.recipes import RECIPES, DINOViews
from ssd.views.sound import SoundViews
from tests.data.files import class_folders
from tests.data.media_files import sine, wav_bytes, write_clip
from tests.lightning_modules.runs import digits, fit, last, vit
from tests.verbs.conftest import typed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return class_folders(tmp_path / "pets", {"ant": 5, "bee": 5}, side=40)


def test_the_sheet_shows_the_first_samples_of_the_run(folder, tmp_path):
    said = typed("look", "--data", folder, "--views", "dino_small", "--data.seed", 3, "--json", "rows.json")
    assert (said.status, said.err) == (0, "")
    written = json.loads((tmp_path / "rows.json").read_text())
    data = Images(folder, batch_size=6, num_workers=0, seed=3)
    data.prepare("dino_small")
    batch = next(iter(data.train_dataloader()))
    assert [row["picture"] for row in written["rows"]] == [data.source.describe(i) for i in batch.index.tolist()]
    boxes, _ = draw(RECIPES["dino_small"], 40, 40, 3, 0, int(batch.index[2]))
    assert written["rows"][2]["boxes"]["local"] == boxes["local"].astype(int).tolist()
    page = Image.open("sheet.png")
    assert page.mode == "RGB" and page.width > 7 * 160 and page.height > 6 * 160
    assert "6 samples, 2 global of 32 px, 4 local of 16 px" in said.out and "row 6: " in said.out


def test_fewer_pictures_than_rows_are_all_shown(folder):
    said = typed(
        "look", "--data", folder, "--views", "dino_small", "--samples", 50, "--cell", 20, "--data.val_share", 0
    )
    assert said.status == 0 and "10 samples" in said.out


def test_a_checkpoint_shows_its_own_data_and_views(run, tmp_path):
    said = typed("look", run.last, "--out", tmp_path / "own.png", "--samples", 2, "--json", tmp_path / "rows.json")
    assert said.status == 0, said.err
    assert "2 samples, 2 global of 16 px" in said.out and "digit" in said.out
    page = np.array(Image.open(tmp_path / "own.png"))
    cells = page[22:-6, 6 + 166 : 6 + 166 + 160]
    assert (np.ptp(cells.reshape(-1, 3), axis=1) == 0).all() and cells.std() > 10, "grey digits are shown grey"


def test_what_a_checkpoints_method_masks_is_greyed_out(run, tmp_path, monkeypatch):
    """The run's network has one token for a view of 16 px, which a mask of a half hides."""
    sheets = []
    for masking in ({}, {"global": RandomMasks(0.5)}):
        monkeypatch.setattr(DINO, "masking", masking)
        assert typed("look", run.last, "--out", tmp_path / "a.png", "--samples", 2, "--cell", 16).status == 0
        page = np.array(Image.open(tmp_path / "a.png")).astype(float)
        sheets.append(page[22 : 22 + 16])
    plain, masked = sheets
    for column in (1, 2):
        cell = slice(6 + column * 22, 22 + column * 22)
        np.testing.assert_allclose(masked[:, cell], 0.15 * plain[:, cell] + 0.85 * 128, atol=0.51)
    assert np.array_equal(masked[:, 6:22], plain[:, 6:22]), "the original is shown whole"


def test_masks_are_shown_without_a_checkpoint(folder, tmp_path):
    """Twelve of sixteen patches of each global view are greyed out, and nothing else is."""
    words = ("look", "--data", folder, "--views", "dino_small", "--samples", 2, "--cell", 32)
    assert typed(*words, "--out", tmp_path / "plain.png").status == 0
    recipe = "{class_path: RandomMasks, init_args: {ratio: 0.75}}"
    assert typed(*words, "--masks", recipe, "--patch", 8, "--out", tmp_path / "masked.png").status == 0
    plain, masked = (np.array(Image.open(tmp_path / name)).astype(float) for name in ("plain.png", "masked.png"))
    row = slice(22, 54)
    for column in range(5):
        cell = slice(6 + column * 38, 38 + column * 38)
        a, b = plain[row, cell], masked[row, cell]
        hidden = np.abs(b - (0.15 * a + 0.85 * 128)).max(2) < 0.51
        patches = hidden.reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 64).all(1)
        assert patches.sum() == (12 if column in (1, 2) else 0), column


def test_a_checkpoint_looks_at_other_data(run, folder, tmp_path):
    said = typed("look", run.last, "--data", folder, "--out", tmp_path / "other.png", "--samples", 2)
    assert said.status == 0 and "pets" in said.out


@pytest.mark.parametrize("channels", [4, 13])
def test_many_channels_are_shown(tmp_path, channels):
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / "many").mkdir(exist_ok=True)
        np.save(tmp_path / "many" / f"{number}.npy", rng.integers(0, 4000, (30, 30, channels)).astype(np.uint16))
    settings = ("--data.channels", channels, "--data.value_range", "data", "--views", "dino_small")
    words = ("look", "--data", tmp_path / "many", *settings, "--out", tmp_path / "a.png", "--samples", 2)
    assert typed(*words).status == 0
    first = np.array(Image.open(tmp_path / "a.png"))
    assert np.ptp(first, axis=2).mean() > 10, "in colour"
    assert typed(*words, "--bands", 3).status == 0
    assert not np.array_equal(first, np.array(Image.open(tmp_path / "a.png")))
    said = typed(*words, "--bands", 1, channels, 2)
    assert said.status == 2 and f"there are {channels} channels" in said.err


def test_looking_changes_no_random_state(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert typed("look", "--data", folder, "--views", "plain", "--samples", 2).status == 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["ssd look needs data"]),
        (["--data", "pets", "--out", "sheet.jpg"], ["--out sheet.jpg", ".png"]),
        (["--data", "pets", "--out", "/"], ["--out / cannot be written"]),
        (["--data", "pets", "--samples", "0"], ["--samples", "at least 1"]),
        (["gone.ckpt"], ["there is no file gone.ckpt"]),
        (["CHECKPOINT", "--views", "dino"], ["--views is the checkpoint's own"]),
        (["CHECKPOINT", "--masks", "BlockMasks"], ["--masks is the checkpoint's own"]),
        (["--data", "pets", "--masks", "Blocks"], ["--masks Blocks is no recipe", "BlockMasks", "ScatteredMasks"]),
        (
            ["--data", "pets", "--views", "dino_small", "--masks", "BlockMasks", "--patch", "5"],
            ["--patch 5", "global views of 32 px"],
        ),
        (["--data", "pets", "--masks", "{class_path: BlockMasks, init_args: {share: 2}}"], ["share is 2"]),
        (["--data", "pets", "--masks", "{class_path: BlockMasks, init_args: {shar: 1}}"], ["shar", "init_args"]),
    ],
)
def test_a_mistake_is_one_message(run, folder, argv, words):
    said = typed("look", *(run.last if word == "CHECKPOINT" else word for word in argv))
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err


# ---------------------------------------------------------------------- inside a network


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> str:
    """The checkpoint of an untrained iBOT with a ViT of 2 x 2 patches on digits."""
    folder = tmp_path_factory.mktemp("vit")
    fit(folder, vit(IBOT, steps=1), digits(limit=16, evaluation_limit=40), limit_val_batches=0)
    return str(last(folder))


def test_attention_is_that_of_the_network_on_held_out_pictures(transformer, tmp_path):
    words = ("look", transformer, "--show", "attention", "--out", tmp_path / "a.png", "--json", tmp_path / "a.json")
    said = typed(*words, "--samples", 3, "--size", 32)
    assert said.status == 0 and "class token in 2 heads of the last block to 4 x 4 patches" in said.out, said
    written = json.loads((tmp_path / "a.json").read_text())
    backbone = load_module(transformer)[0].evaluated_backbone
    data = digits(limit=16)
    data.prepare(DINOViews(global_size=16, local_count=2, local_size=8, evaluation_size=32))
    held_out = data.test_dataloader()[-1].dataset
    _, batch = looked_at(held_out, [0, 250, 499], data.evaluation_collate())
    assert [row["picture"] for row in written["rows"]] == [held_out.pictures.source.describe(i) for i in (0, 250, 499)]
    expected = spread(backbone.attention_map(batch["sample"]).shares)
    torch.testing.assert_close(torch.tensor([row["spread"] for row in written["rows"]]), expected, atol=0.3, rtol=0.05)
    assert Image.open(tmp_path / "a.png").width > 4 * 160


def test_components_of_one_network_are_shown_in_the_colours_of_another(transformer, tmp_path):
    pages = []
    for more in ((), ("--like", transformer)):
        said = typed("look", transformer, "--show", "pca", "--out", tmp_path / "p.png", "--samples", 4, *more)
        assert said.status == 0 and "2 x 2 patches as red, green and blue" in said.out, said
        pages.append(np.array(Image.open(tmp_path / "p.png")))
    assert np.array_equal(*pages), "its own colours are those that it would have anyway"


def test_neighbours_are_named_with_their_classes(transformer, tmp_path):
    words = ("--out", tmp_path / "n.png", "--json", tmp_path / "n.json", "--samples", 2, "--bands", 0)
    said = typed("look", transformer, "--show", "neighbours", *words)
    assert said.status == 0 and "2 pictures and their 8 nearest of 16 training pictures" in said.out, said
    (first, _) = json.loads((tmp_path / "n.json").read_text())["rows"]
    assert first["similarity"] == sorted(first["similarity"], reverse=True) and len(first["neighbours"]) == 8
    assert set(first["classes"]) <= set("0123456789") and all("digit" in name for name in first["neighbours"])


@pytest.mark.parametrize(("which", "what"), [("transformer", "patches"), ("run", "samples")])
def test_prototypes_show_what_they_score_highest_for(request, tmp_path, which, what):
    found = request.getfixturevalue(which)
    words = ("--out", tmp_path / "n.png", "--json", tmp_path / "n.json", "--samples", 3)
    said = typed("look", getattr(found, "last", found), "--show", "prototypes", *words)
    assert said.status == 0, said
    written = json.loads((tmp_path / "n.json").read_text())
    shares = [row["share"] for row in written["rows"]]
    assert written["of"] == what and shares == sorted(shares, reverse=True) and 0 < sum(shares) < 1.0001


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["CONVNET", "--show", "attention"], ["ConvNet 'resnet18' has no attention", "pca"]),
        (["CONVNET", "--show", "pca"], ["one patch for samples of 16 px", "--size"]),
        (["VIT", "--show", "pca", "--size", "20"], ["--size 20", "patches of 8 px", "16"]),
        (["VIT", "--show", "attention", "--like", "VIT"], ["--like is for the colours of pca"]),
        (["VIT", "--show", "pca", "--like", "CONVNET", "--size", "64"], ["2 x 2 patches", "8 x 8"]),
        (["VIT", "--show", "pca", "--masks", "BlockMasks"], ["--masks is for views"]),
        (["VIT", "--show", "reconstruction"], ["predicts no pixels", "MAE"]),
        (["VIT", "--size", "32"], ["--size is for what a network sees"]),
        (["--show", "pca", "--data", "Digits"], ["--show pca needs the checkpoint"]),
        (["VIT", "--show", "heads"], ["--show", "attention"]),
    ],
)
def test_a_mistake_about_the_network_is_one_message(run, transformer, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    said = typed("look", *({"CONVNET": run.last, "VIT": transformer}.get(word, word) for word in argv))
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err


# ---------------------------------------------------------------------- clips and sounds


def test_clips_are_shown_as_filmstrips(tmp_path):
    write_clip(tmp_path / "clips" / "a.mp4")
    settings = ("--views.global_size", 16, "--views.local_size", 16, "--views.global_frames", 4)
    words = ("--data", tmp_path / "clips", "--data.val_share", 0, "--views", "clip", *settings)
    said = typed("look", *words, "--out", tmp_path / "c.png", "--cell", 20, "--json", tmp_path / "c.json")
    assert said.status == 0 and "1 samples, 2 global of 4 frames of 16 px, 4 local of 8 frames" in said.out, said
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["box"][-2:] == ["start_s", "end_s"] and len(written["rows"][0]["boxes"]["local"]) == 4
    assert Image.open(tmp_path / "c.png").width >= 8 * 20
    said = typed("look", *words, "--masks", "TubeMasks")
    assert said.status == 2 and "--masks does not go with Clips" in said.err


def test_sounds_are_shown_with_the_places_of_their_views(tmp_path):
    """The windows that are told are those that the views were cut from."""
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(wav_bytes(0.5 * sine(440, 8000, 3.0)))
    settings = ("--views.noise_prob", 0, "--views.gain_db", "[0, 0]", "--views.rate_hz", 8000)
    words = ("--data", tmp_path / "sounds", "--data.val_share", 0)
    said = typed(
        "look", *words, "--views", "speech", *settings, "--out", tmp_path / "s.png", "--json", tmp_path / "s.json"
    )
    assert said.status == 0 and "1 samples, 2 global, 4 local" in said.out, said
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    data = Sound(tmp_path / "sounds", batch_size=1, num_workers=0, val_share=0)
    data.prepare(SoundViews(noise_prob=0, gain_db=(0, 0), rate_hz=8000))
    batch = next(iter(data.train_dataloader()))
    with SoundFile(data.source.open(0)) as sound:
        whole = torch.from_numpy(sound.read_at(8000))
    for view, (start, end) in enumerate(row["seconds"]["local"]):
        part = whole[round(start * 8000) : round(end * 8000)]
        torch.testing.assert_close(batch.views["local"][view, 0, : len(part)], part, atol=1e-5, rtol=0)
    assert typed("look", *words, "--out", tmp_path / "s.png").status == 0, "the recipe follows the data"
    said = typed("look", *words, "--cell", 5)
    assert said.status == 2 and "--cell does not go with Sound" in said.err
