"""Files that faults cannot harm; which checkpoint is last and which is best."""

import errno
import resource
import warnings

import pytest
import pytorch_lightning as pl
import torch

from ssd.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from ssd.errors import UserError
from ssd.weights.checkpoint import read_checkpoint
from tests.lightning_modules.runs import At, best, differences, everything, fit, fit_as_rank, last, step_of, vit

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")
ZIP_FAILED = RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")


def break_writes(monkeypatch, error, when=lambda: True):
    """Lets `torch.save` fail halfway while `when()`."""
    whole = torch.save

    def save(content, file):
        if when():
            file.write(b"half of a checkpoint")
            raise error
        whole(content, file)

    monkeypatch.setattr(torch, "save", save)


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("error", [DISK_FULL, ZIP_FAILED, KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, error):
    plugin, file = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, file)
    before = file.read_bytes()
    break_writes(monkeypatch, error)
    with pytest.raises(type(error)):
        plugin.save_checkpoint({"step": 2}, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("limit", [20_000, 300_000])
def test_a_file_that_the_system_cuts_off_is_a_fault_like_others(tmp_path, limit):
    """The real error of a write that cannot go on, with few bytes written and with many."""
    plugin, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            plugin.save_checkpoint({f"{i}": torch.rand(1000) for i in range(100)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert plugin.load_checkpoint(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_reader_finds_the_earlier_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    plugin, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, file)
    whole = torch.save

    def save(content, target):
        whole(content, target)
        assert plugin.load_checkpoint(file) == {"step": 1}

    monkeypatch.setattr(torch, "save", save)
    plugin.save_checkpoint({"step": 2}, file)
    assert plugin.load_checkpoint(file, weights_only=True) == {"step": 2}


def test_what_a_killed_process_left_is_taken_away_by_the_next_write(tmp_path, monkeypatch):
    plugin, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    break_writes(monkeypatch, DISK_FULL)
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, missing_ok: None)  # as after SIGKILL
    with pytest.raises(OSError):
        plugin.save_checkpoint({"step": 1}, file)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1 and not file.exists()
    plugin.save_checkpoint({"step": 2}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert plugin.load_checkpoint(file) == {"step": 2}


# ---------------------------------------------------------------- when


@pytest.fixture
def written(monkeypatch):
    """(name, step) of every checkpoint that is written."""
    files = []
    save = AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        files.append((path.name, checkpoint["state_dict"]["_extra_state"]["step"]))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    return files


@pytest.mark.parametrize(
    "checkpoints, steps",
    [
        ({}, [10, 20, 24]),
        ({"every_n_epochs": 2}, [20, 24]),
        ({"every_n_epochs": 0}, [24]),
        ({"every_n_steps": 7}, [7, 10, 14, 20, 21, 24]),
        ({"every_n_steps": 5, "every_n_epochs": 0}, [5, 10, 15, 20, 24]),
        ({"every_n_steps": 5}, [5, 10, 15, 20, 24]),
    ],
)
def test_the_last_checkpoint_is_written_when_due_once_a_step_and_at_the_end(tmp_path, written, checkpoints, steps):
    fit(tmp_path, vit(steps=24), checkpoints=checkpoints, limit_val_batches=0)
    assert written == [("last.ckpt", step) for step in steps]
    assert step_of(last(tmp_path)) == 24


def test_a_stop_is_written_once_and_at_once(tmp_path, written):
    def stop(trainer, module):
        module.stop_requested = True

    fit(tmp_path, vit(), callbacks=[At(9, stop)], limit_val_batches=0)
    assert written == [("last.ckpt", 10)]


def test_they_go_where_they_are_told(tmp_path):
    fit(tmp_path, vit(steps=1), checkpoints={"folder": str(tmp_path / "there")}, limit_val_batches=0)
    assert step_of(tmp_path / "there" / "last.ckpt") == 1


# ---------------------------------------------------------------- full disks


@pytest.mark.parametrize("error", [DISK_FULL, ZIP_FAILED])
def test_a_run_outlives_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, error):
    fit(tmp_path / "free", vit(steps=12), limit_val_batches=0)
    module = vit(steps=12)
    break_writes(monkeypatch, error, when=lambda: module.step in (4, 5, 6))
    with pytest.warns(
        UserWarning, match=r"step 5 could not be written .*Training goes on; earlier .* intact"
    ) as caught:
        fit(tmp_path / "full", module, checkpoints={"every_n_steps": 1}, limit_val_batches=0)
    assert sum("could not be written" in str(warning.message) for warning in caught) == 3
    assert differences(everything(last(tmp_path / "full")), everything(last(tmp_path / "free"))) == []


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_the_file_before_is_whole(tmp_path, monkeypatch):
    module, kept = vit(steps=12), []
    break_writes(monkeypatch, DISK_FULL, when=lambda: module.step > 3)
    keep = At(4, lambda trainer, module: kept.append(last(tmp_path).read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"step 12 could not be written .*No space left.*Earlier checkpoints"):
            fit(tmp_path, module, callbacks=[keep], checkpoints={"every_n_steps": 1}, limit_val_batches=0)
    assert module.step == 12
    assert last(tmp_path).read_bytes() == kept[0] and step_of(last(tmp_path)) == 3


class DiskFullOnRankZero(pl.Callback):
    """From step 4 on, until `until`."""

    def __init__(self, until):
        self.until = until

    def setup(self, trainer, pl_module, stage):
        save = AtomicCheckpointIO.save_checkpoint

        def fail(plugin, checkpoint, path, storage_options=None):
            if 4 <= pl_module.step < self.until:
                raise DISK_FULL
            save(plugin, checkpoint, path, storage_options)

        trainer.strategy.checkpoint_io.save_checkpoint = fail.__get__(trainer.strategy.checkpoint_io)


def test_a_disk_that_is_full_for_one_process_keeps_no_other_waiting(pair, tmp_path):
    every = {"checkpoints": {"every_n_steps": 2}}
    settings = {"callbacks": [DiskFullOnRankZero(until=8)], **every}
    for module, error in pair.run(fit_as_rank, tmp_path / "a", vit, {"steps": 10}, settings):
        assert error is None and module.step == 10
    assert step_of(last(tmp_path / "a")) == 10
    settings = {"callbacks": [DiskFullOnRankZero(until=99)], **every}
    for module, error in pair.run(fit_as_rank, tmp_path / "b", vit, {"steps": 10}, settings):
        assert module.step == 10 and "step 10 could not be written" in error
    assert step_of(last(tmp_path / "b")) == 2


# ---------------------------------------------------------------- best


class LogValues(pl.Callback):
    """Logs what is given for the number of steps done."""

    def __init__(self, values):
        self.values = values

    def on_validation_epoch_end(self, trainer, pl_module):
        for name, value in self.values.get(pl_module.step, {}).items():
            pl_module.log(f"val/{name}", value)


NAN = float("nan")
SCORES = {"monitor": "val/score", "fallback": "val/spread"}


@pytest.mark.parametrize(
    "checkpoints, values, step, monitor, value",
    [
        ({}, {2: {"score": 0.3}, 4: {"score": 0.7}, 6: {"score": 0.7}, 8: {"score": 0.1}}, 4, "score", 0.7),
        (
            {"mode": "min"},
            {2: {"score": 0.3}, 4: {"score": 0.7}, 6: {"score": 0.1}, 8: {"score": 0.2}},
            6,
            "score",
            0.1,
        ),
        ({"mode": "min"}, {2: {"spread": 9.0}, 4: {"spread": 12.0}, 6: {"spread": 11.0}}, 4, "spread", 12.0),
        ({}, {2: {"spread": 9.0}, 4: {"spread": 12.0, "score": 0.2}, 6: {"score": 0.1}}, 4, "score", 0.2),
        ({}, {2: {"score": 0.2}, 4: {"spread": 12.0}}, 2, "score", 0.2),
        ({}, {2: {"score": NAN}, 4: {"score": 0.1}, 6: {"score": NAN}}, 4, "score", 0.1),
    ],
)
def test_the_best_is_the_first_of_the_greatest_by_the_monitor_or_else_the_fallback(
    tmp_path, checkpoints, values, step, monitor, value
):
    settings = {"val_check_interval": 2, "limit_val_batches": 1}
    callbacks = [LogValues(values)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(tmp_path, vit(steps=10), callbacks=callbacks, checkpoints=SCORES | checkpoints, **settings)
    assert step_of(best(tmp_path)) == step and step_of(last(tmp_path)) == 10
    ours = trainer.checkpoint_callback
    assert (ours.best_monitor, ours.best_value) == (f"val/{monitor}", pytest.approx(value))
    assert ours.best_model_path == str(best(tmp_path)) and ours.last_model_path == str(last(tmp_path))


def test_a_monitor_that_nobody_logs_is_said_with_what_is_logged(tmp_path):
    settings = {"monitor": "val/knn/top5", "fallback": None}
    with pytest.warns(
        UserWarning, match=r"'val/knn/top5' was not logged.*val/knn/top1, val/linear/top1, val/prototypes"
    ):
        fit(tmp_path, vit(steps=10), checkpoints=settings)
    assert not best(tmp_path).exists() and step_of(last(tmp_path)) == 10


def test_a_best_that_could_not_be_written_is_not_best(tmp_path, monkeypatch):
    module = vit(steps=6)
    break_writes(monkeypatch, DISK_FULL, when=lambda: module.step == 4)
    values = LogValues({2: {"score": 0.1}, 4: {"score": 0.3}, 6: {"score": 0.2}})
    with pytest.warns(UserWarning, match="step 4 could not be written to .*best.ckpt"):
        trainer = fit(tmp_path, module, callbacks=[values], checkpoints=SCORES, val_check_interval=2)
    assert step_of(best(tmp_path)) == 6 and trainer.checkpoint_callback.best_value == pytest.approx(0.2)


def test_a_resumed_run_remembers_what_is_best(tmp_path):
    def stop(trainer, module):
        module.stop_requested = True

    first = [LogValues({10: {"score": 0.5}}), At(11, stop)]
    fit(tmp_path, vit(), callbacks=first, checkpoints=SCORES)
    second = [LogValues({20: {"score": 0.4}, 30: {"score": 0.3}})]
    trainer = fit(tmp_path, vit(), callbacks=second, checkpoints=SCORES, resume=last(tmp_path))
    assert step_of(best(tmp_path)) == 10 and step_of(last(tmp_path)) == 30
    assert trainer.checkpoint_callback.best_value == pytest.approx(0.5)
    assert read_checkpoint(last(tmp_path))["callbacks"]


DENSE = {"also": {"best_dense": "val/dense", "best_rank": "val/rank"}}


def test_each_further_file_keeps_the_largest_of_its_own_number(tmp_path):
    values = {2: {"score": 0.9, "dense": 0.1}, 4: {"score": 0.2, "dense": 0.5}, 6: {"score": 0.1, "dense": NAN}}
    trainer = fit(
        tmp_path, vit(steps=8), callbacks=[LogValues(values)], checkpoints=SCORES | DENSE, val_check_interval=2
    )
    folder = tmp_path / "checkpoints"
    assert {path.stem: step_of(path) for path in folder.iterdir()} == {"best": 2, "best_dense": 4, "last": 8}
    assert trainer.checkpoint_callback.kept() == {
        str(folder / "best_dense.ckpt"): ("val/dense", pytest.approx(0.5)),
    }


def test_a_resumed_run_remembers_what_each_file_holds(tmp_path):
    def stop(trainer, module):
        module.stop_requested = True

    settings = {"checkpoints": SCORES | DENSE}
    fit(tmp_path, vit(), callbacks=[LogValues({10: {"dense": 0.5, "rank": 3.0}}), At(11, stop)], **settings)
    fit(tmp_path, vit(), callbacks=[LogValues({20: {"dense": 0.4, "rank": 4.0}})], resume=last(tmp_path), **settings)
    folder = tmp_path / "checkpoints"
    assert step_of(folder / "best_dense.ckpt") == 10 and step_of(folder / "best_rank.ckpt") == 20


def test_a_further_file_that_could_not_be_written_holds_what_it_held(tmp_path, monkeypatch):
    module = vit(steps=6)
    break_writes(monkeypatch, DISK_FULL, when=lambda: module.step == 4)
    values = LogValues({2: {"dense": 0.1}, 4: {"dense": 0.3}, 6: {"dense": 0.2}})
    with pytest.warns(UserWarning, match="step 4 could not be written to .*best_dense.ckpt"):
        fit(tmp_path, module, callbacks=[values], checkpoints=SCORES | DENSE, val_check_interval=2)
    assert step_of(tmp_path / "checkpoints" / "best_dense.ckpt") == 6


@pytest.mark.parametrize("name", ["best", "last", "a/b", ""])
def test_a_further_file_needs_a_name_of_its_own(name):
    with pytest.raises(UserError, match=f"'{name}' cannot name a further checkpoint.*for instance best_dense"):
        Checkpoints(also={name: "val/dense"})


def test_lightning_finds_the_best_by_its_name(tmp_path):
    module = vit(steps=10)
    trainer = fit(tmp_path, module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    trainer.validate(module, trainer.datamodule, ckpt_path="best", verbose=False)
    assert all(bool(parameter.any()) for name, parameter in module.named_parameters() if "weight" in name)


def test_a_mode_that_is_neither_is_refused():
    with pytest.raises(UserError, match=r"mode 'top' .*'max' or 'min'"):
        Checkpoints(mode="top")
