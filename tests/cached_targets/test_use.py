"""Runs that read stored targets: the same runs, or refused with what differs."""

import argparse
import dataclasses
import os
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close

from datamodules.digits import Digits
from lightning_modules.dbot import DBOT
from lightning_modules.dino import DINO
from lightning_modules.dmae import DMAE
from lightning_modules.further_pretraining import FurtherPretraining
from ssd.backbones.vit import ViT
from ssd.cached_targets import use
from ssd.cached_targets.folder import MANIFEST, TargetFolder
from ssd.cached_targets.forms import Form
from ssd.cached_targets.use import answers_of
from ssd.errors import UserError
from ssd.masking.recipes import RandomMasks
from ssd.optim import SGD
from ssd.verbs.cache import fill
from ssd.views.recipes import CropViews, PlainViews
from ssd.views.sound import SoundViews
from ssd.weights.checkpoint import read_checkpoint
from tests.contract import MethodContract, NothingWaits, flat_state
from tests.lightning_modules import (
    test_dbot,
    test_dmae,
    test_further_pretraining,
    test_hybrid,
    test_leap,
    test_pcd,
    test_random_teacher,
)
from tests.lightning_modules.runs import At, differences, everything, fit, last

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
SETTINGS = {
    "dtype": "float32",
    "tokens": None,
    "classes": None,
    "shard": 30,
    "part": (0, 1),
    "check": False,
    "json": None,
}
LENGTH = {"max_epochs": 3, "limit_train_batches": 4}


def vit(**arguments) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=16, in_chans=1, fixed_positions=True, arguments={**VIT, **arguments})


def dmae(teacher_seed: int = 1, **settings) -> DMAE:
    torch.manual_seed(teacher_seed)
    teacher = vit(embed_dim=32, depth=4)
    torch.manual_seed(0)
    return DMAE(vit(), teacher, **{"views": CropViews(size=16), "lr": 1e-3, "lr_rule": "none", **DECODER} | settings)


def plain_steps(**settings) -> DMAE:
    """Without Adam, which makes whole steps of the rounding of a gradient that is zero (keys' biases)."""
    return dmae(**{"optimizer": SGD(), "lr": 0.05} | settings)


def digits(**settings) -> Digits:
    return Digits(**{"batch_size": 16, "limit": 64, "evaluation_limit": 32, "view_variants": 2} | settings)


def stored(path: Path, module=None, data=None, **settings) -> str:
    """Fills a folder as the verb does."""
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    fill(module or dmae(), data or digits(), trainer, argparse.Namespace(out=str(path), **SETTINGS | settings))
    return str(path)


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> str:
    return stored(tmp_path_factory.mktemp("stored") / "targets")


def run(folder: Path, module=None, data=None, **settings):
    module = module or dmae()
    torch.manual_seed(7)
    fit(folder, module, data or digits(), **{**LENGTH, "limit_val_batches": 0} | settings)
    return module


def close(first, second, atol: float) -> None:
    ours, theirs = flat_state(first), flat_state(second)
    for name in theirs:
        assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- the same run


def test_a_run_that_reads_targets_is_the_run_that_computes_them(targets, tmp_path):
    live, read = run(tmp_path / "live"), run(tmp_path / "read", dmae(cached_targets=targets))
    assert read.step == live.step == 12
    close(read, live, 1e-5)
    half = stored(tmp_path / "half", dtype="float16")
    halved = run(tmp_path / "halved", dmae(cached_targets=half))
    close(
        halved, live, 2e-3
    )  # after twelve steps of 1e-3, by Adam, which makes whole steps of the sign of small gradients
    other = run(tmp_path / "other", data=digits(view_variants=1))
    with pytest.raises(AssertionError):
        close(other, live, 2e-3)


def test_the_teacher_is_never_asked_in_a_run_that_reads(targets, tmp_path):
    module = dmae(cached_targets=targets)
    asked: list[int] = []
    module.teacher.register_forward_hook(lambda *_: asked.append(module.step))

    begun = At(1, lambda *_: asked.append(-1))
    run(tmp_path, module, callbacks=[begun])
    assert asked == [0, -1], "once, for the first samples, before the first step"
    assert module.teacher.rests
    # of a teacher on another device data-parallel training must not know
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name in module.state_dict() if name.startswith("teacher.")} and ignored


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_and_a_resume_change_no_bit(targets, tmp_path, workers):
    data = {"num_workers": workers}
    run(tmp_path / "straight", dmae(cached_targets=targets), digits(**data))
    stop = At(6, lambda trainer, module: setattr(module, "stop_requested", True))
    run(tmp_path / "stopped", dmae(cached_targets=targets), digits(**data), callbacks=[stop])
    assert everything(last(tmp_path / "stopped"))["state_dict"]["_extra_state"]["step"] == 7
    torch.manual_seed(99)
    resumed = dmae(cached_targets=targets)
    run(tmp_path / "resumed", resumed, digits(**data), resume=last(tmp_path / "stopped"), weights_only=True)
    assert not differences(everything(last(tmp_path / "resumed")), everything(last(tmp_path / "straight")))


