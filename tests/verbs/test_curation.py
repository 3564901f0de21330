"""`ssd curate` and `ssd manifest`, and runs that use what they wrote."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ssd.data.clusters import read_clusters
from ssd.data.manifest import read_manifest
from ssd.data.sources import open_source
from ssd.verbs.networks import load_network
from tests.data.files import encoded
from tests.data.media_files import wav_bytes
from tests.verbs.conftest import CONFIG, typed

ON_CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty dark pictures and eight light ones, in folders of patients; one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(48):
        low = 0 if number < 40 else 180
        (folder / f"p{number // 4:02}").mkdir(exist_ok=True)
        picture = Image.fromarray(rng.integers(low, low + 60, (12, 12), dtype=np.uint8))
        picture.save(folder / f"p{number // 4:02}" / f"{number:02}.png")
    (folder / "p03" / "13.png").write_bytes(b"words")
    return folder


def loading(folder):
    return ("--data", folder, "--data.labels", "false", "--data.max_broken_share", "0.1")


@pytest.fixture(scope="module")
def clusters(run, pictures, tmp_path_factory):
    file = tmp_path_factory.mktemp("clusters") / "c.npz"
    numbers = file.with_suffix(".json")
    said = typed("curate", run.last, *loading(pictures), "--out", file, "--clusters", "4,2", "--json", numbers, *ON_CPU)
    assert said.status == 0, said.err
    return file, said, json.loads(numbers.read_text())


def test_clusters_are_of_the_features_and_of_this_data(clusters, pictures):
    file, said, content = clusters
    found = read_clusters(file)
    source = open_source(pictures, labels=False)
    clustered = found.of(source)
    assert (clustered.leaf < 0).nonzero()[0].tolist() == [13], "the broken one"
    upper = clustered.parents[0][clustered.leaf]
    dark, light = np.delete(upper[:40], 13), upper[40:]
    assert len(set(dark)) == len(set(light)) == 1 and dark[0] != light[0]
    top = content["levels"][1]
    assert (top["clusters"], top["smallest"], top["largest"]) == (2, 8, 39)
    assert top["gini"] == pytest.approx((39 - 8) / (2 * 47))
    assert 0 < content["changed_draws"] < 1 and set(content["seconds"]) == {"features", "k-means"}
    for words in ("Gini", "1 of them broken", "left out", "--data.sampling Balanced"):
        assert words in said.out


def test_a_run_draws_from_the_clusters_and_says_what_it_leaves_out(clusters, pictures, tmp_path):
    file, _, _ = clusters
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("{max_epochs: 2", "{max_epochs: 1"))
    sampling = ("--data.sampling", "Balanced", "--data.sampling.file", file, "--data.sampling.max_repeats", "3")
    settings = ("--data.batch_size", "16", "--data.channels", "1", "--trainer.default_root_dir", tmp_path / "run")
    said = typed("fit", "--config", config, *loading(pictures), *settings, *sampling)
    assert said.status == 0, said.err
    line = next(line for line in said.out.splitlines() if line.startswith("sampling"))
    assert "Balanced: 48 draws an epoch" in line and "1 of them for want of a cluster" in line and "at most 3" in line
    assert "the order of an epoch takes" in line
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)["ssd"]
    assert kept["sampling"] in line and kept["data"]["init_args"]["sampling"]["init_args"]["file"] == str(file)
    # the checkpoint looks at data without asking for the file
    assert typed("probe", last, "--measures", "spectrum", *ON_CPU).status == 0

    other = typed(
        "fit", "--config", config, "--data", "Digits", *sampling, "--trainer.default_root_dir", tmp_path / "x"
    )
    assert other.status == 2 and str(pictures) in other.err and "digit 0 of the train split" in other.err


def test_an_exported_folder_answers_as_its_checkpoint_did(run, tmp_path):
    assert typed("export", run.last, "--out", tmp_path / "out").status == 0
    (ours, about), (theirs, known) = load_network(run.last), load_network(str(tmp_path / "out"))
    assert (known["mean"], known["std"], known["channels"]) == (about["mean"], about["std"], 1)
    assert known["views"]["init_args"]["evaluation_size"] == 16
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).pooled(), ours(x).pooled())


def test_a_network_of_timm_looks_as_timm_says(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(
        "ssd.weights.load.timm.create_model",
        lambda name, **kwargs: create(name, **{**kwargs, "pretrained": False}),
    )
    backbone, about = load_network("timm:resnet10t.c3_in1k")
    assert backbone.name == "resnet10t" and not backbone.training
    assert about["views"]["init_args"]["size"] == 176 and about["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RUN", "--out", "c.txt"), "does not end in .npz"),
        (("RUN", "--out", "c.npz", "--clusters", "10,20"), "10,20. Give numbers of at least 2 that fall"),
        (("RUN", "--out", "c.npz", "--clusters", "many"), "not a list such as 1000,100"),
        (("nowhere", "--out", "c.npz"), "there is no file nowhere"),
        (("timm:resnet5000", "--out", "c.npz"), "timm has no model named 'resnet5000'"),
        ((".", "--out", "c.npz"), "has no config.json"),
        (("RUN", "--out", "c.npz", "--clusters", "9999,7"), "9999 clusters are more than the"),
    ],
)
def test_a_mistake_is_one_message(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = typed("curate", *(run.last if word == "RUN" else word for word in words), *ON_CPU)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "c.npz").exists()


# ---------------------------------------------------------------- manifests


def test_a_manifest_lists_what_can_be_read_with_its_groups(pictures, tmp_path):
    out, numbers = tmp_path / "m.csv", tmp_path / "m.json"
    said = typed("manifest", pictures, "--out", out, "--group-by", r"(p\d\d)", "--json", numbers)
    assert said.status == 0, said.err
    content = json.loads(numbers.read_text())
    assert content["files"] == 47 and len(content["broken"]) == 1 and "13.png" in content["broken"][0]
    assert content["groups"] == 12 and content["height"] == {"least": 12, "most": 12}
    assert "13.png" in said.out and "12 classes of 3 to 4 files" in said.out
    source = open_source(out)
    assert len(source) == 47 and len(set(source.groups)) == 12 and source.classes[0] == "p00"
    again = tmp_path / "again.csv"
    assert typed("manifest", out, "--out", again).status == 0
    assert again.read_text() == out.read_text()


def test_a_list_of_sounds_with_spaces_in_their_names_is_one_of_paths(tmp_path):
    for name in ("first take.wav", "second, longer.wav"):
        (tmp_path / name).write_bytes(wav_bytes(np.zeros(300)))
    (tmp_path / "list.txt").write_text("first take.wav\nsecond, longer.wav\n")
    assert typed("manifest", tmp_path / "list.txt", "--out", tmp_path / "m.csv").status == 0
    assert read_manifest(tmp_path / "m.csv").names == ["first take.wav", "second, longer.wav"]


def test_a_name_that_is_no_text_is_left_out_and_said(tmp_path):
    for name in (b"a.png", b"p\xff.png"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(encoded(np.zeros((4, 5, 3), np.uint8)))
    said = typed("manifest", tmp_path, "--out", tmp_path / "m.csv")
    assert said.status == 0 and "p\\udcff.png' (its name is not UTF-8)" in said.out
    assert read_manifest(tmp_path / "m.csv").names == ["a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "--out", "m.csv"), "no folder or list 'nowhere'"),
        (("PICTURES", "--out", "m.xls"), "does not end in .csv"),
        (("PICTURES", "--out", "m.csv", "--group-by", "("), "not a regular expression"),
        (("PICTURES", "--out", "file/m.csv"), "--out file/m.csv cannot be written"),
        (("PICTURES", "--out", "m.csv", "--group-by", "4"), "fits none of the 48"),
        ((".", "--out", "m.csv"), "holds no files"),
    ],
)
def test_a_mistaken_manifest_is_one_message(pictures, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    said = typed("manifest", *(pictures if word == "PICTURES" else word for word in words))
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said.err
