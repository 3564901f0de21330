"""`ssd probe`: one look at frozen features, beside pixels and the untrained network."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd.evaluation.suite import evaluate
from ssd.verbs.loading import load_data, load_module
from ssd.verbs.probe import features_of
from tests.verbs.conftest import typed

ON_CPU = ("--device", "cpu", "--cache", "none")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Colour pictures of two kinds, which a grey network is to look at, in class folders and without."""
    rng = np.random.default_rng(0)
    for kind, low in (("dark", 0), ("light", 128)):
        for folder in (tmp_path / "classes" / kind, tmp_path / "plain"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(10):
            picture = Image.fromarray(rng.integers(low, low + 128, (12, 12, 3), dtype=np.uint8))
            picture.save(tmp_path / "classes" / kind / f"{number}.png")
            picture.save(tmp_path / "plain" / f"{kind}{number}.png")
    return tmp_path


def test_the_numbers_are_those_of_the_frozen_features(run, tmp_path):
    file = tmp_path / "probe.json"
    said = typed("probe", run.last, "--measures", "knn", "ridge", "spectrum", "--json", file, *ON_CPU)
    assert said.status == 0 and said.err == "", said.err
    assert said.out.startswith(f"features: made\n{run.last}: 96 training, 500 test samples, output pooled\n")
    content = json.loads(file.read_text())

    module, about = load_module(run.last)
    data = load_data([], about, "probe")
    bank, queries = features_of(module.evaluated_backbone, data, ["knn"], "pretrained", device="cpu")
    expected = evaluate(
        bank.features, bank.labels, queries.features, queries.labels, measures=["knn", "ridge", "spectrum"]
    )
    assert content == {"file": run.last, "output": "pooled", "numbers": [vars(number) for number in expected]}
    assert all(number.protocol in said.out for number in expected)


def test_probe_and_online_evaluation_agree(run, tmp_path):
    """The centred k-NN of k 20 and ridge regression on the same samples are one number, wherever they are asked."""
    file = tmp_path / "probe.json"
    assert typed("probe", run.last, "--measures", "knn", "ridge", "--json", file, *ON_CPU).status == 0
    probed = {number["name"]: number for number in json.loads(file.read_text())["numbers"]}
    online = {number["name"]: number for number in run.numbers["numbers"]}
    for there, here in (("knn_centred/k20/top1", "knn/top1"), ("ridge/top1", "linear/top1")):
        assert probed[there]["protocol"] == online[here]["protocol"]
        assert probed[there]["value"] == pytest.approx(
            online[here]["value"], abs=0.004
        )  # two of 500, batched otherwise


def test_samples_of_another_data_set_are_told_from_the_test_set(run, pictures, tmp_path):
    file = tmp_path / "probe.json"
    asked = ("--measures", "ood", "--others", pictures / "plain", "--json", file)
    said = typed("probe", run.last, *asked, *ON_CPU)
    assert said.status == 0, said.err
    numbers = {number["name"]: number for number in json.loads(file.read_text())["numbers"]}
    assert set(numbers) == {f"ood_{way}/{what}" for way in ("knn", "mahalanobis") for what in ("auroc", "fpr95")}
    assert all("out: plain" in number["protocol"] for number in numbers.values())
    # noise is nothing like digits
    assert numbers["ood_mahalanobis/auroc"]["value"] > 0.95
    said = typed("probe", run.last, "--measures", "knn", "--others", pictures / "plain", *ON_CPU)
    assert said.status == 2 and "--measures ood" in said.err


def test_features_are_read_again_only_of_the_same_network_data_and_precision(run, tmp_path):
    def say(*more):
        said = typed("probe", run.last, "--measures", "knn", "--cache", tmp_path / "kept", *ON_CPU[:2], *more)
        assert said.status == 0, said.err
        first, table = said.out.split("\n", 1)
        return first.split(",")[0].removeprefix("features: "), table

    made, read = say(), say()
    assert made[0] == "made" and read == ("read", made[1])
    for other in (("--precision", "bf16-mixed"), ("--dtype", "float16"), ("--data.limit", "60")):
        assert say(*other)[0] == "made"
    assert say() == read


def test_a_picture_that_changed_under_its_name_is_looked_at_again(run, pictures, tmp_path):
    words = ("probe", run.last, "--data", pictures / "classes", "--data.val_share=0.5", "--measures", "spectrum")
    words = (*words, "--cache", tmp_path / "kept", "--device", "cpu")
    assert [typed(*words).out.split(",")[0] for _ in range(2)] == ["features: made", "features: read"]
    for file in (pictures / "classes").glob("*/*.png"):
        Image.new("RGB", (12, 12), (9, 200, 3)).save(file)
    assert typed(*words).out.startswith("features: made")


def test_the_best_output_is_named_and_any_output_can_be_asked(run, tmp_path):
    file = tmp_path / "probe.json"
    said = typed("probe", run.last, "--measures", "outputs", "ridge", "--output", "best", "--json", file, *ON_CPU)
    assert said.status == 0, said.err
    content = json.loads(file.read_text())
    for probe in ("knn", "linear"):
        held_out = content["outputs"][probe]["held_out"]
        assert list(held_out) == ["pooled", "last2_stages", "last4_stages"]
        assert held_out[content["outputs"][probe]["best"]] == max(held_out.values())
    numbers = {number["name"]: number for number in content["numbers"]}
    best = content["outputs"]["linear"]["best"]
    assert content["output"] == best and best in numbers["linear_grid/top1"]["protocol"]
    assert numbers["ridge/top1"]["low"] < numbers["ridge/top1"]["value"] < numbers["ridge/top1"]["high"]
    typed("probe", run.last, "--measures", "ridge", "--output", best, "--json", file, *ON_CPU)
    assert json.loads(file.read_text())["numbers"] == [numbers["ridge/top1"]]


@pytest.mark.slow
def test_an_exported_folder_is_probed_like_its_checkpoint(run, tmp_path):
    export = tmp_path / "export"
    assert typed("export", run.last, "--to", "timm", "--out", export).status == 0
    numbers = []
    for network in (run.last, export):
        file = tmp_path / "probe.json"
        words = ("--data", "Digits", "--data.limit", 96, "--measures", "knn", "--json", file, *ON_CPU)
        said = typed("probe", network, *words)
        assert said.status == 0, said.err
        numbers.append([number["value"] for number in json.loads(file.read_text())["numbers"]])
    assert numbers[0] == pytest.approx(numbers[1], abs=0.005)  # two of 500, by rounding


def test_lidar_is_of_the_views_of_the_run(run, tmp_path):
    said = typed("probe", run.last, "--measures", "lidar", *ON_CPU)
    assert said.status == 0 and "lidar-v1 10 global views of 96 training samples" in said.out, said.err


def test_other_data_is_looked_at_as_the_checkpoint_looks(run, pictures):
    """Grey like the digits it learned from, with their mean, and with nothing of their settings."""
    _, about = load_module(run.last)
    data = load_data(["--data", str(pictures / "classes"), "--data.val_share", "0.5"], about, "probe")
    assert (data.channels, data.limit, data.classes) == (1, None, ["dark", "light"])
    assert (data.mean, data.std) == (about["mean"], about["std"])
    assert data.views.evaluation_size == 16
    picture = next(iter(data.test_dataloader()[0]))["sample"]
    assert picture.shape[1:] == (1, 16, 16)


def test_the_choice_of_data_may_come_before_the_file(run, pictures):
    said = typed(
        "probe", "--data", pictures / "classes", run.last, "--measures", "knn", "--data.val_share=0.5", *ON_CPU
    )
    assert said.status == 0, said.err
    assert "10 training, 10 test samples" in said.out


def test_baselines_stand_beside_on_the_same_draws(run, tmp_path):
    file = tmp_path / "probe.json"
    said = typed(
        "probe", run.last, "--measures", "knn", "--baselines", "--draws", 2, "--data.limit", 60, "--json", file, *ON_CPU
    )
    assert said.status == 0, said.err
    rows = json.loads(file.read_text())["baselines"]
    assert list(rows) == ["pixels", "untrained", "pretrained"]
    columns = ["knn", "linear", "linear_1pct", "linear_10pct"]
    for name, row in rows.items():
        assert list(row) == columns and name in said.out
        assert all(0 <= row[column]["value"] <= 1 for column in columns)
    assert rows["pixels"] != rows["pretrained"]
    assert len({str([row[column]["protocol"] for column in columns]) for row in rows.values()}) == 1


def test_data_without_labels_has_a_spectrum_and_no_more(run, pictures):
    said = typed("probe", run.last, "--data", pictures / "plain", *ON_CPU)
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1
    assert "no labels" in said.err and "--measures spectrum" in said.err
    said = typed("probe", run.last, "--data", pictures / "plain", "--measures", "spectrum", *ON_CPU)
    assert said.status == 0 and "20 samples" in said.out and "spectrum/rankme" in said.out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.normalize", "imagenet"], ["--data.normalize is the checkpoint's own"]),
        (["--data.channels=3"], ["--data.channels is the checkpoint's own"]),
        (["--data.bach_size", "3"], ["'bach_size' is not a setting of data", "batch_size"]),
        (["--data", "nowhere"], ["--data nowhere", "path that exists"]),
        (["--config", "method/dino_small"], ["model"]),
        (["--draws", "0"], ["--draws", "at least 1"]),
        (["--device", "tpv"], ["--device tpv cannot be used here"]),
        (["--json", "/"], ["--json / cannot be written"]),
        (["--output", "cls", "--cache", "none"], ["--output cls", "pooled, last2_stages, last4_stages, or best"]),
        (["--cache", "/dev/null/here"], ["--cache /dev/null/here", "or none"]),
        (["--dtype", "int8"], ["--dtype", "float32", "float16"]),
    ],
)
def test_a_mistake_is_one_message(run, more, words):
    said = typed("probe", run.last, *more)
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err


