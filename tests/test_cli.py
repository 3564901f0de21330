"""The command as it is typed: what it makes of the words, and what it says to each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_modules.base import SelfDistillation
from ssd.backbones.base import Backbone
from ssd.cli import LIGHTNING_VERBS, OWN_VERBS, main, user_error, warnings_for_people, without_worker
from ssd.errors import UserError
from ssd.verbs.arguments import expand, run_of, split_data

TINY = """
model:
  class_path: DINO
  init_args:
    backbone: {class_path: ViT, init_args: {name: vit_tiny_patch16_224, arguments: {depth: 1, embed_dim: 12, num_heads: 1}}}
    views: {class_path: DINOViews, init_args: {global_size: 16, local_count: 0}}
    num_prototypes: 8
    head_hidden_dim: 8
    head_bottleneck_dim: 4
trainer: {max_epochs: 1, accelerator: cpu}
"""


class SeesPart(SelfDistillation):
    """A method, such as a masked autoencoder, whose student encodes the visible patches alone."""

    def __init__(self, backbone: Backbone, **engine):
        super().__init__(**engine)
        backbone.require("visible", by="SeesPart")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        Path("pets", kind).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(f"pets/{kind}/{number}.png")
    return tmp_path


@pytest.fixture
def refusal(capsys):
    """Runs a command that has to be refused, and gives what it said."""

    def run(command: str | list[str]) -> str:
        argv = command.split() if isinstance(command, str) else command
        assert main(argv) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, "one message is one line"
        assert said.err.startswith(f"ssd {argv[0]}: error: ")
        assert not list(Path().glob("runs/*")), "nothing of a run is left"
        return said.err

    return run


@pytest.fixture
def settings(capsys):
    """What a command line comes to, as `--print_config` says."""

    def run(command: str) -> dict:
        assert main([*command.split(), "--print_config"]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return yaml.safe_load(said.out)

    return run


# ---------------------------------------------------------------------- what is typed


def test_the_command_alone_lists_verbs_and_configs_and_loads_no_torch():
    script = (
        "import sys; from ssd.cli import main; status = main([]); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    for word in ("fit", "validate", "probe", "export", "method/dino_small", "data/digits", "quickstart"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "verb",
    [
        *(*LIGHTNING_VERBS, *sorted(OWN_VERBS.keys() - {"bench"})),
        *("bench data", "bench step", "bench masked", "bench evaluation"),
    ],
)
def test_every_verb_explains_itself(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith(f"usage: ssd {verb}") and "--json" in said.out


def test_null_is_nothing_however_deep_the_setting_lies(settings):
    """And not a file or a name that is spelled None."""
    typed = "--model.backbone.weights pets/w.pt --model.backbone.weights null --model.clip=null"
    model = settings(f"fit --config tiny.yaml --data pets {typed}")["model"]["init_args"]
    assert model["clip"] is None and model["backbone"]["init_args"]["weights"] is None


def test_a_folder_is_data_of_pictures_with_their_own_defaults(settings):
    """Not with those of digits, which are grey and small."""
    data = settings("fit --config tiny.yaml --data pets")["data"]
    assert data["class_path"] == "datamodules.images.Images"
    assert data["init_args"]["path"] == os.path.abspath("pets")
    assert (data["init_args"]["channels"], data["init_args"]["batch_size"]) == (3, 64)


@pytest.mark.parametrize(("name", "kind"), [("1.mp4", "datamodules.clips.Clips"), ("1.wav", "datamodules.sound.Sound")])
def test_a_folder_of_clips_or_sounds_is_taken_as_such(settings, name, kind):
    Path("media").mkdir()
    Path("media", name).write_bytes(b"anything")
    data = settings("fit --config tiny.yaml --data media")["data"]
    assert data["class_path"] == kind and data["init_args"]["path"] == os.path.abspath("media")


def test_a_method_for_pictures_says_so_of_clips(refusal):
    Path("media").mkdir()
    for number in range(2):
        Path("media", f"{number}.mp4").write_bytes(b"anything")
    said = refusal("fit --config tiny.yaml --data media")
    assert "Clips makes views by ClipViews, and the method's are DINOViews" in said


def test_verbs_for_pictures_say_so_of_clips(refusal):
    Path("media").mkdir()
    Path("media", "1.mp4").write_bytes(b"anything")
    assert "ssd check-data is for pictures, and the data is Clips" in refusal("check-data --data media")


@pytest.mark.parametrize(("views", "name"), [("clip", "ClipViews"), ("speech", "SoundViews")])
def test_a_network_for_pictures_says_so_of_other_views(refusal, views, name):
    said = refusal(f"fit --config tiny.yaml --model.views {views} --data Digits")
    assert f"the views are {name} and" in said and "takes pictures" in said


@pytest.mark.parametrize("typed", ["--data pets --data.batch_size 5", "--data.batch_size 5 --data=pets"])
def test_settings_of_data_hold_before_and_after_its_choice(settings, typed):
    data = settings(f"fit --config tiny.yaml {typed}")["data"]["init_args"]
    assert data["path"] == os.path.abspath("pets") and data["batch_size"] == 5


def test_data_that_is_chosen_brings_nothing_of_the_data_in_configs(settings):
    data = settings("fit --config tiny.yaml --config data/cifar10 --data pets")["data"]["init_args"]
    assert data["val_path"] is None and data["batch_size"] == 64


def test_what_a_machine_says_of_data_holds_for_any_data(settings):
    config = settings("fit --config tiny.yaml --config scale/ten_nodes --data pets")
    assert config["data"]["init_args"]["path"] == os.path.abspath("pets")
    assert config["data"]["init_args"]["batch_size"] == 51
    assert config["trainer"]["num_nodes"] == 10


def test_data_by_class_and_by_config(settings):
    Path("mine.yaml").write_text("data: {class_path: Digits, init_args: {limit: 7}}")
    assert settings("fit --config tiny.yaml --data Digits")["data"]["init_args"]["limit"] is None
    assert settings("fit --config tiny.yaml --data mine.yaml")["data"]["init_args"]["limit"] == 7
    imagenet = settings("fit --config tiny.yaml --data data/imagenet")["data"]["init_args"]
    assert imagenet["path"] == "data/imagenet/train" and imagenet["normalize"] == "imagenet"


def test_later_configs_count_and_short_options_work(settings):
    Path("longer.yaml").write_text("trainer: {max_epochs: 7}")
    config = settings("fit -c tiny.yaml -c longer.yaml --data Digits --seed_everything 3")
    assert config["trainer"]["max_epochs"] == 7 and config["seed_everything"] == 3
    assert config["model"]["init_args"]["num_prototypes"] == 8


def test_configs_are_found_by_name_from_any_folder(settings):
    for name in ("method/dino_small", "configs/method/dino_small.yaml"):
        assert settings(f"fit --config {name} --data Digits")["model"]["class_path"] == "lightning_modules.dino.DINO"


def test_a_file_beside_the_user_comes_before_a_config_of_ours(settings):
    Path("method").mkdir()
    Path("method/dino_small").write_text(TINY)
    model = settings("fit --config method/dino_small --data Digits")["model"]
    assert model["init_args"]["num_prototypes"] == 8


def test_words_are_told_apart():
    argv = ["--data", "pets", "FILE", "--json", "out", "--data.limit=3", "--config=c", "--baselines"]
    own, data = split_data(argv)
    assert own == ["FILE", "--json", "out", "--baselines"]
    assert data == ["--data", "pets", "--data.limit=3", "--config=c"]


def test_what_is_stored_comes_first_and_gives_way_to_chosen_data():
    stored = {"model": {"class_path": "DINO"}, "data": {"class_path": "Digits"}}
    first, text, *rest = expand(["--data.limit", "3"], stored)
    assert first == "--config" and yaml.safe_load(text) == stored and rest == ["--data.limit", "3"]
    _, text, *rest = expand(["--data", "Digits"], stored)
    assert yaml.safe_load(text) == {"model": stored["model"]} and rest == ["--data", "Digits"]


def test_a_run_is_where_its_checkpoints_are(tmp_path):
    assert run_of(tmp_path / "moved" / "checkpoints" / "last.ckpt") == tmp_path / "moved"
    assert run_of(tmp_path / "copied.ckpt") is None


# ---------------------------------------------------------------------- mistakes

MISTAKES = {
    "unknown verb": ("fitt", ["'fitt' is not a verb", "Did you mean fit?", "probe"]),
    "unknown config": ("fit --config method/dno_small", ["method/dno_small", "Nearest: method/dino_small"]),
    "nothing but the verb": ("fit", ["ssd fit needs a method and data", "--data FOLDER"]),
    "no data": ("fit --config tiny.yaml", ["ssd fit needs data", "--data FOLDER"]),
    "no method": ("fit --data Digits", ["ssd fit needs a method", "ssd methods"]),
    "no checkpoint": ("validate", ["ssd validate --ckpt_path FILE"]),
    "an option without its value": ("fit --config tiny.yaml --data", ["--data needs a value"]),
    "a word without an option": ("fit --config tiny.yaml --data pets more", ["'more' is not understood"]),
    "missing folder": ("fit --config tiny.yaml --data nowhere", ["--data nowhere", "path that exists", "Digits"]),
    "empty folder": ("fit --config tiny.yaml --data empty", ["empty", "no pictures", ".png"]),
    "missing list": ("fit --config tiny.yaml --data Images --data.path gone.txt", ["there is no", "gone.txt"]),
    "misspelled section": ("fit --config tiny.yaml --data pets --trainr.max_epochs 3", ["trainr", "Nearest: trainer"]),
    "misspelled option": ("fit --config tiny.yaml --data pets --sed_everything 3", ["Nearest: seed_everything"]),
    "misspelled setting of the trainer": (
        "fit --config tiny.yaml --data pets --trainer.max_epoch 3",
        ["trainer.max_epoch", "Nearest: trainer.max_epochs"],
    ),
    "misspelled setting of checkpoints": (
        "fit --config tiny.yaml --data pets --checkpoints.every_n_step 3",
        ["checkpoints.every_n_steps"],
    ),
    "misspelled setting of the method": (
        "fit --config tiny.yaml --data pets --model.num_protoypes 3",
        ["'num_protoypes' is not a setting of model", "num_prototypes", "--model.help"],
    ),
    "misspelled setting of the backbone": (
        "fit --config tiny.yaml --data pets --model.backbone.nmae x",
        ["'nmae' is not a setting of model.backbone", "Nearest: name"],
    ),
    "misspelled setting of the data": (
        "fit --config tiny.yaml --data pets --data.bach_size 3",
        ["'bach_size' is not a setting of data", "batch_size", "--data.help"],
    ),
    "wrong type": (
        "fit --config tiny.yaml --data pets --model.num_prototypes many",
        ["model.num_prototypes: 'many' was given, expected a whole number"],
    ),
    "wrong type deep inside": (
        "fit --config tiny.yaml --data pets --model.backbone.drop_path_rate high",
        ["model.backbone.drop_path_rate: 'high' was given, expected a number"],
    ),
    "wrong type of the trainer": (
        "fit --config tiny.yaml --data pets --trainer.max_epochs long",
        ["trainer.max_epochs: 'long' was given, expected a whole number or null"],
    ),
    "neither number nor schedule": (
        "fit --config tiny.yaml --data pets --model.lr fast",
        ["model.lr: 'fast' was given", "a number or one of Cosine, Exponential, Linear, TriStage"],
    ),
    "not among the choices": (
        "fit --config tiny.yaml --data pets --trainer.precision 17",
        ["trainer.precision: '17'", "one of 64, 32, 16", "bf16-mixed"],
    ),
    "unknown class": (
        "fit --config tiny.yaml --data pets --model.backbone Vit",
        [
            "model.backbone: 'Vit' was given, expected one of ConvNet, LogMelEncoder, MelConvNet, RotaryViT, SpeechEncoder, ViT"
        ],
    ),
    "unknown method": ("fit --config tiny.yaml --data pets --model DONO", ["model: 'DONO' was given", "DINO"]),
    "unknown backbone": (
        "fit --config tiny.yaml --data pets --model.backbone.name vit_tinny_patch16_224",
        ["vit_tinny_patch16_224", "Nearest: vit_tiny_patch16_224"],
    ),
    "unknown recipe": ("fit --config tiny.yaml --data pets --model.views dinno", ["dinno", "dino_small"]),
    "an image size that the patch does not divide": (
        "fit --config tiny.yaml --data pets --model.backbone.img_size 100",
        ["img_size 100", "16 px", "multiple"],
    ),
    "a view size that the patch does not divide": (
        "fit --config tiny.yaml --data pets --model.views.global_size 30",
        ["global views of 30 px", "patches of 16 px", "16 or 32"],
    ),
    "no prototypes": ("fit --config tiny.yaml --data pets --model.num_prototypes 0", ["num_prototypes: 0", "positive"]),
    "visible patches of a convnet": (
        "fit --model tests.test_cli.SeesPart --model.backbone ConvNet --model.backbone.name resnet18 --data Digits",
        ["SeesPart needs a backbone that can encode only the visible patches", "ConvNet 'resnet18' cannot", "ViT"],
    ),
    "a batch larger than the data": ("fit --config tiny.yaml --data pets", ["batch_size"]),
    "clipping of the trainer": (
        "fit --config tiny.yaml --data Digits --trainer.gradient_clip_val 1",
        ["trainer.gradient_clip_val: 1", "would be ignored", "clip"],
    ),
    "accumulation of the trainer": (
        "fit --config tiny.yaml --data Digits --trainer.accumulate_grad_batches 2",
        ["accumulate_grad_batches: 2 would be ignored", "micro_batches"],
    ),
    "steps of the trainer": (
        "fit --config tiny.yaml --data Digits --trainer.max_steps 5",
        ["trainer.max_steps: 5 would be ignored", "steps"],
    ),
    "a sampler of the trainer": (
        "fit --config tiny.yaml --data Digits --trainer.overfit_batches 1",
        ["trainer.overfit_batches: 1", "data.limit"],
    ),
    "no checkpoints": (
        "fit --config tiny.yaml --data Digits --trainer.enable_checkpointing false",
        ["trainer.enable_checkpointing: false", "checkpoints.every_n_steps: 0"],
    ),
    "bare bones": ("fit --config tiny.yaml --data Digits --trainer.barebones true", ["trainer.barebones"]),
    "no such device": ("fit --config tiny.yaml --data Digits --trainer.devices 0", ["devices", "--help"]),
    "a folder for a file of numbers": ("fit --config tiny.yaml --data Digits --json pets", ["--json pets"]),
    "a file for a folder of the run": (
        "fit --config tiny.yaml --data Digits --trainer.default_root_dir tiny.yaml/run",
        ["tiny.yaml/run", "another path"],
    ),
    "a checkpoint that is not there": ("validate --ckpt_path gone.ckpt", ["there is no file gone.ckpt"]),
    "going on from nothing": ("fit --ckpt_path gone.ckpt", ["there is no file gone.ckpt"]),
    "a probe of nothing": ("probe gone.ckpt", ["there is no file gone.ckpt"]),
    "a probe without a file": ("probe", ["FILE", "ssd probe --help"]),
    "an unknown measure": ("probe FILE --measures knnn", ["knnn", "spectrum"]),
    "an unknown device": ("probe FILE --device tpv", ["--device tpv", "cpu"]),
    "an unknown format": ("export FILE --to torchvison --out x", ["torchvison", "timm", "safetensors"]),
    "an export to nowhere": ("export FILE", ["--out"]),
    "nothing to verify": ("verify", ["resume"]),
    "a kill after the end": ("verify resume --kills 30", ["--kills [30]", "1 to 29"]),
    "fewer workers than none": ("verify resume --workers -1", ["--workers [-1]"]),
    "an unknown option of our own verb": ("methods --jsn x", ["--jsn", "ssd methods --help"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(mistake, refusal):
    Path("empty").mkdir()
    command, words = MISTAKES[mistake]
    said = refusal(command)
    assert all(word in said for word in words), said


CONFIG_MISTAKES = {
    "misspelled section": ("modle: {class_path: DINO}", ["'modle.class_path'", "Nearest: model"]),
    "misspelled setting of the method": (
        "model: {class_path: DINO, init_args: {num_protoypes: 3}}",
        ["'num_protoypes' is not a setting of model", "num_prototypes"],
    ),
    "misspelled setting of the backbone": (
        "model: {class_path: DINO, init_args: {backbone: {class_path: ViT, init_args: {nmae: x}}}}",
        ["'nmae' is not a setting of model.backbone", "name"],
    ),
    "misspelled setting of the views": (
        "model: {init_args: {views: {class_path: DINOViews, init_args: {globl_size: 3}}}}",
        ["'globl_size' is not a setting of model.views", "global_size"],
    ),
    "misspelled setting of the data": (
        "data: {class_path: Digits, init_args: {bach_size: 3}}",
        ["'bach_size' is not a setting of data", "batch_size"],
    ),
    "misspelled setting of the trainer": ("trainer: {max_epoch: 3}", ["trainer.max_epoch", "trainer.max_epochs"]),
    "wrong type": (
        "model: {class_path: DINO, init_args: {num_prototypes: lots}}",
        ["model.num_prototypes: 'lots' was given, expected a whole number"],
    ),
    "unknown class": (
        "model: {class_path: DINO, init_args: {backbone: {class_path: Vit}}}",
        [
            "model.backbone: 'Vit' was given, expected one of ConvNet, LogMelEncoder, MelConvNet, RotaryViT, SpeechEncoder, ViT"
        ],
    ),
    "no class": (
        "model: {class_path: DINO, init_args: {backbone: {name: resnet18}}}",
        ["model.backbone", "class_path", "ConvNet, LogMelEncoder, MelConvNet, RotaryViT, SpeechEncoder, ViT"],
    ),
    "no backbone": ("model: {class_path: DINO, init_args: {backbone: null}}", ["backbone"]),
    "not YAML": ("model: {class_path: DINO\ndata: 3", ["bad.yaml line 2", "not YAML"]),
    "no sections": ("just a word", ["bad.yaml", "expected sections"]),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_a_config_is_one_message_and_status_2(mistake, refusal):
    text, words = CONFIG_MISTAKES[mistake]
    Path("bad.yaml").write_text(text)
    base = [] if mistake in ("no class", "no backbone", "unknown class") else ["--config", "tiny.yaml"]
    chosen = [] if "data: {" in text else ["--data", "Digits"]
    said = refusal(["fit", *base, "--config", "bad.yaml", *chosen])
    assert all(word in said for word in words), said


def test_a_checkpoint_given_as_a_config_is_told_so(refusal):
    Path("last.ckpt").write_bytes(b"PK\x03\x04\x80\xff\xfe")
    assert "--ckpt_path" in refusal("fit --config last.ckpt --data Digits")


def test_a_config_without_data_is_not_data(refusal):
    assert "says nothing of data" in refusal("fit --config tiny.yaml --data tiny.yaml")


def test_a_folder_without_permission(refusal, monkeypatch):
    """Faked, because whoever runs the tests as root may read everything."""
    scan = os.scandir

    def closed(folder):
        if str(folder).startswith(os.path.abspath("pets")):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    said = refusal("fit --config tiny.yaml --data pets")
    assert "may not be read" in said and "pets" in said and "permissions" in said


def test_pictures_that_are_none_are_named_and_stop_the_run(capsys):
    Path("broken").mkdir()
    for number in range(4):
        Path(f"broken/{number}.png").write_text("x")
    assert main(["fit", "--config", "tiny.yaml", "--data", "broken"]) == 2
    said = capsys.readouterr()
    assert "broken/0.png" in said.err and "Traceback" not in said.err and said.out == ""


def test_a_mistake_seen_by_a_loaders_process_is_its_message_alone():
    wrapped = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nssd.errors.UserError: 3 of 4 pictures cannot be read.\n'
    )
    assert without_worker(wrapped) == "3 of 4 pictures cannot be read."
    assert without_worker("plain") == "plain"


def test_a_mistake_ends_a_real_process_with_status_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ssd",
        "fit",
        "--config",
        "tiny.yaml",
        "--data",
        "Digits",
        "--model.num_prototypes",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ssd fit: error: num_prototypes: 0") and done.stderr.count("\n") == 1


def test_warnings_are_one_line_each_and_only_those_that_concern_the_user(capsys):
    import warnings

    with warnings_for_people():
        warnings.warn("step 3 was skipped", stacklevel=1)
        warnings.warn("`x` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
    assert capsys.readouterr().err == "warning: step 3 was skipped\n"


def test_a_stop_from_the_keyboard_is_no_traceback(capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssd.cli.run_lightning", stop)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "ssd fit: interrupted.\n"


def test_single_settings_of_a_recipe_that_a_config_names_can_be_typed(settings):
    views = settings("fit --config method/dino_small --data Digits --model.views.local_count 2")["model"]["init_args"][
        "views"
    ]
    assert views["class_path"].endswith("DINOViews")
    found = views["init_args"]
    assert (found["global_size"], found["local_size"], found["local_count"]) == (32, 16, 2), "all else is the recipe's"


def test_errors_that_name_each_other_are_told_apart_from_a_users_in_finite_time():
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__context__ = second, first
    assert user_error(first, "fit") is None
    second.__cause__ = UserError("mend this")
    assert str(user_error(first, "fit")) == "mend this"
