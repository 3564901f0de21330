"""Every fault, put into a real run, is named within 50 steps; a healthy run hears nothing."""

import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from timm.layers import DropPath

import ssd.callbacks.throughput
from lightning_modules.dinov2 import DINOv2
from lightning_modules.leap import LEAP
from ssd.backbones.vit import ViT
from ssd.callbacks.checkpoints import AtomicCheckpointIO
from ssd.callbacks.doctor import Doctor
from ssd.callbacks.throughput import Throughput
from ssd.views.recipes import CropViews
from tests.contract import poison
from tests.lightning_modules.runs import (
    VIT,
    At,
    Poison,
    convnet,
    differences,
    digits,
    everything,
    fit,
    fit_as_rank,
    last,
    vit,
)

QUIET = {"limit_val_batches": 0, "log_every_n_steps": 10, "checkpoints": {"every_n_epochs": 0}}


def examined(folder, module, *faults, data=None, doctor=None, **trainer):
    """The doctor of a run with these faults."""
    doctor = doctor or Doctor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(folder, module, data, callbacks=[*faults, doctor], **QUIET | trainer)
    return doctor


def kinds(doctor):
    return [finding.kind for finding in doctor.findings]


# ---------------------------------------------------------------- faults, as code that is wrong would put them in


def one_direction(trainer, module):
    """All features become multiples of one vector."""
    for network in (module.student, module.teacher.network):
        norm = network.backbone.model.norm
        norm.weight.data[1:], norm.bias.data[1:] = 0, 0


def sums_instead_of_averages(trainer, module):
    center = module.center
    center.update = lambda logits: center.center.add_(logits.flatten(0, -2).mean(0))


def keeps_few(first):
    """Targets that know only the first prototypes."""

    def fault(trainer, module):
        answer = type(module.center).forward

        def forward(logits, temperature):
            probs = answer(module.center, logits, temperature)
            probs = probs * (torch.arange(probs.shape[-1]) < first)
            return probs / probs.sum(-1, keepdim=True)

        module.center.forward = forward

    return fault


def set_to(name, value):
    return lambda trainer, module: setattr(module, name, value)


def update_forgotten(trainer, module):
    module.teacher.update = lambda student, momentum: None


def same_network(trainer, module):
    module.teacher.network = module.student


def shared_head(trainer, module):
    module.teacher.network.head.mlp[0].weight = module.student.head.mlp[0].weight


def teacher_with_drop_path(trainer, module):
    block = next(part for part in module.teacher.network.modules() if isinstance(part, DropPath))
    block.drop_prob = 0.5


def teacher_evaluates(trainer, module):
    module.teacher.network.eval()


def student_evaluates(trainer, module):
    module.student.eval()


def teacher_learns(trainer, module):
    module.teacher.network.requires_grad_(True)


def nan_weight(trainer, module):
    module.student.head.mlp[2].weight.data[3, 3] = math.nan


def nan_inside(trainer, module):
    module.student.backbone.model.blocks[1].mlp.fc1.register_forward_hook(lambda layer, inputs, output: output / 0.0)


def nan_gradient(trainer, module):
    module.student.backbone.model.blocks[0].mlp.fc2.weight.register_hook(lambda gradient: gradient * math.nan)


class ChangeBatch(pl.Callback):
    """Changes the global views (V, B, C, H, W) of these steps, of all where none are given."""

    def __init__(self, change, *steps):
        self.change, self.steps = change, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.steps or pl_module.step in self.steps:
            self.change(batch.views["global"])


