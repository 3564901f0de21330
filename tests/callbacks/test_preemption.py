"""Signals that stop a run: what is saved, what is left out, and what the process is like afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import pytorch_lightning as pl

from ssd.callbacks.preemption import SIGNALS, Preemption
from ssd.errors import UserError
from tests.lightning_modules.runs import At, Poison, best, fit, fit_as_rank, last, step_of, vit


def kill(number):
    return lambda trainer, module: os.kill(os.getpid(), number)


@pytest.fixture
def heard():
    """Signals that reached the handlers that were there before the run."""
    numbers = []
    before = {number: signal.signal(number, lambda number, frame: numbers.append(number)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_and_no_evaluation(tmp_path, capfd, heard, number):
    before = handlers()
    module = vit()
    trainer = fit(tmp_path, module, callbacks=[At(3, kill(number)), Preemption()], val_check_interval=2)
    assert module.step == 4 and step_of(last(tmp_path)) == 4 and step_of(best(tmp_path)) == 2
    assert f"{number.name}: stopping at step 4" in capfd.readouterr().err
    assert heard == [] and handlers() == before
    assert trainer.limit_val_batches == 2, "a validation afterwards is not left out"


def test_a_second_signal_is_for_whoever_listened_before(tmp_path, heard):
    twice = [At(3, kill(signal.SIGUSR1)), At(3, kill(signal.SIGUSR1))]
    fit(tmp_path, vit(), callbacks=[*twice, Preemption()], limit_val_batches=0)
    assert heard == [signal.SIGUSR1] and step_of(last(tmp_path)) == 4


def test_a_run_that_fails_or_ends_leaves_the_handlers_that_were_there(tmp_path, heard):
    before = handlers()
    fit(tmp_path, vit(steps=2), callbacks=[Preemption()], limit_val_batches=0)
    assert handlers() == before
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match="in a row"):
        fit(tmp_path, vit(max_skipped_steps=1), callbacks=[Poison(1), Preemption()], limit_val_batches=0)
    assert handlers() == before


def test_a_module_that_was_stopped_can_be_fitted_on(tmp_path):
    module = vit()
    fit(tmp_path, module, callbacks=[At(3, kill(signal.SIGTERM)), Preemption()], limit_val_batches=0)
    fit(tmp_path, module, callbacks=[Preemption()], resume=last(tmp_path), limit_val_batches=0)
    assert module.step == 30


def test_a_run_in_another_thread_goes_without_handlers(tmp_path, heard):
    module, before = vit(steps=2), handlers()
    thread = threading.Thread(target=fit, args=(tmp_path, module), kwargs={"callbacks": [Preemption()]})
    thread.start()
    thread.join()
    assert module.step == 2 and handlers() == before


class SignalToRankOne(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and pl_module.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_process_stops_all_at_the_same_step(pair, tmp_path):
    settings = {"callbacks": [SignalToRankOne(), Preemption()]}
    for module, error in pair.run(fit_as_rank, tmp_path, vit, {}, settings):
        assert error is None and module.step == 4
    assert step_of(last(tmp_path)) == 4


@pytest.mark.slow
def test_the_command_ends_well_on_sigterm_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "ssd", "fit", "--trainer.default_root_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = [*command, "--config", "verify", "--trainer.max_epochs", "500"]
    process = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not last(tmp_path).exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = step_of(last(tmp_path))
    assert f"SIGTERM: stopping at step {step}" in err and "go on with" in out and step < 5000


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A SLURM job with a scontrol that writes down what it is asked."""
    said = tmp_path / "said"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\ntest -f {tmp_path}/checkpoints/last.ckpt && echo "$@" >> {said}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return lambda: said.read_text().split() if said.exists() else []


@pytest.mark.parametrize("number, asked", [(signal.SIGUSR1, ["requeue", "17"]), (signal.SIGTERM, [])])
def test_a_slurm_job_warned_of_its_end_is_put_back_into_the_queue_once_saved(tmp_path, heard, queue, number, asked):
    fit(tmp_path, vit(), callbacks=[At(3, kill(number)), Preemption()], limit_val_batches=0)
    assert queue() == asked


def test_a_job_of_an_array_is_requeued_by_its_own_name_and_a_finished_one_not_at_all(
    tmp_path, heard, queue, monkeypatch
):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    fit(tmp_path, vit(steps=4), callbacks=[At(3, kill(signal.SIGUSR1)), Preemption()], limit_val_batches=0)
    assert queue() == []
    fit(tmp_path, vit(), callbacks=[At(3, kill(signal.SIGUSR1)), Preemption()], limit_val_batches=0)
    assert queue() == ["requeue", "16_4"]
