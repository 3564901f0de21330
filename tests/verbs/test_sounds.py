"""What our verbs make of a run on sounds: the same numbers beside log-mel statistics, or one clear sentence."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssd.batch import network_input
from ssd.configs_path import config_file
from ssd.data.tones import write_tones
from ssd.verbs.loading import load_data
from ssd.verbs.starts import load_start
from tests.verbs.conftest import Run, typed

ON_CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Run:
    """Four steps on made tones, by the shipped recipe with a small network."""
    folder = tmp_path_factory.mktemp("sounds")
    tones = write_tones(folder / "tones", each=6)
    config = yaml.safe_load(config_file("method/dinosr_small").read_text())
    config["model"]["init_args"]["backbone"]["init_args"] |= {"embed_dim": 32, "depth": 2, "num_heads": 2}
    config["model"]["init_args"] |= {"num_codes": 8, "steps": 4}
    del config["trainer"]
    given, numbers = folder / "given.yaml", folder / "numbers.json"
    given.write_text(yaml.safe_dump(config))
    said = typed(
        *("fit", "--config", given, "--data", tones, "--data.batch_size", 16, "--data.num_workers", 0),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", folder / "run", "--json", numbers),
        *("--trainer.log_every_n_steps", 1),
    )
    assert said.status == 0, said.err
    return Run(folder / "run", said, json.loads(numbers.read_text()))


def test_a_folder_of_sounds_is_pretrained_on_and_evaluated_while_it_runs(sounds):
    log = next(sounds.folder.glob("csv/version_*/metrics.csv")).read_text()
    assert "train/codebooks/perplexity" in log and "train/codebooks/block2_used" in log
    assert "knn/top1" in sounds.said.out and "linear/top1" in sounds.said.out


def test_probes_stand_beside_log_mel_statistics(sounds, tmp_path):
    said = typed(
        *("probe", sounds.last, "--baselines", "--draws", 2, "--cache", "none", "--json", tmp_path / "p.json"), *ON_CPU
    )
    assert said.status == 0, said.err
    rows = json.loads((tmp_path / "p.json").read_text())["baselines"]
    assert list(rows) == ["log-mel", "untrained", "pretrained"]
    assert all(0 <= row["knn"]["value"] <= 1 for row in rows.values())


def test_single_frames_are_probed_beside_log_mel_windows(sounds, tmp_path):
    words = ("--measures", "frames", "--baselines", "--draws", 2, "--cache", "none", "--json", tmp_path / "p.json")
    said = typed("probe", sounds.last, *words, *ON_CPU)
    assert said.status == 0, said.err
    content = json.loads((tmp_path / "p.json").read_text())
    assert [number["name"] for number in content["numbers"]] == ["frames/top1", "frames/added_top1"]
    frames = {name: row["frames"]["value"] for name, row in content["baselines"].items()}
    assert frames["pretrained"] == content["numbers"][0]["value"] and len(set(frames.values())) == 3


def test_the_export_embeds_what_the_checkpoint_does(sounds, tmp_path):
    """Sounds of several lengths, each pooled over what is no padding."""
    assert typed("export", sounds.last, "--out", tmp_path / "export").status == 0
    found = []
    for number, network in enumerate((sounds.last, tmp_path / "export")):
        data = () if number == 0 else ("--data", sounds.folder.parent / "tones")
        said = typed("embed", network, *data, "--out", tmp_path / f"e{number}", *ON_CPU)
        assert said.status == 0, said.err
        found.append(np.concatenate([np.load(file) for file in sorted((tmp_path / f"e{number}").glob("*.npy"))]))
    assert found[0].shape == (72, 32)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_a_sheet_shows_what_masks_hide(sounds, tmp_path):
    said = typed("look", sounds.last, "--samples", 2, "--out", tmp_path / "sheet.png")
    assert said.status == 0, said.err
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    veiled = (abs(picture - 128).max(-1) < 40).mean()
    assert veiled > 0.1, "a third of the sheet is hidden moments"


def test_a_plan_and_a_report_of_sounds(sounds, tmp_path):
    assert typed("report", sounds.folder, "--out", tmp_path / "page.html").status == 0
    assert "DinoSR" in (tmp_path / "page.html").read_text()
    said = typed("doctor", sounds.folder)
    assert said.status == 0, said.err


def test_what_is_for_pictures_alone_says_so(sounds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (("--show", "attention"), "is for pictures"),
        (("--show", "pca", "--size", 8), "--size does not go"),
    ):
        said = typed("look", sounds.last, *words)
        assert said.status == 2 and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("what", ["pca", "neighbours"])
def test_what_the_network_hears_is_shown_over_spectrograms(sounds, what, tmp_path):
    said = typed(
        "look", sounds.last, "--show", what, "--samples", 3, "--out", tmp_path / "s.png", "--json", tmp_path / "s.json"
    )
    assert said.status == 0 and "3 sounds" in said.out, said.err
    assert len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 3
    assert Image.open(tmp_path / "s.png").width > (512 if what == "pca" else 8 * 80)


def test_a_run_logs_pictures_of_views_components_and_neighbours(sounds):
    events = EventAccumulator(str(next(sounds.folder.glob("tensorboard*"))), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["pictures/views", "pictures/components", "pictures/neighbours"]


def test_fine_tuned_on_labels_and_loaded_with_its_head(sounds, tmp_path):
    words = ("--shares", 0.5, "--seeds", 1, "--epochs", 2, "--baseline", "--json", tmp_path / "f.json", *ON_CPU)
    said = typed("finetune", sounds.last, *words, "--out", tmp_path / "out")
    assert said.status == 0, said.err
    content = json.loads((tmp_path / "f.json").read_text())
    assert [row["start"] for row in content["rows"]] == ["pretrained", "random"] and content["classes"] == 12
    scope: dict = {}
    exec("\n".join(content["model"]["lines"]), scope)
    model = scope["model"].eval()
    data = load_data([], load_start(sounds.last).about, "finetune")
    with torch.no_grad():
        answers = torch.cat([model(network_input(batch)).argmax(1) for batch in data.test_dataloader()[-1]])
    stored = json.loads((tmp_path / "out" / "runs" / "pretrained-50pct-seed0.json").read_text())["predictions"]
    assert (answers != torch.tensor(stored)).sum() <= 1, "but for ties: batches are of another size"
    assert load_start(str(tmp_path / "out" / "model")).weights is not None, "a start again, without its head"
    again = typed("finetune", sounds.last, *words, "--out", tmp_path / "out")
    assert again.status == 0 and again.err == "", "nothing was trained again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--flip", "0.5", "--crop", "0.5"), "--crop, --flip: sounds have no such thing"),
        (("--mixup", "0.8"), "mix pictures, and these are sounds"),
        (("--drop-path", "0.1"), "has no blocks that it skips"),
    ],
)
def test_settings_that_sounds_do_not_have_are_refused(sounds, words, message):
    said = typed("finetune", sounds.last, *words, *ON_CPU)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said.err


def test_compared_with_random_weights_and_log_mel_statistics(sounds, tmp_path):
    words = ("--draws", 2, "--seeds", 1, "--json", tmp_path / "c.json", *ON_CPU)
    said = typed("compare", sounds.last, "random", "log-mel", *words)
    assert said.status == 0, said.err
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert list(rows) == [str(sounds.last), "random", "log-mel"]
    assert all(0 <= cell["value"] <= 1 for row in rows.values() for cell in row.values())
    said = typed("compare", sounds.last, "pixels", *words)
    assert said.status == 2 and "'pixels' is not what Sound has. Use log-mel" in said.err


def test_tones_are_the_same_for_the_same_seed_and_tell_their_class_by_order(tmp_path):
    first, second = (write_tones(tmp_path / name, each=1) for name in ("a", "b"))
    files = sorted(file.relative_to(first) for file in first.rglob("*.wav"))
    assert len(files) == 12 and all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    assert {file.parent.name for file in files} >= {"low-high", "high-low"}


def test_the_quickstart_refuses_words_it_does_not_know(tmp_path):
    said = typed("quickstart", "--out", tmp_path / "out", "--model.lr", "1")
    assert said.status == 2 and "--model.lr is not an option" in said.err
