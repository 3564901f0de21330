"""`ssd embed`: features in files, whole or told to be broken, and what a stop leaves of them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.evaluation.embeddings import Folder, Identity, part_of_samples
from ssd.evaluation.outputs import output_of
from ssd.verbs.embed import check_range
from ssd.verbs.loading import load_data, load_module
from ssd.weights.fingerprint import weights_fingerprint
from tests.verbs.conftest import typed

IDENTITY = Identity(
    "w", "d", "l", samples=10, output="pooled", format="npy", dtype="float32", precision="32-true", shape=(3,), part=4
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five pictures in two classes, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(5):
        path = folder / ("dark" if number < 3 else "light") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).save(path)
    (folder / "dark" / "1.png").write_bytes(b"no picture")
    return folder


def embed(run, out, *words):
    return typed("embed", run.last, "--out", out, "--device", "cpu", *words)


def rows_of(out: Path) -> list[dict]:
    with open(out / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def features_of(out: Path) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted(out.glob("*.npy"))])


def test_features_are_those_of_the_frozen_network_in_the_order_of_the_index(run, tmp_path):
    said = embed(run, tmp_path / "out", "--part", 1000, "--json", tmp_path / "out.json")
    assert said.status == 0 and said.err == "", said.err
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["files"] == ["features-00000.npy", "features-00001.npy"] and content["broken"] == []

    module, about = load_module(run.last)
    data = load_data([], about, "embed")
    with torch.no_grad():
        expected = [module.evaluated_backbone(batch["sample"]).pooled() for batch in data.predict_dataloader()]
    features = features_of(tmp_path / "out")
    np.testing.assert_allclose(features, torch.cat(expected).numpy(), atol=1e-6)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len(features) == 1297, "all of the path, not the 96 that were trained on"
    assert [int(row["label"]) for row in rows] == data.everything.labels.tolist()
    assert rows[1000] == {
        "index": "1000", "name": data.everything.describe(1000), "label": str(data.everything.label(1000)),
        "class": data.everything.classes[data.everything.label(1000)], "file": "features-00001.npy", "row": "0", "broken": "0",
    }  # fmt: skip


def test_a_broken_sample_is_in_the_index_and_not_a_number_in_its_place(run, pictures, tmp_path):
    said = embed(run, tmp_path / "out", "--data", pictures, "--part", 2, "--data.batch_size", 1)
    assert said.status == 0, said.err
    assert "broken" in said.out and "1 samples" in said.out
    rows, features = rows_of(tmp_path / "out"), features_of(tmp_path / "out")
    assert [row["broken"] for row in rows] == ["0", "1", "0", "0", "0"]
    assert rows[1]["name"].endswith("dark/1.png") and rows[1]["class"] == "dark"
    assert np.isnan(features).any(1).tolist() == [False, True, False, False, False]


def test_a_part_of_broken_samples_alone_is_written(run, pictures, tmp_path):
    said = embed(run, tmp_path / "out", "--data", pictures, "--part", 1)
    assert said.status == 0, said.err
    assert np.isnan(np.load(tmp_path / "out" / "features-00001.npy")).all()


def test_after_a_stop_the_same_command_makes_what_is_missing(run, pictures, tmp_path, monkeypatch):
    words = ("--data", pictures, "--part", 2)
    assert embed(run, tmp_path / "whole", *words).status == 0
    write = Folder.write

    def stopped(self, number, *content):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *content)

    monkeypatch.setattr(Folder, "write", stopped)
    assert embed(run, tmp_path / "out", *words).status == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_manifest.json", "features-00000.npy"]
    monkeypatch.setattr(Folder, "write", write)
    first = (tmp_path / "out" / "features-00000.npy").stat().st_mtime_ns
    said = embed(run, tmp_path / "out", *words)
    assert said.status == 0 and "2 made, 1 were there" in said.out, said
    assert (tmp_path / "out" / "features-00000.npy").stat().st_mtime_ns == first
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name

    (tmp_path / "out" / "features-00001.npy").write_bytes(b"cut off")
    said = embed(run, tmp_path / "out", *words)
    assert "1 made, 2 were there" in said.out, "a part that is not what was written is made again"


def test_other_embeddings_are_not_mixed_in(run, pictures, tmp_path):
    words = ("--data", pictures, "--part", 2)
    assert embed(run, tmp_path / "out", *words).status == 0
    said = embed(run, tmp_path / "out", *words, "--output", "last2_stages", "--dtype", "float16")
    assert said.status == 2
    assert "output is pooled there and last2_stages here; dtype is float32 there and float16 here" in said.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    said = embed(run, tmp_path / "full", *words)
    assert said.status == 2 and "holds other files and no embeddings" in said.err


def test_parquet_has_the_index_as_columns_and_null_where_a_sample_is_broken(run, pictures, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    words = ("--data", pictures, "--part", 3)
    said = embed(run, tmp_path / "out", *words, "--format", "parquet", "--dtype", "float16")
    assert said.status == 0, said.err
    assert embed(run, tmp_path / "npy", *words).status == 0
    table = parquet.read_table(tmp_path / "out").to_pydict()
    assert table["index"] == list(range(5))
    assert table["class"] == ["dark", "dark", "dark", "light", "light"]
    assert table["broken"] == [False, True, False, False, False]
    expected = features_of(tmp_path / "npy")
    assert table["features"][1] is None
    np.testing.assert_allclose(np.array(table["features"][4]), expected[4], rtol=2e-3)


def test_parquet_without_pyarrow_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    said = embed(run, tmp_path / "out", "--format", "parquet")
    assert said.status == 2 and "pip install 'ssd[hub]'" in said.err
    assert not (tmp_path / "out").exists()


def test_outputs_are_what_their_names_say():
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments={"embed_dim": 8, "depth": 2, "num_heads": 2}).eval()
    samples = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = backbone(samples, taps=(1,))
        found = {
            name: output_of(backbone, samples, name)
            for name in ("pooled", "cls", "mean_patch", "cls+mean_patch", "last2_cls", "patches")
        }
        before = backbone.model.norm(tokens.taps["block1"])[:, 0]
    expected = {
        "pooled": tokens.cls,
        "cls": tokens.cls,
        "mean_patch": tokens.patches.mean(1),
        "cls+mean_patch": torch.cat([tokens.cls, tokens.patches.mean(1)], dim=1),
        "last2_cls": torch.cat([before, tokens.cls], dim=1),
        "patches": tokens.patches,
    }
    for name, features in expected.items():
        assert_close(found[name], features, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(UserError, match=r"no output 'cls_token'. Choose one of pooled, cls, mean_patch"):
        output_of(backbone, samples, "cls_token")


def test_the_hash_of_weights_follows_every_number_and_name():
    one, other = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    assert weights_fingerprint(one.state_dict()) == weights_fingerprint(other.state_dict())
    other.running_mean[0] = 1e-3
    assert weights_fingerprint(one.state_dict()) != weights_fingerprint(other.state_dict()), "buffers count"


def test_parts_are_smaller_where_embeddings_are_larger():
    assert part_of_samples((384,), "float32") == 10_000
    assert part_of_samples((196, 768), "float32") == 2**28 // (196 * 768 * 4)
    assert part_of_samples((196, 768), "float16") == 2**28 // (196 * 768 * 2)


def test_a_manifest_that_is_none_is_refused(tmp_path):
    (tmp_path / "_manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"is not what ssd embed writes"):
        Folder(tmp_path, IDENTITY)


def test_features_that_a_type_cannot_hold_are_refused():
    check_range(np.array([1e5], np.float32), "float32")
    check_range(np.array([np.nan], np.float32), "float16")
    with pytest.raises(UserError, match=r"float16 holds numbers up to 65504, and a feature is 100000. Use float32"):
        check_range(np.array([1e5], np.float32), "float16")


def test_a_network_that_timm_publishes_needs_data(tmp_path, monkeypatch):
    import ssd.verbs.networks

    monkeypatch.setattr(ssd.verbs.networks, "adapter", lambda name, kwargs, weights: torch.nn.Identity())
    said = typed("embed", "timm:resnet18.a1_in1k", "--out", tmp_path / "out")
    assert said.status == 2 and "ssd embed needs --data" in said.err