def run_as_rank(rank: int, world: int, folder: Path, targets: str):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = digits(batch_size=16 // world)
            module = run(folder, plain_steps(cached_targets=targets), data, devices=world, strategy="ddp")
    finally:
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    return flat_state(module)


def test_two_processes_and_slices_are_the_same_run(pair, targets, tmp_path):
    alone = run(tmp_path / "alone", plain_steps(cached_targets=targets))
    with pytest.raises(AssertionError):
        close(alone, plain_steps(), 1e-3)  # it moved
    sliced = run(tmp_path / "sliced", plain_steps(cached_targets=targets, micro_batches=4))
    close(sliced, alone, 1e-5)
    for state in pair.run(run_as_rank, tmp_path / "pair", targets):
        for name, value in flat_state(alone).items():
            assert_close(state[name], value, atol=1e-5, rtol=0)


def test_one_stage_of_dbot_reads_a_sample_of_its_teachers_tokens(tmp_path):
    def dbot(**settings) -> DBOT:
        torch.manual_seed(0)
        views, rates = CropViews(size=16), {"lr": 1e-3, "lr_rule": "none", "decoder_drop_path_rate": 0.0}
        return DBOT(vit(), **{"views": views, "stages": [1.0], **rates, **DECODER} | settings)

    path = stored(tmp_path / "targets", dbot(), tokens=8)
    assert TargetFolder(path).layout.rows["patches"] == ((1, 8, 24), "float32")
    module = run(tmp_path / "run", dbot(cached_targets=path))
    assert module.step == 12 and module.skipped_steps == 0
    assert differences(flat_state(module), flat_state(dbot()))


def test_a_last_stage_goes_on_with_what_was_stored_of_its_teacher(tmp_path):
    """Whose teacher is the student of the stage before, and in the checkpoint alone."""

    def further(**settings) -> FurtherPretraining:
        torch.manual_seed(0)
        rates = {"lr": 0.05, "optimizer": SGD(), "clip": None}
        return FurtherPretraining(vit(), **{"views": CropViews(size=16), "steps": 8, **rates, **DECODER} | settings)

    length = {"max_epochs": None, "limit_train_batches": 4}
    live = run(tmp_path / "live", further(), **length)
    stop = At(4, lambda trainer, module: setattr(module, "stop_requested", True))
    run(tmp_path / "stopped", further(), callbacks=[stop], **length)
    checkpoint = read_checkpoint(last(tmp_path / "stopped"))
    reached = further()
    reached.load_state_dict(checkpoint["state_dict"])
    assert reached.step == 5 and reached.stage == 1
    path = stored(tmp_path / "targets", reached)
    resume = {"resume": last(tmp_path / "stopped"), "weights_only": True}
    read = run(tmp_path / "read", further(cached_targets=path), **length, **resume)
    assert read.step == 8
    close(read, live, 1e-5)
    with pytest.raises(UserError, match="cannot be stored in 2 stages"):
        run(tmp_path / "early", further(cached_targets=path), **length)


# ---------------------------------------------------------------- refused


def changed(name: str):
    """(method, data) that differ in one thing, and what is said of it."""
    wide = {"views": CropViews(size=16, scale=(0.5, 1.0))}
    return {
        "teacher": (dmae(2), digits(), "teacher.weights is"),
        "block": (dmae(teacher_block=2), digits(), "teacher.asked.block is 3 there and 2 here"),
        "views": (dmae(**wide), digits(), "views.global.0.scale is"),
        "masks": (dmae(masks=RandomMasks(0.5)), digits(), "views.masks.global.ratio is 0.75 there and 0.5 here"),
        "looks": (dmae(), digits(view_variants=1), "views.variants is 2 there and 1 here"),
        "seed": (dmae(), digits(seed=1), "views.seed is 0 there and 1 here"),
        "data": (dmae(), digits(limit=48, batch_size=8), "data.fingerprint is"),
        "normalisation": (dmae(), digits(normalize={"mean": [0.5], "std": [0.5]}), "data.mean is"),
    }[name]


@pytest.mark.parametrize("name", ["teacher", "block", "views", "masks", "looks", "seed", "data", "normalisation"])
def test_what_differs_is_named_before_the_first_step(targets, tmp_path, name):
    module, data, said = changed(name)
    module.cached_targets = targets
    with pytest.raises(UserError, match="were made otherwise") as error:
        run(tmp_path, module, data)
    assert said in str(error.value) and module.step == 0
    if name != "data":
        assert "data.fingerprint" not in str(error.value)


def test_what_serves_is_no_difference(targets, tmp_path):
    """Rates, slices and weights of terms are the student's own."""
    module = dmae(lr=1e-4, micro_batches=2, feature_weight=0.5, cached_targets=targets)
    assert run(tmp_path, module, digits(batch_size=8), limit_train_batches=1).step == 3


def test_a_teacher_that_says_something_else_is_found_whatever_the_record_says(targets, tmp_path, monkeypatch):
    monkeypatch.setattr(use, "identity_of", lambda module, data: TargetFolder(targets).identity)
    with pytest.raises(UserError, match=r"what the teacher says of the first samples \(features\) is 0\.9"):
        run(tmp_path, dmae(2, cached_targets=targets))


def test_a_damaged_or_unfinished_folder_is_refused_before_the_first_step(tmp_path):
    path = stored(tmp_path / "targets")
    (tmp_path / "targets" / "shard-00001.json").unlink()
    with pytest.raises(
        UserError, match=r"1 of 3 shards .*shard-00001.json is not there.*Run the ssd cache command again"
    ):
        run(tmp_path / "run", dmae(cached_targets=path))
    stored(tmp_path / "targets")
    assert run(tmp_path / "again", dmae(cached_targets=path), limit_train_batches=1).step == 3
    (tmp_path / "targets" / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds no stored targets"):
        run(tmp_path / "none", dmae(cached_targets=path))


def test_methods_whose_teacher_moves_are_refused_when_they_are_built():
    with pytest.raises(UserError, match="cannot serve DINO: what its student learns from changes with every step"):
        DINO(vit(), cached_targets="targets")


@pytest.mark.parametrize(
    ("module", "data", "said"),
    [
        (lambda: DINO(vit()), digits, "changes with every step"),
        (lambda: test_leap.tiny(), digits, "Set model.mixup: false"),
        (lambda: test_leap.tiny(mixup=False), digits, "Set model.match: last"),
        (lambda: test_dbot.tiny(), digits, "cannot be stored in 2 stages"),
        (lambda: test_further_pretraining.tiny(stages=(1.0,)), digits, "its one stage has no teacher"),
        (lambda: dmae(), lambda: digits(view_variants=None), "Set data.view_variants"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_what_to_do(module, data, said):
    prepared = data()
    with pytest.raises(UserError, match=said):
        use.check_storable(module(), prepared)
    with pytest.raises(UserError, match="and the data is _Sounds"):
        use.check_storable(dmae(), _Sounds())


class _Sounds:
    views_class = SoundViews


def test_batches_from_elsewhere_are_no_reason_to_ask_a_teacher_that_rests():
    module = test_dmae.tiny()
    batch = test_dmae.masked_batch(module, 4, 0)
    module.teacher.rests = True
    with pytest.raises(UserError, match="come without stored targets"):
        module.targets(batch)


def test_a_teacher_that_rests_stays_where_it_is():
    module = test_dmae.tiny()
    module.teacher.rests = True
    module.to("meta")
    assert {p.device.type for p in module.teacher.parameters()} == {"cpu"}
    assert {p.device.type for p in module.student.parameters()} == {"meta"}


# ---------------------------------------------------------------- every method


def whole(module, batch):
    return {name: value for name, value in module.targets(batch)._tensors.items()}


PLAIN = PlainViews(size=32)
METHODS = {
    "dbot": (lambda: test_dbot.tiny(stages=(1.0,)), test_dbot.masked_batch),
    "dmae": (test_dmae.tiny, test_dmae.masked_batch),
    "leap": (lambda: test_leap.tiny(match="all", mixup=False), lambda _, *place: test_leap.random_batch(*place)),
    "hybrid": (test_hybrid.tiny, lambda _, *place: test_hybrid.random_batch(*place)),
    "pcd": (test_pcd.tiny, lambda _, *place: test_pcd.random_batch(*place)),
    "pcd boxes": (lambda: test_pcd.tiny(pairing="boxes"), lambda _, *place: test_pcd.random_batch(*place)),
    "random teacher": (
        lambda: test_random_teacher.vit(distance=0.5),
        lambda _, *place: test_random_teacher.random_batch(*place),
    ),
    "further pretraining": (
        lambda: test_further_pretraining.begun(stages=(1.0, 3.0))[0],
        test_further_pretraining.masked_batch,
    ),
}


def with_stored(module, batch, form: Form):
    """The batch with what would be read of it."""
    batch.variant = torch.zeros(len(batch), dtype=torch.long)
    arrays = answers_of(module, batch, 0, form)
    taught = {name: torch.from_numpy(value).transpose(0, 1) for name, value in arrays.items()}
    return dataclasses.replace(batch, taught=taught)


def begun(name: str):
    build, batch_of = METHODS[name]
    module = build().train()
    if module.total_steps == 0:
        module.begin(4, 2)
    module.step = 2 if len(module.stages) > 1 else 0
    return module, batch_of(module, 4, 0)


@pytest.mark.parametrize("name", METHODS)
def test_targets_and_losses_of_stored_answers_are_those_of_the_teacher(name):
    module, batch = begun(name)
    with torch.no_grad():
        live = whole(module, batch)
        terms = module.losses(batch, module.targets(batch))
        for form, atol in ((Form("float32"), 1e-6), (Form("float16"), 5e-3)):
            read = with_stored(module, batch, form)
            with NothingWaits():
                found = whole(module, read)
            assert found.keys() == live.keys()
            for key, value in live.items():
                assert_close(
                    getattr(found[key], "tensor", found[key]), getattr(value, "tensor", value), atol=atol, rtol=1e-3
                )
            for term, value in module.losses(read, module.targets(read)).items():
                assert_close(value, terms[term], atol=atol, rtol=1e-3)


@pytest.mark.parametrize(("name", "form"), [("dbot", {"tokens": 6}), ("dmae", {"tokens": 3}), ("leap", {"tokens": 6})])
def test_losses_of_some_tokens_are_those_of_all_on_average(name, form):
    """Over 300 draws of the tokens: the mean loss is the whole one, to four deviations of it."""
    module, batch = begun(name)
    batch.variant = torch.zeros(len(batch), dtype=torch.long)
    with torch.no_grad():
        expected = module.losses(batch, module.targets(batch))
        said = module.teach(batch)
        module.teach = lambda batch: said  # which does not change
        found = []
        for seed in range(300):
            arrays = answers_of(module, batch, seed, Form("float32", **form))
            taught = {key: torch.from_numpy(value).transpose(0, 1) for key, value in arrays.items()}
            read = dataclasses.replace(batch, taught=taught)
            found.append(module.losses(read, module.targets(read)))
    for term, value in expected.items():
        values = torch.stack([each[term] for each in found])
        assert (values.mean() - value).abs() <= 4 * values.std() / 300**0.5 + 1e-6


def test_draws_of_a_random_teachers_classes_give_its_divergence_on_average():
    module, batch = begun("random teacher")
    batch.variant = torch.zeros(len(batch), dtype=torch.long)
    with torch.no_grad():
        expected = module.losses(batch, module.targets(batch))["kl"]
        found = []
        for seed in range(600):
            arrays = answers_of(module, batch, seed, Form("float32", classes=8))
            taught = {key: torch.from_numpy(value).transpose(0, 1) for key, value in arrays.items()}
            read = dataclasses.replace(batch, taught=taught)
            found.append(module.losses(read, module.targets(read))["kl"])
    values = torch.stack(found)
    assert (values.mean() - expected).abs() <= 4 * values.std() / 600**0.5
    assert values.std() > 0


class Stored(MethodContract):
    """The contract, of batches that come with stored targets and a teacher that rests."""

    method = ""
    form = Form("float16")

    def make(self, **engine):
        build = {"dbot": lambda: test_dbot.tiny(stages=(1.0,), **engine), "dmae": lambda: test_dmae.tiny(**engine)}
        return build[self.method]()

    def batch(self, samples, seed):
        return test_dmae.random_batch(samples, seed)

    def batch_for(self, module, step, rank=0, world=1):
        batch = super().batch_for(module, step, rank, world)
        teacher = self.make()
        first = rank * len(batch)
        batch.index = torch.arange(first, first + len(batch))
        module.teacher.rests = True
        return with_stored(teacher, batch, self.form)


class TestDMAEContract(Stored):
    method = "dmae"


class TestDBOTContractOfSomeTokens(Stored):
    method = "dbot"
    form = Form("float16", tokens=6)
