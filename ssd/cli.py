"""The `ssd` command: Lightning's verbs (fit, validate, predict) and our own beside them."""

import contextlib
import difflib
import glob
import importlib
import importlib.metadata
import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ssd.cli_checks import check_trainer, check_view_sizes, set_channels, warn_if_busy
from ssd.configs_path import config_names
from ssd.data.shards import is_remote
from ssd.errors import UserError
from ssd.verbs.arguments import checkpoint_typed, expand, go_on, import_choices, stored_config

LIGHTNING_VERBS = {
    "fit": "pretrain; ends with a table of what was learned",
    "validate": "the online evaluation of a checkpoint again",
    "predict": "embeddings of all pictures, as a NumPy file",
}
OWN_VERBS = {
    "plan": "say what a run comes to and what it will take, before anything is spent",
    "check-data": "look at every picture before a run does: broken, repeated, tiny, leaked; loader speed",
    "look": "write the views of some samples, or what a network sees in them, as a PNG",
    "test": "the whole suite of probes on a run's own held-out data, as probe",
    "probe": "judge frozen features: kNN, linear, few labels, and which output serves best",
    "compare": "several networks, random weights and pixels on the same probes, and whether they differ beyond chance",
    "finetune": "train a backbone with a linear head on all labels and on few",
    "embed": "write the features of a folder as NumPy or Parquet",
    "cache": "store what a frozen teacher says of fixed views, for runs that read it",
    "doctor": "say what is wrong with a run: collapse, rates, overflow, dead prototypes",
    "curate": "cluster the features of a data set, to draw from all of it alike",
    "manifest": "write a table of a data set's files: labels, groups, sizes, lengths",
    "export": "write the backbone for timm or as safetensors, and prove it",
    "methods": "list the methods with their papers and configs",
    "report": "write one page about a run or several: numbers, curves, pictures, settings",
    "verify": "prove on this machine that losses and steps are the papers', and that resume is exact",
    "bench": "measure how fast this machine makes views, takes steps and probes, beside other libraries",
    "quickstart": "pretrain on the bundled digits and compare with pixels and an untrained network",
}
USAGE = """\
usage: ssd VERB ...

  ssd quickstart                                            see it work, in three minutes
  ssd plan --config method/dino_small --data FOLDER         what a run comes to and will take
  ssd fit --config method/dino_small --data FOLDER          pretrain on your own pictures
  ssd fit --ckpt_path runs/NAME/checkpoints/last.ckpt       go on
  ssd probe runs/NAME/checkpoints/best.ckpt --baselines     judge what was learned
  ssd export runs/NAME/checkpoints/best.ckpt --out DIR      take the backbone elsewhere

ssd VERB --help explains a verb:
"""
FIT_USAGE = """\
ssd fit --config METHOD --data DATA [settings]

  ssd fit --config method/dino_small --data FOLDER              pretrain on your own pictures
  ssd fit --config method/dino --config data/imagenet --config scale/one_node
                                                                configs add up; what comes later counts
  ssd fit ... --model.lr 1e-3 --data.batch_size 256 --trainer.max_epochs 300
                                                                any setting, by its name
  ssd fit ... --print_config                                    see what a run would use; ssd plan ...: what it would take
  ssd fit --ckpt_path runs/NAME/checkpoints/last.ckpt           go on
"""
DATA_HELP = (
    "--data takes a path (a folder of pictures at any depth, a text file that lists them, Parquet, tar shards by path or URL), a "
    "class (Digits, "
    "Images) or a data config, and --data.KEY VALUE its settings, which --data.help Images lists."
)
AGAIN_HELP = (
    "Method, weights, views, data and precision are those of the checkpoint: --ckpt_path FILE is all it needs. Other data: "
    "--data, as in ssd fit."
)
DESCRIPTIONS = {
    "fit": "Pretrains a backbone and ends with a table of what it learned. A run is a method and data. --config takes a file "
    f"or one of the names that `ssd` lists, and may be repeated. {DATA_HELP} --model.help DINO lists the settings of a method. "
    "--ckpt_path FILE, without anything else, goes on with the run that wrote it; --ckpt_path last starts a run or goes on "
    "with it, whichever its folder (--trainer.default_root_dir) allows.",
    "validate": f"The online evaluation of a checkpoint again, with the same numbers as at the end of fit. {AGAIN_HELP}",
    "predict": "Embeddings of every picture of the data, held out or not, written as predictions.npz (features, labels, "
    "index) into the checkpoint's run, by as many processes as the trainer has. For data that does not fit memory, and for "
    f"names beside the features: ssd embed. {AGAIN_HELP}",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command. 0 when it did what was asked, 2 after one message when the user has something to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text; stderr does so anyway
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"ssd {importlib.metadata.version('ssd')}")
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        with warnings_for_people():
            if verb in OWN_VERBS:
                return importlib.import_module(f"ssd.verbs.{verb.replace('-', '_')}").run(rest) or 0
            if verb in LIGHTNING_VERBS:
                return run_lightning(verb, rest)
            raise UserError(unknown_verb(verb))
    except UserError as error:
        print(f"ssd {verb}: error: {without_worker(str(error))}", file=sys.stderr)
        return 2
    except (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if error.filename is None:
            raise
        print(f"ssd {verb}: error: {error.filename}: {error.strerror}. Give another path.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"ssd {verb}: interrupted. {interrupt}".strip(), file=sys.stderr)
        return 130
    except SystemExit as end:  # what a parser does after --help
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1


def usage() -> str:
    lines = [USAGE, *(f"  {verb:<12}{what}" for verb, what in (LIGHTNING_VERBS | OWN_VERBS).items())]
    lines += ["", "configs that --config finds by name:"]
    folders: dict[str, list[str]] = {}
    for name in config_names():
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    return "\n".join([*lines, *("  " + "  ".join(names) for names in folders.values())])


def unknown_verb(verb: str) -> str:
    verbs = [*LIGHTNING_VERBS, *OWN_VERBS]
    near = difflib.get_close_matches(verb, verbs, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"'{verb}' is not a verb of ssd.{meant} Choose one of {', '.join(verbs)}."


def without_worker(message: str) -> str:
    """The message itself, of an error that a loader's process raised and PyTorch wrapped in its traceback."""
    if not message.startswith("Caught ") or "Original Traceback" not in message:
        return message
    return message.rpartition("UserError: ")[2].strip()


@contextlib.contextmanager
def warnings_for_people() -> Iterator[None]:
    """Warnings as one line each, without those that are for developers or about what we do on purpose."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        for text in (
            ".*does not have many workers.*",
            ".*LeafSpec.*",
            ".*number of training batches.*smaller than the logging interval.*",
            ".*Found .* module\\(s\\) in eval mode.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*Starting from v1.9.0, `tensorboardX`.*",
            ".*srun.*",
            "Grad strides do not match bucket view strides.*",
            ".*args parameter is intended to run from within Python.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        warnings.showwarning = show
        yield


# ---------------------------------------------------------------------- Lightning's verbs


def run_lightning(verb: str, argv: list[str], make: Callable[[], type] | None = None) -> int:
    """Runs one of Lightning's verbs, or what another command line, derived from `command_class`, makes of it."""
    argv = go_on(argv) if verb == "fit" else argv
    checkpoint = checkpoint_typed(argv)
    argv = expand(argv, None if checkpoint is None else stored_config(verb, checkpoint))
    command = (make or command_class)()
    for name in ("pytorch_lightning", "lightning_fabric"):
        # once they are imported, which sets another level
        logging.getLogger(name).setLevel(logging.WARNING)
    named_before = "SSD_RUN_FOLDER" in os.environ
    try:
        command(verb, argv)
    except Exception as error:
        mistake = user_error(error, verb)
        if mistake is None:
            raise
        if not named_before:
            remove_if_empty(os.environ.get("SSD_RUN_FOLDER"))
        raise mistake from None
    finally:
        if not named_before:
            os.environ.pop("SSD_RUN_FOLDER", None)
    return 0


def user_error(error: BaseException, verb: str) -> UserError | None:
    """What the user has to mend, None for a fault of ours."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ssd.verbs.settings import BadSetting, setting_message

    if isinstance(error, BadSetting):
        return UserError(setting_message(str(error), verb))
    if isinstance(error, MisconfigurationException):
        return UserError(f"{error} ssd {verb} --help lists the settings of the trainer.")
    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and not any(cause is before for before in seen):  # causes and contexts may form a ring
        seen.append(cause)
        # the parser wraps what a class raised while it was built
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def run_folder(method: str, data: str) -> str:
    """A fresh folder under `runs`, the same for all processes of a job."""
    if "SSD_RUN_FOLDER" not in os.environ:
        job = os.environ.get("SLURM_JOB_ID")
        name = os.path.abspath(f"runs/{method.lower()}-{data.lower()}-{job or time.strftime('%Y%m%d-%H%M%S')}")
        folder, number = name, 1
        # two runs that start in one second are two, but the processes of one run are not
        while os.path.exists(folder) and not job and "RANK" not in os.environ:
            number += 1
            folder = f"{name}-{number}"
        os.environ["SSD_RUN_FOLDER"] = folder
    return os.environ["SSD_RUN_FOLDER"]


def remove_if_empty(folder: str | None) -> None:
    """Takes away what a run that never took a step has left: its config and logs without a line."""
    if folder is None or not os.path.isdir(folder):
        return
    logs = glob.glob(f"{glob.escape(folder)}/csv/*/metrics.csv")
    if not logs and {entry.name for entry in os.scandir(folder)} <= {"config.yaml", "run.json", "csv", "tensorboard"}:
        shutil.rmtree(folder)


def command_class():
    """The Lightning command line, made here so that `ssd --help` needs no torch."""
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    from ssd.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
    from ssd.callbacks.doctor import Doctor
    from ssd.callbacks.online import OnlineEvaluation
    from ssd.callbacks.pictures import RunPictures
    from ssd.callbacks.preemption import Preemption
    from ssd.callbacks.progress import RunProgress
    from ssd.callbacks.run_config import RunConfig
    from ssd.callbacks.run_facts import RunFacts
    from ssd.callbacks.throughput import Throughput
    from ssd.summary import check_json, evaluation_summary, fit_summary, shown, write_predictions
    from ssd.verbs.settings import RaisesReports
    from ssd.weights.checkpoint import read_checkpoint, strict_load

    import_choices()
    from datamodules.base import SampleData
    from lightning_modules.base import SelfDistillation

    class Parser(RaisesReports, LightningArgumentParser):
        """Lightning's, with our messages."""

    class Command(LightningCLI):
        """fit, validate and predict with our callbacks, folders and defaults."""

        def __init__(self, verb: str, argv: list[str]):
            self.verb = verb
            super().__init__(
                SelfDistillation,
                SampleData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunConfig,  # type: ignore[arg-type]
                auto_configure_optimizers=False,
                parser_class=Parser,
                seed_everything_default=0,
                parser_kwargs={
                    "prog": "ssd",
                    verb: {
                        "description": DESCRIPTIONS[verb],
                        "usage": FIT_USAGE if verb == "fit" else f"ssd {verb} [settings]",
                    },
                },
                trainer_defaults={
                    "use_distributed_sampler": False,
                    "log_every_n_steps": 10,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                },
                args=[verb, *argv],
            )

        def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
            """What Lightning does not ask of a verb; of the one that is run, because parsers take time to build."""
            ours = {"model", "datamodule", "ckpt_path", "weights_only"}
            looks = ours | {"dataloaders", "verbose"}
            fit = ours | {"train_dataloaders", "val_dataloaders"}
            skipped = {"fit": fit, "validate": looks, "predict": looks | {"return_predictions"}}
            return {self.verb: skipped[self.verb]}

        def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            """As Lightning, with method and data in front of the many settings of the trainer, which help then shows first."""
            parser.add_lightning_class_args(SelfDistillation, "model", subclass_mode=True)
            parser.add_lightning_class_args(SampleData, "data", subclass_mode=True)
            parser.add_lightning_class_args(self.trainer_class, "trainer")
            parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(OnlineEvaluation, "evaluation")
            parser.add_lightning_class_args(RunPictures, "pictures")
            parser.add_lightning_class_args(Checkpoints, "checkpoints")
            parser.add_lightning_class_args(Doctor, "doctor")
            parser.add_argument(
                "--ckpt_path",
                type=str | None,
                default=None,
                help="Checkpoint that ssd fit wrote, or last: that of the run's folder.",
            )
            parser.add_argument("--json", type=str | None, default=None, help="File for the numbers of the end table.")

        def _parse_ckpt_path(self) -> None:
            """Lightning would look for settings in the checkpoint here; ours came in front of the arguments."""

        def before_instantiate_classes(self) -> None:
            config = self.settings
            for section in ("model", "data"):
                if config[section] is None:
                    raise UserError(
                        f"{section}: null was given, expected a class. ssd {self.subcommand} --help explains."
                    )
            check_trainer(config.trainer)
            check_json(config.json)
            data = config.data.init_args
            if data.get("seed") == 0 and isinstance(config.seed_everything, int):
                data.seed = config.seed_everything
            for key in ("path", "val_path"):
                if data.get(key) is not None:
                    data[key] = from_anywhere(data[key])
            sampling = data.get("sampling")
            if sampling is not None and "file" in sampling.init_args:
                sampling.init_args.file = from_anywhere(sampling.init_args.file)
            set_channels(config.model, data.get("channels", 3))
            if config.trainer.default_root_dir is None:
                names = (settings.class_path.rpartition(".")[2] for settings in (config.model, config.data))
                config.trainer.default_root_dir = run_folder(*names)

        def after_instantiate_classes(self) -> None:
            if self.subcommand == "fit":
                check_view_sizes(self.model)

        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            config = self._get(self.config_init, "trainer")
            folder, fitting = config["default_root_dir"], self.subcommand == "fit"
            if config["logger"] is None or config["logger"] is True:
                loggers = [TensorBoardLogger(folder, name="tensorboard", version=""), CSVLogger(folder, name="csv")]
                kwargs["logger"] = loggers if fitting else False
            kwargs["plugins"] = [*as_list(config["plugins"]), AtomicCheckpointIO()]
            self.throughput = Throughput()
            ours = [self.throughput, RunFacts(), Preemption()]
            if config["enable_progress_bar"] is not False:
                if fitting:
                    ours.append(RunProgress())
                else:
                    kwargs["enable_progress_bar"] = sys.stdout.isatty()
            kwargs["callbacks"] = [*as_list(config["callbacks"]), *ours]
            return super().instantiate_trainer(**kwargs)

        # ------------------------------------------------------------------ verbs

        def fit(self, **settings: Any) -> None:
            self.load()
            warn_if_busy(self.trainer)
            try:
                self.trainer.fit(ckpt_path=self.settings.ckpt_path, weights_only=True, **settings)
            except SystemExit as end:  # how Lightning passes on that it was interrupted
                last = self.callback("checkpoints").last_model_path
                raise KeyboardInterrupt(f"Go on with: ssd fit --ckpt_path {shown(last)}" if last else "") from end

        def after_fit(self) -> None:
            stopped = self.model.last_report is not None and self.model.last_report.stop
            evaluation = self.callback("evaluation")
            if not stopped and evaluation.step != self.model.step:
                self.trainer.validate(self.model, self.datamodule, verbose=False)
            fit_summary(
                self.trainer,
                self.model,
                evaluation=evaluation,
                checkpoints=self.callback("checkpoints"),
                throughput=self.throughput,
                doctor=self.callback("doctor"),
                json_file=self.settings.json,
            )

        def validate(self, **settings: Any) -> None:
            self.load()
            self.trainer.validate(verbose=False, **settings)
            file = self.settings.ckpt_path
            heading = "untrained" if file is None else f"{file}, step {self.model.step}"
            evaluation_summary(self.callback("evaluation").numbers, heading, self.settings.json)

        def predict(self, **settings: Any) -> None:
            self.load()
            predictions: Any = self.trainer.predict(**settings)
            write_predictions(predictions, self.trainer.default_root_dir, self.settings.json)

        def load(self) -> None:
            """The weights of the checkpoint, if any; UserError where it is not one of this method in these sizes."""
            file = self.settings.ckpt_path
            if file is not None:
                checkpoint = read_checkpoint(file)
                self.model.on_load_checkpoint(checkpoint)
                strict_load(self.model, checkpoint["state_dict"], file)

        @property
        def settings(self) -> Any:
            return self.config[self.subcommand]

        def callback(self, key: str) -> Any:
            return self.config_init[self.subcommand][key]

    return Command


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def from_anywhere(path: Any) -> Any:
    """Paths to files, also those of a mixture's parts, as absolute ones, so that a checkpoint finds its data anywhere."""
    if isinstance(path, dict):
        return {name: from_anywhere(part) for name, part in path.items()}
    if not isinstance(path, str) or is_remote(path):
        return path
    is_path = os.path.exists(path) or glob.has_magic(path) or "{" in path
    return os.path.abspath(path) if is_path else path
