"""The `ssd` command: Lightning's verbs (fit, validate, test, predict) and our own beside them."""

import difflib
import importlib
import inspect
import logging
import os
import pkgutil
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import yaml

from ssd.configs_path import config_file, config_names
from ssd.errors import UserError

LIGHTNING_VERBS = {
    "fit": "pretrain; ends with a table of what was learned",
    "validate": "the online evaluation of a checkpoint again",
    "test": "the online evaluation on the test data",
    "predict": "embeddings of the evaluation pictures",
}
OWN_VERBS = {
    "probe": "judge a checkpoint's frozen features: kNN, linear, few labels",
    "export": "write the backbone for timm or as safetensors, and prove it",
    "methods": "list the methods with their papers and configs",
    "verify": "prove on this machine that resume is exact",
    "quickstart": "pretrain on the bundled digits and compare with pixels and an untrained network",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command. 0 when it did what was asked, 2 after one message when the user has something to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb in OWN_VERBS:
            return importlib.import_module(f"ssd.verbs.{verb}").run(rest) or 0
        if verb in LIGHTNING_VERBS:
            return run_lightning(verb, rest)
        raise UserError(f"'{verb}' is not a verb of ssd. Choose one of {', '.join([*LIGHTNING_VERBS, *OWN_VERBS])}.")
    except UserError as error:
        print(f"ssd {verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ssd {verb}: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    lines = ["usage: ssd VERB ...", "", "ssd VERB --help explains a verb.", ""]
    lines += [f"  {verb:<12}{what}" for verb, what in (LIGHTNING_VERBS | OWN_VERBS).items()]
    lines += ["", "configs that --config finds by name:", "  " + "  ".join(config_names())]
    return "\n".join(lines)


def import_choices() -> None:
    """Imports every method, datamodule and part a config can name, so that short class names resolve."""
    from jsonargparse import set_parsing_settings

    import datamodules
    import lightning_modules
    import ssd.backbones
    from ssd.optim import OptimizerRule
    from ssd.schedules import Schedule
    from ssd.views.view import Views

    # settings that are dataclasses and have kinds: a config names the kind by its class
    set_parsing_settings(subclasses_enabled=[OptimizerRule, Schedule, Views])
    for package in (lightning_modules, datamodules, ssd.backbones):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


# ---------------------------------------------------------------------- arguments


def expand(verb: str, argv: list[str]) -> list[str]:
    """Turns what a user types into what the parser takes: configs by name, `--data FOLDER`, `--ckpt_path` alone."""
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--config", "-c", "--data", "--ckpt_path", "--json"):
            if not equals:
                value = next(words, None)
                if value is None:
                    raise UserError(f"{option} needs a value.")
            if option in ("--config", "-c"):
                expanded += ["--config", str(config_file(value))]
            elif option == "--data":
                expanded += data_arguments(value)
            elif option == "--ckpt_path":
                expanded += ["--ckpt_path", value]
                if value not in ("last", "best", "null"):
                    expanded = stored_config(verb, Path(value)) + expanded
            else:
                expanded += [option, value]
        else:
            expanded.append(word)
    return expanded


def data_arguments(value: str) -> list[str]:
    """`--data` takes a class name, a data config, or a path whose kind decides the class."""
    import_choices()
    from datamodules.base import PictureData

    if value in {cls.__name__ for cls in subclasses(PictureData)} or value.startswith("datamodules."):
        return ["--data", value]
    if value.endswith((".yaml", ".yml")) or value in config_names():
        return ["--config", str(config_file(value))]
    if Path(value).exists():
        return ["--data", "Images", "--data.path", value]
    raise UserError(
        f"--data {value} is neither a path that exists, nor a class ({', '.join(sorted(class_names(PictureData)))}), nor a "
        f"config ({', '.join(name for name in config_names() if name.startswith('data/'))})."
    )


def subclasses(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in [sub, *subclasses(sub)]]


def class_names(cls: type) -> set[str]:
    return {sub.__name__ for sub in subclasses(cls)}


def stored_config(verb: str, path: Path) -> list[str]:
    """The config a checkpoint carries, as a file in front of all others."""
    import tempfile

    from ssd.weights.checkpoint import read_checkpoint

    about = read_checkpoint(path)["ssd"]
    config: dict[str, Any] = {"model": about["method"]}
    if about.get("data"):
        config["data"] = about["data"]
    if verb == "fit" and about.get("config"):
        config = yaml.safe_load(about["config"])
        config.pop("ckpt_path", None)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="ssd-", delete=False) as file:
        yaml.safe_dump(config, file)
    return ["--config", file.name]


# ---------------------------------------------------------------------- Lightning's verbs


def run_lightning(verb: str, argv: list[str]) -> int:
    argv = expand(verb, argv)
    if verb == "fit" and not any(word in ("--help", "-h") or word.startswith(("--config", "--model")) for word in argv):
        raise UserError(
            "ssd fit needs a method. For instance: ssd fit --config method/dino_small --data FOLDER, or ssd methods for a list."
        )
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    quiet_warnings()
    try:
        command_class()(verb, argv)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except SystemExit as end:
        return int(end.code or 0)
    except Exception as error:
        # the parser wraps what a class raised while it was built
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise
    return 0


HINT = "ssd VERB --help lists all settings."


def setting_message(message: str) -> str:
    """The parser's nested report, cut to which setting, what was given and what was expected."""
    if not message.startswith('Parser key "'):
        # either short already, or a part that the parser puts into a longer report, cut there
        return message
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    inner = re.search(rf"^\s*- (.*) {re.escape(HINT)}", message, re.MULTILINE)
    if inner is not None:
        return f"{keys}.{inner[1]} {HINT}"
    owners = re.findall(r"'class_path': '([\w.]+)'", message)
    given = re.findall(r"Given value: (.*)", message)
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown is not None:
        name = unknown[1].rpartition(".")[2]
        owner = next((cls for cls in owners if settings_of(cls)), "DINO")
        near = difflib.get_close_matches(name, settings_of(owner), n=3)
        hint = f" Nearest of {owner.rpartition('.')[2]}: {', '.join(near)}." if near else ""
        return f"'{name}' is not a setting of {keys}.{hint} {HINT}"
    subtypes = re.findall(r"Subtypes: \[(.*)\]", message)
    if subtypes and given:
        kinds = re.findall(r"<class '([\w.]+)'>|(?<![\w'.])([\w.]+\[[^\]]*\]|\w+)(?=,|$)", subtypes[-1])
        expected = [(a or b).rpartition(".")[2] if a else b for a, b in kinds]
        expected = [{"NoneType": "null", "str": "text"}.get(kind, kind) for kind in expected]
        value = re.sub(r"^NestedArg\(key='[^']*', val='?(.*?)'?\)$", r"\1", given[0])
        return f"{keys}: {value} was given, expected {' or '.join(expected)}. {HINT}"
    return f"{message}\n{HINT}"


def settings_of(class_name: str) -> list[str]:
    """Names of the settings of a class, its bases included; none for a class that is not ours."""
    from datamodules.base import PictureData
    from lightning_modules.base import SelfDistillation
    from ssd.backbones.base import Backbone
    from ssd.optim import OptimizerRule
    from ssd.schedules import Schedule
    from ssd.views.view import Views

    for base in (SelfDistillation, PictureData, Backbone, OptimizerRule, Schedule, Views):
        for cls in subclasses(base):
            if cls.__name__ == class_name.rpartition(".")[2]:
                ours = [
                    c for c in cls.__mro__ if c.__module__.split(".")[0] in ("ssd", "lightning_modules", "datamodules")
                ]
                return [name for c in ours for name in inspect.signature(c.__init__).parameters if name != "self"]
    return []


def quiet_warnings() -> None:
    """Leaves out advice that does not apply: our loaders choose their workers, our steps are counted by us."""
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Found .* module\\(s\\) in eval mode.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Starting from v1.9.0, `tensorboardX`.*",
        ".*srun.*",
        ".*args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def run_folder(method: str, data: str) -> str:
    """A fresh folder under `runs`, the same for all processes of a job."""
    stamp = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    return os.environ.setdefault("SSD_RUN_FOLDER", f"runs/{method.lower()}-{data.lower()}-{stamp}")


def command_class():
    """The Lightning command line, made here so that `ssd --help` needs no torch."""
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    from ssd.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
    from ssd.callbacks.online import OnlineEvaluation
    from ssd.callbacks.preemption import Preemption
    from ssd.callbacks.progress import RunProgress
    from ssd.callbacks.run_config import RunConfig
    from ssd.callbacks.throughput import Throughput
    from ssd.summary import evaluation_summary, fit_summary

    import_choices()
    from datamodules.base import PictureData
    from lightning_modules.base import SelfDistillation

    class Parser(LightningArgumentParser):
        """Says what is wrong with a setting without the usage of two hundred others."""

        def error(self, message: str, ex: Exception | None = None) -> None:
            raise UserError(setting_message(message)) from ex

    class Command(LightningCLI):
        """fit, validate, test and predict with our callbacks, folders and defaults."""

        def __init__(self, verb: str, argv: list[str]):
            super().__init__(
                SelfDistillation,
                PictureData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunConfig,
                auto_configure_optimizers=False,
                parser_class=Parser,
                seed_everything_default=0,
                parser_kwargs={"prog": "ssd"},
                trainer_defaults={
                    "use_distributed_sampler": False,
                    "log_every_n_steps": 10,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                },
                args=[verb, *argv],
            )

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(OnlineEvaluation, "evaluation")
            parser.add_lightning_class_args(Checkpoints, "checkpoints")
            parser.add_argument("--json", type=str | None, default=None, help="File for the numbers of the end table.")
            parser.set_defaults({"data": {"class_path": "datamodules.digits.Digits"}})

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            if config.trainer.default_root_dir is None:
                names = (settings.class_path.rpartition(".")[2] for settings in (config.model, config.data))
                config.trainer.default_root_dir = run_folder(*names)
            data = config.data.init_args
            if data.get("seed") == 0 and isinstance(config.seed_everything, int):
                data.seed = config.seed_everything
            set_channels(config.model, data.get("channels", 3))

        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            config = self._get(self.config_init, "trainer")
            folder, fitting = config["default_root_dir"], self.subcommand == "fit"
            if config["logger"] is None or config["logger"] is True:
                loggers = [TensorBoardLogger(folder, name="tensorboard", version=""), CSVLogger(folder, name="csv")]
                kwargs["logger"] = loggers if fitting else False
            kwargs["plugins"] = [*as_list(config["plugins"]), AtomicCheckpointIO()]
            self.throughput = Throughput()
            ours = [self.throughput, Preemption()]
            if fitting and config["enable_progress_bar"] is not False:
                ours.append(RunProgress())
            kwargs["callbacks"] = [*as_list(config["callbacks"]), *ours]
            return super().instantiate_trainer(**kwargs)

        def after_fit(self) -> None:
            stopped = self.model.last_report is not None and self.model.last_report.stop
            if not stopped and self.callback("evaluation").step != self.model.step:
                self.trainer.validate(self.model, self.datamodule, verbose=False)
            fit_summary(
                self.trainer,
                self.model,
                numbers=self.callback("evaluation").numbers,
                checkpoints=self.callback("checkpoints"),
                throughput=self.throughput,
                finished=not stopped,
                json_file=self.config[self.subcommand].json,
            )

        def after_validate(self) -> None:
            evaluation_summary(self.callback("evaluation").numbers, self.config[self.subcommand].json)

        after_test = after_validate

        def callback(self, key: str) -> Any:
            return self.config_init[self.subcommand][key]

    return Command


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def set_channels(config: Any, channels: int) -> None:
    """The data decides how many channels a backbone reads, unless the config says it."""
    from ssd.backbones.base import Backbone
    from ssd.record import import_class

    if not hasattr(config, "class_path") or not hasattr(config, "init_args"):
        return
    if issubclass(import_class(config.class_path), Backbone):
        if config.init_args.get("in_chans") == 3:
            config.init_args.in_chans = channels
        return
    for value in vars(config.init_args).values():
        set_channels(value, channels)
