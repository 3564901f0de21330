"""`ssd look`: the sheet shows the views of the run, of a checkpoint's own data or of any."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import Images
from lightning_modules.dino import DINO
from ssd.masking.recipes import RandomMasks
from ssd.views.parameters import draw
from ssd.views.recipes import RECIPES
from tests.data.files import class_folders
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
