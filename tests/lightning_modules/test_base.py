"""The engine inside Lightning: what is refused, resume to the bit, lengths, steps that are not finite, processes."""

import os
import signal
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close

from lightning_modules.dino import DINO
from ssd.callbacks.preemption import Preemption
from ssd.data.sampler import permutation
from ssd.errors import UserError
from ssd.schedules import Cosine
from ssd.views.recipes import DINOViews
from ssd.weights.checkpoint import read_checkpoint
from tests.contract import flat_state
from tests.lightning_modules.runs import (
    At,
    CopyCheckpoints,
    LogStep,
    Poison,
    Seen,
    convnet,
    differences,
    digits,
    everything,
    fit,
    fit_as_rank,
    last,
    step_of,
    vit,
)

VIEWS_OF_OTHERS = DINOViews(global_size=16, local_count=1, local_size=8)


class Renamed(DINO):
    """A method of another name with the same networks."""


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val: 0\.5 .*clip: \{max_norm: 0\.5"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: 2 .*micro_batches"),
        ({"max_steps": 7}, "max_steps: 7 .*the method's steps"),
        ({"max_epochs": None}, "no length.*max_epochs, or steps"),
        ({"max_epochs": -1}, "no length.*max_epochs, or steps"),
        ({"overfit_batches": 2}, "overfit_batches: 2 .*data.limit"),
    ],
)
def test_trainer_flags_that_would_be_ignored_are_refused_with_the_name_of_ours(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, vit(), **flags)


def test_a_sampler_put_in_by_lightning_is_refused_where_there_are_processes(tmp_path):
    module = vit()
    module._trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=1)
    with pytest.raises(UserError, match=r"use_distributed_sampler: true.*Set it to false"):
        module.configure_callbacks()


def test_slices_with_batch_normalisation_are_refused_unless_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"micro_batches: 2 with batch normalisation.*ghost_norm: true"):
        fit(tmp_path, convnet(micro_batches=2))
    module = convnet(micro_batches=2, ghost_norm=True, steps=2)
    fit(tmp_path, module)
    assert module.step == 2 and module.skipped_steps == 0


def test_slices_that_do_not_divide_the_batch_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"micro_batches: 3 does not divide data\.batch_size 16"):
        fit(tmp_path, vit(micro_batches=3))


# ---------------------------------------------------------------- resume

KEPT = (15, 17, 20)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """30 steps with an evaluation after every fifth: what they end in, and checkpoints on the way."""
    folder = tmp_path_factory.mktemp("straight")
    copies = CopyCheckpoints(folder / "copies", KEPT)
    checkpoints = {"every_n_steps": 1, "monitor": "val/step"}
    fit(folder, convnet(), callbacks=[LogStep(), copies], checkpoints=checkpoints, val_check_interval=0.5)
    return everything(last(folder)), folder / "copies"


def go_on(folder, checkpoint, module=None, **settings):
    """What a fresh process makes of a checkpoint: other weights, other random numbers before it is loaded."""
    module = module or convnet()
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not resumable|other data|settings that).*")
        fit(folder, module, resume=checkpoint, **settings)
    return everything(last(folder))


@pytest.mark.parametrize(
    "checkpoint, workers, settings",
    [
        ("last-17-next-batch", 0, {"val_check_interval": 0.5}),
        ("last-17-next-batch", 2, {"limit_val_batches": 0}),
        ("best-15-next-batch", 0, {"val_check_interval": 0.5}),
        ("last-15-validation", 0, {"val_check_interval": 0.5}),
        ("last-20-validation", 0, {}),
        ("best-20-epoch-end", 0, {"limit_val_batches": 0}),
        ("best-20-epoch-end", 2, {"val_check_interval": 0.5}),
        ("last-20-next-epoch", 0, {}),
    ],
)
def test_a_run_goes_on_from_any_of_its_checkpoints_to_the_bit(straight, tmp_path, checkpoint, workers, settings):
    end, copies = straight
    file = copies / f"{checkpoint}.ckpt"
    assert step_of(file) == int(checkpoint.split("-")[1])
    found = go_on(tmp_path, file, data=digits(num_workers=workers), weights_only=True, **settings)
    assert differences(found, end) == []


def test_evaluations_checkpoints_and_loader_processes_change_no_bit(straight, tmp_path):
    fit(tmp_path, convnet(), digits(num_workers=1), limit_val_batches=0)
    assert differences(everything(last(tmp_path)), straight[0]) == []


