"""Every config that is shipped can be run by the line it opens with, and is in the package."""

import inspect
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from ssd.cli import main
from ssd.configs_path import config_file, config_names, config_root
from ssd.errors import UserError
from ssd.record import import_class
from ssd.verbs.methods import methods

ROOT = Path(__file__).parents[1]


def opening(name: str) -> list[str]:
    """The words of the command in a config's first line, behind what launches it."""
    first = config_file(name).read_text().partition("\n")[0]
    assert first.startswith("# "), f"{name} opens with the command that runs it"
    words = shlex.split(first.removeprefix("# "))
    return words[words.index("ssd") + 1 :]


def leaves(settings: object, key: str = "") -> dict[str, object]:
    if not isinstance(settings, dict):
        return {key: settings}
    return {k: v for name, below in settings.items() for k, v in leaves(below, f"{key}.{name}").items()}


def found(settings: object, key: str) -> object:
    for name in key.split(".")[1:]:
        settings = settings[name]
    return settings


def test_there_is_one_config_for_each_question():
    assert {name.partition("/")[0] for name in config_names()} == {
        *("data", "method", "scale"),
        *("quickstart", "quickstart-speech", "quickstart-video", "verify"),
    }


@pytest.mark.parametrize("name", config_names())
def test_a_config_parses_with_the_line_it_opens_with_and_nothing_in_it_is_lost(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    verb, *words = opening(name)
    if verb != "fit":
        assert name.partition("-")[0] == verb, "what runs a config of a verb of ours is that verb"
        words = words if name in words else ["--config", name]
    assert name in words, "the line names the config"
    status = main(["fit", *words, "--print_config"])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    parsed, given = yaml.safe_load(said.out), yaml.safe_load(config_file(name).read_text())
    overridden = {".data.init_args.path"} if "--data.path" in words else set()
    for key, value in leaves(given).items():
        if key.endswith("class_path"):
            assert found(parsed, key).rpartition(".")[2] == value.rpartition(".")[2]
        elif key not in overridden:
            assert found(parsed, key) == value, key
    views = (parsed.get("model") or {}).get("init_args", {}).get("views")
    if isinstance(views, dict) and ".model.init_args.views.init_args.evaluation_size" not in leaves(given):
        # one that was settled for the default's views would cost minutes on smaller ones
        assert views["init_args"].get("evaluation_size") is None


def test_the_views_that_a_method_begins_with_go_by_a_name():
    """Those of an object would be what settings of the same class leave out: another size, and 224 px to evaluate at."""
    for row in methods():
        views = inspect.signature(import_class(row["class_path"])).parameters.get("views")
        assert views is None or isinstance(views.default, str), row["name"]


@pytest.mark.parametrize(
    "given", ["data/digits", "data/digits.yaml", "configs/data/digits.yaml", "configs/data/digits"]
)
def test_a_config_goes_by_its_name_or_its_path_in_the_tree(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file(given) == config_root() / "data" / "digits.yaml"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"'data/digit' is neither a file nor one of ours. Nearest: data/digits"):
        config_file("data/digit")
    with pytest.raises(UserError, match=r"method/dino_small.*quickstart"):
        config_file("zzz")


def test_the_wheel_carries_all_configs_where_the_command_looks(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*build, "--wheel-dir", str(tmp_path)], capture_output=True, text=True, check=False)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("ssd-*.whl"))) as wheel:
        names = set(wheel.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "ssd = ssd.cli:main" in wheel.read(entry).decode()
    assert {f"ssd/configs/{name}.yaml" for name in config_names()} <= names
    assert {"ssd/cli.py", "ssd/parity/values.json", "lightning_modules/base.py", "datamodules/images.py"} <= names
    assert not any(name.startswith("tests") for name in names)
