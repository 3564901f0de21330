"""`ssd plan`: what a run comes to, from the words of a fit, and steps that leave nothing behind."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ssd.errors import UserError
from ssd.planning import trials
from ssd.planning.cost import MemoryLine
from ssd.planning.trials import Trials
from ssd.summary import console
from ssd.verbs import plan
from ssd.verbs.plan import Run
from tests.planning.test_cost import MEASURED
from tests.planning.test_rules import DINO
from tests.verbs.conftest import CONFIG, typed


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config in a folder of its own, where a plan is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSD_RUN_FOLDER", raising=False)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def in_this_process(monkeypatch):
    """Trials without the seconds that a process takes to start, for as few steps as they may; what was typed."""
    commands = []
    real = trials.subprocess.run

    def run(command, **settings):
        if "--trainer.callbacks" not in command:
            return real(command, **settings)  # a run asks git for its commit
        commands.append(command)
        words = list(command[3:])
        place = words.index("--trainer.callbacks") + 1
        callback = json.loads(words[place])
        callback[0]["init_args"] |= {"seconds": 0.0}
        words[place] = json.dumps(callback)
        said = typed(*words)
        return SimpleNamespace(returncode=said.status, stderr=said.err)

    monkeypatch.setattr(trials.subprocess, "run", run)
    return commands


def refused(*argv) -> str:
    said = typed("plan", *argv)
    assert said.status == 2 and said.err.count("\n") == 1, said
    return said.err.removeprefix("ssd plan: error: ").strip()


def test_a_plan_says_what_a_run_comes_to_and_takes_and_leaves_nothing(config, in_this_process, run):
    before = set(os.listdir())
    said = typed("plan", "--config", config, "--seed_everything", 3, "--json", "plan.json")
    assert said.status == 0 and said.err == "", said.err
    assert said.out.startswith("DINO on 96 samples (Digits)\nlength ")
    assert "6 steps = 2 epochs of 3 steps; 192 samples seen, each 2 times" in said.out
    content = json.loads((config.parent / "plan.json").read_text())
    assert set(os.listdir()) == before | {"plan.json"}, "no folder of a run, no logs, no checkpoint"
    assert "SSD_RUN_FOLDER" not in os.environ

    found = content["run"]
    assert (found["steps"], found["batch"], found["prototypes"]) == (6, 32, {"head.last_layer": 16})
    assert found["settings"]["lr"]["highest"] == pytest.approx(5e-4 * 32 / 256)
    assert {warning["setting"] for warning in content["warnings"]} >= {"num_prototypes", "trainer.max_epochs"}

    measured, cost = content["measured"], content["cost"]
    assert measured["batch"] == 32 and measured["steps"] >= 5, "more steps than the run has"
    real = os.path.getsize(run.last)
    assert measured["checkpoint_bytes"] == pytest.approx(real, rel=0.25), "moments of all weights are in it"
    assert measured["evaluation"]["loaders"][1]["samples"] == 500
    assert cost["evaluations"] == 2 and cost["seconds"] > 6 * measured["step_s"]
    assert measured["gib"] > measured["imports_gib"] > 0


def test_steps_are_measured_behind_the_first_part_of_every_schedule(config, in_this_process, monkeypatch):
    from lightning_modules.dino import DINO

    seen = []
    take = DINO.take_step
    monkeypatch.setattr(DINO, "take_step", lambda self, *a, **k: (seen.append(self._frozen()), take(self, *a, **k))[1])
    words = ["--config", str(config), "--model.freeze_last_layer", "1 epochs"]
    measured = Trials(words, "cpu").take(32, 1, evaluate=False)
    assert measured.steps >= 5 and measured.evaluation is None
    assert seen and not any(seen), "prototypes that wait have no moments in memory"


def test_schedules_are_drawn_where_a_file_is_named(config):
    said = typed("plan", "--config", config, "--no-measure", "--picture", "plan.png")
    assert said.status == 0, said.err
    assert "time " not in said.out and "memory " not in said.out
    with Image.open("plan.png") as picture:
        assert picture.width > 800 and len(picture.convert("L").getcolors()) > 50


def test_the_quickstart_leaves_no_range():
    said = typed("plan", "--config", "quickstart", "--no-measure")
    assert said.status == 0, said.err
    assert "settings  all within the ranges that are known to work" in said.out
    assert "half of it is newer than 14 steps (0.676 epochs) at its quickest" in said.out


def test_a_checkpoint_is_planned_as_the_run_that_wrote_it(run, config):
    said = typed("plan", "--ckpt_path", run.last, "--no-measure")
    assert said.status == 0 and said.err == "", said.err
    assert said.out.startswith("DINO on 96 samples (Digits)\nlength ")
    assert "6 steps = 2 epochs of 3 steps" in said.out, "and not as another one that its weights begin"


def test_a_mistake_in_the_settings_is_said_as_in_a_fit(config):
    assert refused().startswith("ssd plan needs a method and data. For instance: ssd plan --config method/dino_small")
    assert "the run has no length" in refused("--config", config, "--trainer.max_epochs", "null", "--no-measure")
    assert "is no PNG" in refused("--config", config, "--picture", "plan.jpg")
    assert "--memory: -1 is neither a number of GiB above 0" in refused("--config", config, "--memory=-1")


@pytest.fixture
def ended(monkeypatch):
    """Lets the process of a trial end so."""

    def end(status: int, said: str) -> None:
        answer = SimpleNamespace(returncode=status, stderr=said)
        monkeypatch.setattr(trials.subprocess, "run", lambda *words, **settings: answer)

    return end


def test_an_error_of_the_measured_steps_is_that_of_the_plan(ended):
    ended(2, "warning: x\nssd fit: error: no such views. Use others.")
    with pytest.raises(UserError, match=r"^no such views. Use others.$"):
        Trials([], "cpu").take(32, 1)
    ended(1, "Traceback\nKeyError: 3")
    with pytest.raises(UserError, match=r"^the measured steps failed: KeyError: 3$"):
        Trials([], "cpu").take(32, 1)


def test_a_batch_without_room_is_no_error_of_its_trial(ended):
    for end in ((-9, ""), (1, "torch.OutOfMemoryError: CUDA out of memory.")):
        ended(*end)
        assert Trials([], "gpu").take(32, 1) is None


def test_nothing_is_measured_for_a_gpu_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = typed("plan", "--config", config, "--config", "scale/one_node", "--data.batch_size", 4)
    assert said.status == 0, said.err
    assert "not measured: the run wants a GPU and there is none here" in said.out
    assert "32 samples a step: 4 on each of 8 processes" in said.out


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        (("auto", "auto", 1), 0, ("cpu", 1)),
        (("auto", "auto", 2), 4, ("gpu", 8)),
        (("gpu", 8, 2), 0, (None, 16)),
        (("gpu", "0,1,3", 1), 4, ("gpu", 3)),
        (("cuda", [0, 2], 1), 4, ("gpu", 2)),
        (("gpu", -1, 1), 2, ("gpu", 2)),
        (("cpu", "2", 1), 4, ("cpu", 2)),
    ],
)
def test_processes_are_devices_times_machines(asked, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    accelerator, devices, nodes = asked
    assert plan.place_of(SimpleNamespace(accelerator=accelerator, devices=devices, num_nodes=nodes)) == expected


class OnALine:
    """Trials whose memory lies on a line, and ends at some GiB."""

    def __init__(self, line: MemoryLine, room: float):
        self.line, self.room, self.taken = line, room, []

    def take(self, batch, micro_batches, **settings):
        self.taken.append((batch, micro_batches))
        gib = self.line.gib(batch, micro_batches)
        if gib > self.room:
            return None
        return dataclasses.replace(MEASURED, batch=batch, micro_batches=micro_batches, gib=gib, cache_gib=0.0)


def test_batches_that_fit_are_proposed_and_verified():
    trial = OnALine(MemoryLine(1.0, 0.0, 0.05), room=30)
    run = Run(dataclasses.replace(DINO, batch=32, processes=1), None, None, None, "cpu", can_slice=False)
    largest, asked = plan.proposed(run, trial, trial.take(32, 1), 4.1, console())
    # batch normalisation: no slices, so that two batches make the line
    assert trial.taken == [(32, 1), (16, 1), (56, 1)]
    assert (largest.batch, largest.measured_gib) == (56, pytest.approx(3.8))
    assert (asked.batch, asked.micro_batches, asked.measured_gib) == (32, 1, pytest.approx(2.6))


def test_slices_are_measured_where_a_network_allows_them():
    trial = OnALine(MemoryLine(1.0, 0.02, 0.1), room=40)
    run = Run(dataclasses.replace(DINO, batch=256, processes=1), None, None, None, "cpu", can_slice=True)
    _, asked = plan.proposed(run, trial, trial.take(256, 1), 12.0, console())
    assert trial.taken[:3] == [(256, 1), (128, 1), (256, 2)]
    assert (asked.micro_batches, asked.measured_gib) == (8, pytest.approx(1 + 5.12 + 3.2)), "in 4 it would be 12.5"


def test_a_batch_that_has_no_room_is_halved_until_it_has(config, monkeypatch):
    trial = OnALine(MemoryLine(1.0, 0.0, 0.25), room=4)
    monkeypatch.setattr(Trials, "take", lambda _, *words, **settings: trial.take(*words, **settings))
    said = typed("plan", "--config", config, "--memory", 4)
    assert said.status == 0, said.err
    assert trial.taken == [(32, 1), (16, 1), (8, 1), (4, 1)], "of which two have room"
    assert "does not suffice for a batch of 32" in said.out
    assert "fits 4 GiB" in said.out
    assert "32 does not fit, and batch normalisation allows no slices" in said.out