@pytest.mark.parametrize("request_signal, step", [(signal.SIGTERM, 17), (signal.SIGUSR1, 20)])
def test_a_stopped_run_goes_on_to_the_bit_and_to_its_full_length(straight, tmp_path, request_signal, step):
    """Lightning counts the epoch in which a run stops as done."""
    ask = At(step - 1, lambda trainer, module: os.kill(os.getpid(), request_signal))
    fit(tmp_path, convnet(), callbacks=[ask, Preemption()])
    assert step_of(last(tmp_path)) == step
    found = go_on(tmp_path, last(tmp_path))
    assert differences(found, straight[0]) == []


@pytest.mark.parametrize("limit", [6, 0.6])
def test_with_shortened_epochs_each_takes_the_beginning_of_its_own_order(tmp_path, limit):
    seen = Seen()
    fit(tmp_path / "a", vit(), callbacks=[seen], limit_train_batches=limit, limit_val_batches=0)
    steps = [permutation(160, 0, epoch)[: 6 * 16].reshape(6, 16) for epoch in range(3)]
    assert seen.indices == np.concatenate(steps).tolist()

    copies = CopyCheckpoints(tmp_path / "copies", [8, 12])
    settings = {"limit_train_batches": limit, "checkpoints": {"every_n_steps": 1}}
    fit(tmp_path / "b", vit(), callbacks=[copies], **settings)
    end = everything(last(tmp_path / "b"))
    for checkpoint, step in (("last-8-next-batch", 8), ("last-12-next-epoch", 12)):
        again = Seen()
        file = tmp_path / "copies" / f"{checkpoint}.ckpt"
        assert differences(go_on(tmp_path / checkpoint, file, vit(), callbacks=[again], **settings), end) == []
        assert again.indices == seen.indices[step:]


def test_logged_numbers_keep_their_steps_when_a_run_goes_on(straight, tmp_path):
    from pytorch_lightning.loggers import CSVLogger

    def losses(folder, **settings):
        logger = CSVLogger(folder, name="", version="")
        fit(folder, convnet(), logger=logger, log_every_n_steps=3, limit_val_batches=0, **settings)
        table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
        return dict(zip(table["step"].astype(int).tolist(), table["trainlosstotal"].tolist()))

    whole = losses(tmp_path / "whole")
    assert list(whole) == list(range(2, 30, 3))
    rest = losses(tmp_path / "rest", resume=straight[1] / "last-17-next-batch.ckpt")
    assert rest == {step: loss for step, loss in whole.items() if step >= 17}


def test_a_checkpoint_holds_plain_data_alone(straight):
    def kinds(value):
        if isinstance(value, dict):
            return {type(value).__name__} | set().union(*map(kinds, [*value, *value.values()]))
        if isinstance(value, list | tuple):
            return {type(value).__name__} | set().union(*map(kinds, value))
        return {type(value).__name__}

    checkpoint = read_checkpoint(straight[1] / "last-17-next-batch.ckpt")
    plain = {"dict", "OrderedDict", "list", "tuple", "str", "int", "float", "bool", "NoneType", "Tensor"}
    assert kinds(checkpoint) <= plain
    about = checkpoint["ssd"]
    assert about["method"]["class_path"] == "lightning_modules.dino.DINO" and about["data"]["init_args"]["limit"] == 160
    assert len(about["mean"]) == about["channels"] == 1 and about["version"] and about["fingerprint"]


# ---------------------------------------------------------------- length


def test_a_run_of_steps_stops_there_within_an_epoch_with_one_evaluation(tmp_path):
    seen, evaluated = Seen(), []
    module = vit(steps=13)
    note = pl.callbacks.LambdaCallback(on_validation_end=lambda trainer, module: evaluated.append(module.step))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_epochs.*")
        fit(tmp_path, module, callbacks=[seen, note, Poison(4)])
    assert len(seen.indices) == module.step == module.total_steps == 13
    assert module.skipped_steps == 1, "a skipped step counts"
    assert evaluated == [10, 13]
    assert step_of(last(tmp_path)) == 13 and module.steps_per_epoch == 10


@pytest.mark.parametrize("length", [{"steps": 13}, {"steps": 20}, {}])
def test_a_finished_run_fitted_again_does_nothing(tmp_path, length):
    fit(tmp_path, vit(**length), limit_val_batches=0)
    before, seen = everything(last(tmp_path)), Seen()
    written = last(tmp_path).stat().st_mtime_ns
    module = vit(**length)
    trainer = fit(tmp_path, module, resume=last(tmp_path), callbacks=[seen])
    assert seen.indices == [] and module.step == before["state_dict"]["_extra_state"]["step"]
    assert last(tmp_path).stat().st_mtime_ns == written
    assert trainer.checkpoint_callback.last_model_path == str(last(tmp_path))
    assert not differences(flat_state(module), {k: v for k, v in before["state_dict"].items() if k != "_extra_state"})


