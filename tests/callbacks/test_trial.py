"""Steps of a run that is only planned, by a clock that counts how often it is asked, and in a real run."""

import itertools
import json
from types import SimpleNamespace

import pytest

from ssd.callbacks import trial
from ssd.callbacks.trial import LONG_RUN, Trial, without_end
from tests.lightning_modules.runs import At, digits, fit, vit

WRITTEN_AT_THE_END = {"every_n_steps": 0, "every_n_epochs": 0}


@pytest.fixture
def clock(monkeypatch):
    """A second passes between one look and the next, half of it on the processor."""
    wall, processor = itertools.count(100.0), itertools.count(10.0, 0.5)
    ticking = SimpleNamespace(
        perf_counter=lambda: next(wall), process_time=lambda: next(processor), time=lambda: 1000.0
    )
    monkeypatch.setattr(trial, "time", ticking)


def run(folder, data=None, callbacks=(), **settings):
    file = folder / "trial.json"
    module = vit(lr=1e-4)
    tried = Trial(str(file), started=940.0, **settings)
    fit(folder, module, data, callbacks=[tried, *callbacks], checkpoints=WRITTEN_AT_THE_END, limit_val_batches=0)
    return json.loads(file.read_text()), module


def test_steps_behind_the_warm_up_are_timed_and_the_run_is_stopped(clock, tmp_path):
    found, module = run(tmp_path, warmup=2, steps=4, seconds=0, evaluate=False)
    assert (found["steps"], found["step_s"], found["step_processor_s"]) == (4, 1.0, 0.5)
    assert found["start_s"] == 60.0
    assert found["checkpoint_s"] == 1.0
    assert found["checkpoint_bytes"] == (tmp_path / "checkpoints" / "last.ckpt").stat().st_size
    assert found["batch"] == 16
    # one step more, in which the run was told to stop
    assert module.step == LONG_RUN // 2 + 2 + 4 + 1


def test_steps_go_on_for_as_long_as_was_asked(clock, tmp_path):
    found, _ = run(tmp_path, warmup=2, steps=4, seconds=9, evaluate=False)
    assert found["steps"] == 9


def test_long_steps_are_enough_at_the_least_number(clock, tmp_path):
    found, _ = run(tmp_path, warmup=2, steps=4, seconds=9, longest=3, evaluate=False)
    assert found["steps"] == 4


def test_steps_are_those_of_the_middle_of_the_run_even_of_a_short_one(tmp_path):
    seen = []
    middle = At(LONG_RUN // 2 + 3, lambda trainer, module: seen.append(module.at("momentum")))
    found, module = run(tmp_path, digits(limit=32), [middle], warmup=1, steps=12, seconds=0, evaluate=False)
    assert found["steps"] == 12, "two steps an epoch, and three epochs were asked for"
    assert seen == [pytest.approx(module.momentum.value(LONG_RUN // 2 + 3, LONG_RUN, 2))]


def test_an_evaluation_knows_its_batches_and_what_is_cached_is_counted(tmp_path):
    found, _ = run(tmp_path, warmup=1, steps=3, seconds=0)
    bank, queries = found["evaluation"]["loaders"]
    assert (bank["samples"], bank["batches"], bank["dense"]) == (48, 3, 32)
    assert (queries["samples"], queries["batches"]) == (500, 32)
    assert min(bank["first_s"], bank["dense_s"], bank["plain_s"], found["evaluation"]["probes_s"]) > 0
    cache = found["cache"]
    assert cache["of"] == 160 and 16 * 5 <= cache["pictures"] <= 160
    assert cache["bytes"] == 64 * cache["pictures"], "digits are 8 x 8"


def test_the_last_batch_comes_again_where_batches_end():
    assert list(itertools.islice(without_end([1, 2, 3]), 6)) == [1, 2, 3, 3, 3, 3]