def test_the_dense_score_stands_beside_those_of_pixels_and_the_untrained_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit = (
        "{name: vit_tiny_patch16_224, img_size: 16, arguments: {patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}}"
    )
    Path("run.yaml").write_text(
        f"""
model:
  class_path: DINO
  init_args:
    backbone: {{class_path: ViT, init_args: {vit}}}
    views: {{class_path: DINOViews, init_args: {{global_size: 16, local_count: 0}}}}
    num_prototypes: 8
    head_hidden_dim: 8
    head_bottleneck_dim: 4
trainer: {{max_epochs: 1, limit_train_batches: 2, accelerator: cpu, enable_progress_bar: false}}
"""
    )
    limits = ("--data", "Digits", "--data.evaluation_limit", "96", "--data.limit", "128")
    said = typed("fit", "--config", "run.yaml", *limits, "--trainer.default_root_dir", "run", "--json", "fit.json")
    assert said.status == 0, said.err
    online = {n["name"]: n for n in json.loads(Path("fit.json").read_text())["numbers"]}["dense/correspondence"]
    assert 0 < online["chance"] < online["value"] < 1
    said = typed(
        "probe", "run/checkpoints/last.ckpt", "--measures", "dense", "--baselines", "--json", "p.json", *ON_CPU
    )
    assert said.status == 0 and "dense/correspondence" in said.out, said.err
    found = json.loads(Path("p.json").read_text())
    (number,) = found["numbers"]
    assert number["value"] == pytest.approx(online["value"], abs=0.05)
    row = {name: columns["dense"] for name, columns in found["baselines"].items()}
    assert row["pretrained"]["value"] == number["value"]
    assert row["pixels"]["value"] > row["pixels"]["chance"] == pytest.approx(number["chance"])