def test_a_trial_of_two_steps_leaves_no_checkpoint(tmp_path):
    module = vit()
    fit(tmp_path, module, fast_dev_run=2)
    assert module.step == 2 and not last(tmp_path).exists()


def test_the_stop_holds_where_a_trainer_wants_more_epochs(tmp_path):
    module = vit(steps=5)
    fit(tmp_path, module, min_epochs=2, limit_val_batches=0)
    assert module.step == 5


@pytest.fixture(scope="module")
def at_eleven(tmp_path_factory):
    """Of a run of 30 steps, 10 an epoch, 16 samples each."""
    folder = tmp_path_factory.mktemp("eleven")
    copies = CopyCheckpoints(folder / "copies", [11])
    fit(folder, vit(), callbacks=[copies, At(12, stop)], checkpoints={"every_n_steps": 1}, limit_val_batches=0)
    return folder / "copies" / "last-11-next-batch.ckpt"


def stop(trainer, module):
    module.stop_requested = True


@pytest.mark.parametrize(
    "method, data, trainer, message",
    [
        ({}, {}, {"max_epochs": 4}, "a run of 30 steps, 10 an epoch; this run has 40, 10"),
        ({}, {}, {"max_epochs": 1}, "a run of 30 steps, 10 an epoch; this run has 10, 10"),
        ({"steps": 31}, {}, {}, "a run of 30 steps, 10 an epoch; this run has 31, 10"),
        ({}, {"limit": 320}, {}, "a run of 30 steps, 10 an epoch; this run has 60, 20.*same data, batch size"),
        ({}, {}, {"limit_train_batches": 5}, "a run of 30 steps, 10 an epoch; this run has 15, 5"),
        ({}, {"batch_size": 15}, {}, "16 samples a step; this run has 15.*Set data.batch_size to 16"),
        ({"method": Renamed}, {}, {}, "made by DINO and cannot continue as Renamed"),
    ],
)
def test_another_length_batch_or_method_is_refused(at_eleven, tmp_path, method, data, trainer, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, vit(**method), digits(**data), resume=at_eleven, **trainer)


def test_the_same_length_in_other_words_goes_on(at_eleven, tmp_path):
    module = vit(steps=30)
    fit(tmp_path, module, resume=at_eleven, limit_val_batches=0)
    assert module.step == 30


@pytest.mark.parametrize(
    "method, data, changed",
    [
        ({}, {"seed": 3}, "seed"),
        ({"views": VIEWS_OF_OTHERS}, {}, "views"),
        ({}, {"limit": 161}, "fingerprint, mean, std"),
    ],
)
def test_other_views_or_data_of_the_same_size_are_said(at_eleven, tmp_path, method, data, changed):
    with pytest.warns(UserWarning, match=f"other data than the checkpoint's: {changed} changed"):
        fit(tmp_path, vit(**method), digits(**data), resume=at_eleven, limit_val_batches=0)


def test_settings_that_changed_are_named(at_eleven, tmp_path):
    module = vit(lr=3e-3, momentum=Cosine(0.9, 1.0))
    with pytest.warns(UserWarning, match=r"settings that are not the checkpoint's: (lr, momentum|momentum, lr)\."):
        fit(tmp_path, module, resume=at_eleven, limit_val_batches=0)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": pl.__version__}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"not written by a run of this project.*backbone.weights"):
        fit(tmp_path, vit(), resume=tmp_path / "other.ckpt")


# ---------------------------------------------------------------- not finite


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path):
    states = {}
    keep = [At(step, lambda trainer, module: states.__setitem__(module.step, flat_state(module))) for step in (4, 5, 6)]
    module = convnet(steps=7)
    with pytest.warns(UserWarning, match=r"step 4 was skipped: loss term 'dino', gradient not finite"):
        fit(tmp_path, module, callbacks=[Poison(4), *keep], limit_val_batches=0)
    assert module.skipped_steps == 1 and module.step == 7 and module.skipped_in_a_row == 0
    assert not differences(states[5], states[4])
    assert differences(states[6], states[5])


def test_a_streak_stops_the_run_and_the_checkpoint_before_it_is_whole(tmp_path):
    module = vit(max_skipped_steps=3)
    before = {}
    copy = At(10, lambda trainer, module: before.update(flat_state(module)))
    with (
        pytest.warns(UserWarning, match="was skipped"),
        pytest.raises(UserError, match=r"3 steps in a row.*loss term 'dino'.*bf16-mixed"),
    ):
        fit(tmp_path, module, callbacks=[copy, Poison(2, 3, 11, 12, 13)], limit_val_batches=0)
    assert module.step == 14 and module.skipped_steps == 5
    state = read_checkpoint(last(tmp_path))["state_dict"]
    assert state.pop("_extra_state")["step"] == 10
    assert not differences(dict(state), before)


