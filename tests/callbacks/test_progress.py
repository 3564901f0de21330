"""What a person sees of a run: plain lines in a file, one bar in a terminal."""

import io
import re
from types import SimpleNamespace

import pytest

from ssd.callbacks import progress
from ssd.callbacks.progress import RunProgress
from ssd.callbacks.throughput import Throughput
from ssd.errors import UserError
from tests.lightning_modules.runs import At, Poison, fit, last, vit


def show(folder, module, plain_every_s=1e9, callbacks=(), **settings):
    ours = [*callbacks, Throughput(), RunProgress(plain_every_s)]
    fit(folder, module, callbacks=ours, enable_progress_bar=True, log_every_n_steps=4, **settings)


def test_where_there_is_no_terminal_the_first_and_last_step_are_lines(tmp_path, capsys):
    show(tmp_path, vit(steps=12), limit_val_batches=1)
    first, end = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(r"step 1/12  dino \d\.\d{4}  \d+ s left", first)
    assert re.fullmatch(
        r"step 12/12  dino \d\.\d{4}  \d+ images/s  knn/top1 0\.\d{3}  linear/top1 0\.\d{3}  0 s left", end
    )


def test_lines_come_as_often_as_asked_and_count_from_where_the_run_goes_on(tmp_path, capsys):
    def stop(trainer, module):
        module.stop_requested = True

    show(tmp_path, vit(), 0, [At(14, stop)], limit_val_batches=0)
    shown = re.findall(r"step (\d+)/30", capsys.readouterr().err)
    assert shown == [str(step) for step in range(1, 16)]
    show(tmp_path, vit(), 0, resume=last(tmp_path), limit_val_batches=0)
    shown = re.findall(r"step (\d+)/30", capsys.readouterr().err)
    assert shown == [str(step) for step in range(16, 31)]


def test_the_time_left_follows_the_steps_of_this_run_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    module = SimpleNamespace(step=50, total_steps=100, last_report=SimpleNamespace(terms={"dino": 3.0}, stop=False))
    trainer = SimpleNamespace(global_rank=0, callback_metrics={})
    bar, clock = RunProgress(plain_every_s=0), 0.0
    bar.on_train_batch_start(trainer, module, None, 0)
    module.step, clock = 60, 20.0
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert capsys.readouterr().err == "step 60/100  dino 3.0000  80 s left\n"


def test_other_processes_and_a_disabled_bar_are_silent(capsys):
    module = SimpleNamespace(step=0, total_steps=9, last_report=SimpleNamespace(terms={"dino": 3.0}, stop=False))
    for rank, enabled in [(1, True), (0, False)]:
        bar = RunProgress(plain_every_s=0)
        if not enabled:
            bar.disable()
        trainer = SimpleNamespace(global_rank=rank, callback_metrics={})
        bar.on_train_batch_start(trainer, module, None, 0)
        bar.on_train_batch_end(trainer, module, None, None, 0)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_there_is_one_bar_over_the_whole_run(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    show(tmp_path, vit(steps=12), limit_val_batches=0)
    text = terminal.getvalue()
    assert "DINO" in text and "12/12" in text and "dino" in text and "0/0" not in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_run_that_fails_gives_the_terminal_back(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match="in a row"):
        show(tmp_path, vit(max_skipped_steps=1), callbacks=[Poison(3)], limit_val_batches=0)
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")