class SlowLoader(pl.Callback):
    """A clock that goes on by 3 s while the step waits for its batch, and by 1 s in the step."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(ssd.callbacks.throughput.time, "perf_counter", lambda: self.now)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 3

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.now += 1


def halves(overflowing):
    """16-bit losses with a scale that overflows, as on a GPU."""
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 if overflowing else 2.0**10)
    return plugin


def whole_batches(**settings):
    return digits(**{"batch_size": 64, "limit": 640} | settings)


def copy_some(views):
    """Of half of the samples, so that some of them are not told apart by masks."""
    views[:, 3:10] = views[:, 2:3]


OF_THE_COURSE = {
    "uniform-collapse": (vit, {"teacher_temperature": 10.0}, []),
    "one-hot-collapse": (vit, {}, [At(1, keeps_few(1))]),
    "falling-rank": (vit, {}, [At(31, one_direction)]),
    "runaway-center": (vit, {}, [At(1, sums_instead_of_averages)]),
    "lr-too-high": (vit, {"lr": 1.0}, []),
    "lr-too-low": (vit, {"lr": 1e-10}, []),
    "still-teacher": (vit, {}, [At(1, update_forgotten)]),
}


CONSEQUENCES = {
    "runaway-center": {"one-hot-collapse"},
    "lr-too-low": {"uniform-collapse"},
    # a network that jumps about has lost everything else as well
    "lr-too-high": {"uniform-collapse", "one-hot-collapse", "falling-rank", "rising-loss", "exploding-gradient"},
}


@pytest.mark.parametrize("kind", OF_THE_COURSE)
def test_what_goes_wrong_in_a_run_is_named(tmp_path, kind):
    build, settings, faults = OF_THE_COURSE[kind]
    doctor = examined(tmp_path, build(steps=50, **settings), *faults)
    assert kind in kinds(doctor)
    assert set(kinds(doctor)) - {kind} <= CONSEQUENCES.get(kind, set())


def test_dead_prototypes_are_named(tmp_path):
    doctor = examined(tmp_path, vit(steps=50, num_prototypes=256), At(1, keeps_few(4)), data=whole_batches())
    assert kinds(doctor) == ["dead-prototypes"]
    assert "of 256 prototypes" in doctor.findings[0].message


def test_a_loss_and_a_gradient_that_explode_are_named(tmp_path):
    doctor = examined(tmp_path, vit(steps=50), At(21, set_to("student_temperature", 1e-4)))
    assert {"rising-loss", "exploding-gradient"} <= set(kinds(doctor))
    assert {finding.term for finding in doctor.findings} == {"dino", None}


def test_a_loader_that_is_too_slow_is_named(tmp_path, monkeypatch):
    doctor = examined(tmp_path, vit(steps=40), SlowLoader(monkeypatch), Throughput())
    assert kinds(doctor) == ["loader-bound"]
    assert "75% of" in doctor.findings[0].message and "data.num_workers" in doctor.findings[0].advice


def test_losses_that_overflow_in_16_bits_are_named_after_more_than_a_search(tmp_path):
    found = examined(tmp_path / "a", vit(steps=30), plugins=[AtomicCheckpointIO(), halves(overflowing=True)])
    assert kinds(found) == ["fp16-overflow"] and "bf16-mixed" in found.findings[0].advice
    healthy = examined(tmp_path / "b", vit(steps=20), plugins=[AtomicCheckpointIO(), halves(overflowing=False)])
    assert kinds(healthy) == []


# ---------------------------------------------------------------- networks


class BeforeIt(pl.Callback):
    def __init__(self, action):
        self.action = action

    def on_train_start(self, trainer, pl_module):
        self.action(trainer, pl_module)


@pytest.mark.parametrize(
    ("fault", "kind", "layer"),
    [
        (same_network, "shared-storage", "teacher.network.backbone.model.conv1.weight"),
        (shared_head, "shared-storage", "teacher.network.head.mlp.0.weight"),
        (teacher_with_drop_path, "teacher-draws", "drop_path"),
        (teacher_evaluates, "teacher-mode", "backbone.model.bn1"),
        (student_evaluates, "student-evaluates", "student"),
        (teacher_learns, "teacher-trained", "teacher.network.backbone.model.conv1.weight"),
    ],
)
def test_networks_that_are_not_apart_or_in_the_wrong_mode_are_named_before_the_first_step(tmp_path, fault, kind, layer):
    doctor = examined(tmp_path, convnet(steps=1), BeforeIt(fault))
    finding = next(finding for finding in doctor.findings if finding.kind == kind)
    assert finding.step == 0 and layer in finding.layer


def test_a_mode_that_changes_during_a_run_is_named(tmp_path):
    doctor = examined(tmp_path, convnet(steps=20), At(12, teacher_evaluates))
    assert [(finding.kind, finding.step) for finding in doctor.findings] == [("teacher-mode", 20)]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("blank-inputs", lambda views: views[:, :10].fill_(0.3)),
        ("wrong-normalisation", lambda views: views.mul_(60).add_(120)),
        ("identical-views", lambda views: views[1].copy_(views[0])),
    ],
)
def test_batches_from_which_nothing_can_be_learned_are_named_and_kept(tmp_path, kind, change):
    data = digits()
    doctor = examined(tmp_path, vit(steps=10), ChangeBatch(change), data=data)
    assert kinds(doctor) == [kind]
    kept = torch.load(tmp_path / doctor.findings[0].batch, weights_only=True)
    assert kept["views"]["global"].shape == (2, 16, 1, 16, 16) and kept["finding"]["kind"] == kind
    assert kept["names"] == [data.source.describe(index) for index in kept["index"].tolist()]
    assert len(kept["guilty"]) == (10 if kind == "blank-inputs" else 16)


def test_two_equal_samples_are_named_where_a_term_keeps_neighbours_apart(tmp_path):
    """In the step in which they meet, though nobody looks at it: the term says so. Without the term they do no harm."""
    module = vit(DINOv2, koleo_group=16, steps=29)
    doctor = examined(tmp_path, module, ChangeBatch(copy_some, 23))
    assert [(finding.kind, finding.step, finding.term) for finding in doctor.findings] == [
        ("koleo-copies", 24, "koleo")
    ]
    kept = torch.load(tmp_path / doctor.findings[0].batch, weights_only=True)
    assert kept["guilty"].tolist() == list(range(2, 10))
    assert kinds(examined(tmp_path / "without", vit(steps=10), ChangeBatch(copy_some))) == []


# ---------------------------------------------------------------- what is not a number


@pytest.mark.parametrize(
    ("fault", "term", "place"),
    [
        (Poison(2), "dino", "the input"),
        (At(2, nan_weight), "dino", "weight student.head.mlp.2.weight"),
        (At(2, nan_inside), "dino", "student.backbone.model.blocks.1.mlp.fc1"),
        (At(2, nan_gradient), None, "backbone.model.blocks.0.mlp.fc2.weight"),
    ],
)
def test_a_step_that_is_not_finite_is_named_with_its_origin_and_its_batch_is_kept(tmp_path, fault, term, place):
    doctor = examined(tmp_path, vit(steps=4), fault)
    (finding,) = doctor.findings
    assert (finding.kind, finding.step, finding.term, finding.layer) == ("not-finite", 3, term, place)
    assert place in finding.message
    kept = torch.load(tmp_path / finding.batch, weights_only=True)
    assert kept["guilty"].tolist() == ([0] if place == "the input" else list(range(16)))


def test_a_process_that_alone_is_not_finite_is_named(pair, tmp_path):
    settings = QUIET | {"callbacks": [OnRankOne(), Doctor(), Report()]}
    for module, error in pair.run(fit_as_rank, tmp_path, vit, {"steps": 3}, settings):
        assert error is None
        (finding,) = module.found
        assert (finding["kind"], finding["rank"], finding["layer"]) == ("not-finite", 1, "the input")
    kept = torch.load(tmp_path / finding["batch"], weights_only=True)
    assert kept["guilty"].tolist() == [0] and len(kept["index"]) == 8


class OnRankOne(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and pl_module.step == 1:
            poison(batch)


class Report(pl.Callback):
    """The findings, on the module, which comes back from another process."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        doctor = next(part for part in trainer.callbacks if isinstance(part, Doctor))
        pl_module.found = [finding.row() for finding in doctor.findings]


