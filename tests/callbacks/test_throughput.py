"""Speed by a clock that is set by hand, and in a real run."""

from types import SimpleNamespace

import pytest

from ssd.callbacks import throughput
from ssd.callbacks.throughput import Throughput
from tests.lightning_modules.runs import fit, vit


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def steps(callback, clock, *seconds, log_every=0):
    """One step of 32 images after each of these times; what was logged."""
    logged = {}
    module = SimpleNamespace(step=0, log=logged.__setitem__)
    for duration in seconds:
        clock.seconds += duration
        module.step += 1
        trainer = SimpleNamespace(log_every_n_steps=log_every)
        callback.on_train_batch_end(trainer, module, None, SimpleNamespace(total=32), 0)
    return logged


def test_images_per_second_are_those_of_the_whole_step_by_the_median(clock):
    callback = Throughput()
    assert callback.images_per_second is None
    logged = steps(callback, clock, 5.0, 0.5, 0.25, 8.0, log_every=2)
    assert callback.images_per_second == 32 / 0.5
    assert (callback.images, callback.seconds) == (3 * 32, 8.75)
    assert "train/speed/waiting_share" in logged
    assert logged["train/speed/images_per_s"] == pytest.approx((32 / 0.25 + 32 / 8) / 2), "the median of the last two"


def test_the_time_between_a_step_and_the_next_batch_is_waiting(clock):
    callback, module = Throughput(), SimpleNamespace(step=0)
    trainer, batch = SimpleNamespace(log_every_n_steps=0), SimpleNamespace(total=32)
    assert callback.waiting_share is None
    for wait, work in ((9.0, 1.0), (0.5, 1.5), (1.0, 1.0)):
        clock.seconds += wait
        callback.on_train_batch_start(trainer, module, batch, 0)
        clock.seconds += work
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert callback.waiting_share == pytest.approx(1.5 / 4), "the first batch is the loader's start and does not count"


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_epoch_start", "on_save_checkpoint"])
def test_what_lies_between_steps_and_is_not_loading_does_not_count(clock, hook):
    callback = Throughput()
    steps(callback, clock, 1.0, 1.0)
    getattr(callback, hook)(*[None] * (3 if hook == "on_save_checkpoint" else 2))
    steps(callback, clock, 60.0, 1.0)
    assert list(callback.rates) == [32.0, 32.0]


@pytest.mark.parametrize("every, logs", [(4, True), (0, False)])
def test_a_run_logs_its_speed_as_often_as_its_losses(tmp_path, every, logs):
    callback = Throughput()
    trainer = fit(tmp_path, vit(steps=9), callbacks=[callback], log_every_n_steps=every, limit_val_batches=0)
    assert ("train/speed/images_per_s" in trainer.callback_metrics) == logs
    assert ("train/loss/dino" in trainer.callback_metrics) == logs
    assert len(callback.rates) == 8 and callback.images == 8 * 16