# ---------------------------------------------------------------- precision and compilation


class Looks(DINO):
    """Its teacher side runs the student too."""

    def targets(self, batch):
        self.student(batch.views)
        return super().targets(batch)


def test_bf16_differs_little_and_leaves_weights_in_float32(tmp_path):
    ends = {}
    for precision in ("32-true", "bf16-mixed"):
        module = vit(steps=6, lr=1e-3)
        fit(tmp_path / precision, module, precision=precision, limit_val_batches=0)
        assert module.skipped_steps == 0
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        ends[precision] = module.last_report.terms["dino"], flat_state(module)
    (loss, state), (rounded_loss, rounded) = ends.values()
    # 8 bits of mantissa: a relative error of 1/256 in logits that are divided by 0.1
    assert rounded_loss == pytest.approx(loss, rel=0.02) and rounded_loss != loss
    # six steps of Adam move a weight by 6e-3 at most, either way
    assert all(float((state[name] - rounded[name]).abs().max()) <= 1.3e-2 for name in state if "center" not in name)


def test_a_student_that_the_teacher_side_has_run_still_learns_under_bf16(tmp_path):
    """Autocast keeps cast weights, those that were cast without gradients too."""
    module = vit(Looks, steps=2)
    fit(tmp_path, module, precision="bf16-mixed", limit_val_batches=0)
    plain = vit(steps=2)
    fit(tmp_path, plain, precision="bf16-mixed", limit_val_batches=0)
    assert not differences(flat_state(module), flat_state(plain))


@pytest.mark.gpu
def test_16_bit_losses_are_scaled_and_a_lowered_scale_is_kept(tmp_path):
    module = vit(steps=30, lr=1e-3)
    trainer = fit(tmp_path, module, precision="16-mixed", accelerator="gpu", limit_val_batches=0)
    scale = trainer.precision_plugin.scaler.get_scale()
    assert 0 < scale < float("inf") and module.skipped_steps < 30
    plain = vit(steps=30, lr=1e-3)
    fit(tmp_path, plain, accelerator="gpu", limit_val_batches=0)
    assert module.last_report.terms["dino"] == pytest.approx(plain.last_report.terms["dino"], rel=0.05)


@pytest.mark.slow
def test_compiled_networks_keep_their_names_and_give_the_same_losses(tmp_path):
    plain, compiled = vit(steps=3), vit(steps=3, compile=True)
    names = list(compiled.state_dict())
    for module in (plain, compiled):
        fit(tmp_path, module, limit_val_batches=0)
    assert list(compiled.state_dict()) == names
    for name, value in flat_state(plain).items():
        assert_close(compiled.state_dict()[name], value, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_end_in_the_weights_of_one(pair, tmp_path, micro_batches):
    alone = vit(steps=12)
    fit(tmp_path / "one", alone, limit_val_batches=0)
    method = {"steps": 12, "micro_batches": micro_batches}
    for half, error in pair.run(fit_as_rank, tmp_path / "two", vit, method, {}):
        assert error is None and half.step == 12 and half.skipped_steps == 0
        for name, value in flat_state(alone).items():
            # another order of summation, and steps of 1e-4
            assert_close(flat_state(half)[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_each_process_drops_its_own_paths_and_goes_on_to_the_bit(pair, tmp_path):
    def run(folder, **settings):
        method = {"drop_path_rate": 0.5, "steps": 12}
        (_, error), _ = pair.run(fit_as_rank, tmp_path / folder, vit, method, settings)
        assert error is None
        return everything(last(tmp_path / folder))

    copies = CopyCheckpoints(tmp_path / "copies", [7])
    straight = run("straight", callbacks=[copies], checkpoints={"every_n_steps": 1})
    first, second = straight["generators"]
    assert not torch.equal(first["cpu"], second["cpu"])
    file = tmp_path / "copies" / "last-7-next-batch.ckpt"
    assert differences(run("resumed", resume=file), straight) == []

    alone = vit(drop_path_rate=0.5, steps=12)
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1: drop path"):
        fit(tmp_path / "alone", alone, resume=file, limit_val_batches=0)
    assert alone.step == 12


def test_batch_normalisation_over_cpu_processes_is_refused_unless_each_may_have_its_own(pair, tmp_path):
    for _, error in pair.run(fit_as_rank, tmp_path, convnet, {"steps": 2}, {}):
        assert "cannot be synchronised over CPU processes" in error and "ghost_norm: true" in error
    for module, error in pair.run(fit_as_rank, tmp_path, convnet, {"steps": 2, "ghost_norm": True}, {}):
        assert error is None and module.step == 2
