"""`ssd methods`: every method with its paper and configs, found by looking."""

import json
from pathlib import Path

import yaml

from ssd.configs_path import config_file
from ssd.record import import_class
from tests.verbs.conftest import typed

METHOD_FILES = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "lightning_modules").glob("*.py")
    if path.stem not in ("__init__", "base")
)


def test_every_file_of_a_method_is_listed_with_its_paper_and_configs(tmp_path):
    file = tmp_path / "methods.json"
    said = typed("methods", "--json", file)
    assert said.status == 0 and said.err == ""
    rows = json.loads(file.read_text())
    assert sorted(row["class_path"].split(".")[1] for row in rows) == METHOD_FILES
    for row in rows:
        assert row["name"] in said.out
        assert row["what"] and "arXiv" in row["paper"]
        assert import_class(row["class_path"]).__name__ == row["name"]
        assert row["configs"], "a method has a config"
        for name in row["configs"]:
            assert yaml.safe_load(config_file(name).read_text())["model"]["class_path"] == row["name"]