# ---------------------------------------------------------------- what it does to the run, and what it says


def test_it_changes_nothing_of_a_run_even_where_it_finds_something(tmp_path):
    faults = {"callbacks": [Poison(12)], **QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path / "without", convnet(steps=15), **faults)
        faults["callbacks"].append(Doctor())
        fit(tmp_path / "with", convnet(steps=15), **faults)
    assert differences(everything(last(tmp_path / "with")), everything(last(tmp_path / "without"))) == []


def test_it_says_a_thing_once_also_after_a_stop_and_keeps_few_batches(tmp_path, capsys):
    def stop(trainer, module):
        module.stop_requested = True

    faults = [ChangeBatch(lambda views: views[1].copy_(views[0])), Poison(3), Poison(5)]
    first = examined(tmp_path, vit(), *faults, At(14, stop), doctor=Doctor(keep_batches=1))
    said = capsys.readouterr().err
    assert said.count("doctor: step 4: ") == said.count("doctor: step 10: ") == 1
    assert sorted(kinds(first)) == ["identical-views", "not-finite"]
    assert [finding.batch is None for finding in first.findings] == [False, True]
    assert len(list((tmp_path / "doctor").iterdir())) == 1
    second = examined(tmp_path, vit(), *faults, doctor=Doctor(keep_batches=1), resume=last(tmp_path))
    assert second.findings == first.findings
    assert "doctor" not in capsys.readouterr().err


def test_it_is_silent_where_it_is_switched_off(tmp_path, capsys):
    doctor = examined(tmp_path, vit(steps=10, lr=1.0), Poison(3), doctor=Doctor(enabled=False))
    assert doctor.findings == [] and "doctor" not in capsys.readouterr().err
    assert not (tmp_path / "doctor").exists()


def test_a_run_without_logged_steps_is_still_told_of_losses_that_are_no_numbers(tmp_path):
    doctor = examined(tmp_path, vit(steps=12), Poison(3), log_every_n_steps=0)
    assert kinds(doctor) == ["not-finite"]


def test_a_teacher_with_layers_of_the_same_names_and_other_sizes_is_examined(tmp_path):
    torch.manual_seed(0)
    networks = (
        ViT("vit_tiny_patch16_224", img_size=16, in_chans=1, arguments={**VIT, "embed_dim": width})
        for width in (24, 32)
    )
    module = LEAP(*networks, views=CropViews(size=16), steps=12)
    assert examined(tmp_path, module).findings == []
