"""What every method must satisfy. A method's test derives from `MethodContract` and says how to build it small.

The equalities hold for networks without batch normalisation and drop path, to float error: another
order of summation moves a loss by about 1e-6, and Adam turns a gradient's sign near zero into a full
step, so weights are compared where the steps are small.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ssd.batch import Batch
from ssd.data.sound_samples import masks_of_sounds
from ssd.distributed import rank as own_rank
from ssd.record import build, describe

STEPS, PER_EPOCH = 4, 2
SAMPLES, SEED = 8, 0


def flat_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def average_gradients(module: torch.nn.Module, world: int) -> None:
    """What data-parallel training does to gradients."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world


def start(module: Any) -> list[torch.optim.Optimizer]:
    module.train()
    if module.total_steps == 0:
        module.begin(STEPS, PER_EPOCH)
    return module.build_optimizers()


def run_steps(module: Any, batches: list[Batch], optimizers=None) -> list[dict[str, float]]:
    optimizers = optimizers or start(module)
    return [module.take_step(batch, optimizers).terms for batch in batches]


def run_rank(rank: int, world: int, contract: type, poisoned: bool) -> tuple[list, dict, int]:
    """One rank's half of every step, in a worker process; with `poisoned`, rank 1 alone gets a NaN in step 1."""
    contract = contract()
    module = contract.make()
    optimizers = start(module)
    reports = []
    for step in range(STEPS):
        batch = contract.batch_for(module, step, rank, world)
        if poisoned and step == 1 and own_rank() == 1:
            poison(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = module.take_step(
                batch, optimizers, backward=lambda loss: (loss.backward(), average_gradients(module, world))
            )
        reports.append((report.terms, report.not_finite))
    return reports, flat_state(module), module.skipped_steps


def poison(batch: Batch) -> None:
    views = next(iter(batch.views.values()))
    views[(0,) * views.ndim] = float("nan")


class NothingWaits(TorchDispatchMode):
    """Refuses what a step on an accelerator would have to wait for: numbers read, sizes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_value = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if by_value or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class MethodContract:
    """Derive, and define `make` and `batch`. Masks need no word: they are drawn as the method plans them.

    `tolerance` is what weights may differ by after a few steps in another order of summation.
    """

    tolerance = 2e-5

    def make(self, **engine: Any) -> Any:
        """The method, small, freshly drawn from one seed, without batch norm and drop path."""
        raise NotImplementedError

    def batch(self, samples: int, seed: int) -> Batch:
        """A batch of that many samples with every view the method reads, without masks."""
        raise NotImplementedError

    def batch_for(self, module: Any, step: int, rank: int = 0, world: int = 1) -> Batch:
        """A rank's part of step `step`, with the masks that data draws for this module: those of the whole step, cut."""
        batch = self.batch(SAMPLES, step).part(rank, world)
        for number, (kind, plan) in enumerate(module.mask_plans().items()):
            place, part = (SEED, step, number), {"rank": rank, "world": world}
            if kind in batch.valid:
                batch.masks[kind] = masks_of_sounds(plan, batch.valid[kind], *place, **part)
            else:
                batch.masks[kind] = plan.draw(len(batch), *place, **part)
        return batch

    def batches(self, module: Any) -> list[Batch]:
        return [self.batch_for(module, step) for step in range(STEPS)]

    def assert_same(self, ours: dict, theirs: dict) -> None:
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], atol=self.tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    def test_slices_move_every_weight_like_the_whole_batch(self):
        whole, sliced = self.make(), self.make(micro_batches=4)
        expected = run_steps(whole, self.batches(whole))
        found = run_steps(sliced, self.batches(sliced))
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        self.assert_same(flat_state(sliced), flat_state(whole))

    def test_two_processes_move_every_weight_like_one(self, pair):
        whole = self.make()
        expected = run_steps(whole, self.batches(whole))
        for reports, state, _ in pair.run(run_rank, type(self), False):
            for (terms, not_finite), terms_of_one in zip(reports, expected, strict=True):
                assert terms == pytest.approx(terms_of_one, abs=1e-4)
                assert not not_finite
            self.assert_same(state, flat_state(whole))

    def test_a_nan_on_one_process_skips_the_step_on_both(self, pair):
        alone = self.make()
        optimizers = start(alone)
        for step, batch in enumerate(self.batches(alone)):
            if step == 1:
                alone.step += 1
            else:
                alone.take_step(batch, optimizers)
        for reports, state, skipped in pair.run(run_rank, type(self), True):
            assert reports[1][1], "the report must name what was not finite"
            assert skipped == 1
            self.assert_same(state, flat_state(alone))

    def test_a_step_with_nan_leaves_everything_as_it_was(self):
        module = self.make()
        optimizers = start(module)
        run_steps(module, self.batches(module)[:2], optimizers)
        before = flat_state(module)
        moments = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in optimizers])
        batch = self.batch_for(module, 2)
        poison(batch)
        report = module.take_step(batch, optimizers)
        assert len(report.not_finite) > 1 and report.not_finite[-1] == "gradient"
        assert module.skipped_steps == 1 and module.step == 3
        after = flat_state(module)
        assert all(torch.equal(before[name], after[name]) for name in before)
        for old, optimizer in zip(moments, optimizers, strict=True):
            new = optimizer.state_dict()["state"]
            assert all(torch.equal(old[i][key], new[i][key]) for i in old for key in old[i])

    def test_every_trainable_parameter_gets_a_gradient_and_no_teacher_does(self):
        module = self.make()
        module.train()
        module.begin(STEPS, PER_EPOCH)
        batch = self.batch_for(module, 0)
        with torch.no_grad():
            targets = module.targets(batch)
        sum(module.losses(batch, targets).values()).backward()
        silent = [
            name
            for name, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
        ]
        assert not silent
        assert not any(p.requires_grad or p.grad is not None for p in module.teacher.parameters())
        trained = {id(p) for o in module.build_optimizers() for group in o.param_groups for p in group["params"]}
        assert trained == {id(p) for p in module.parameters() if p.requires_grad}

    def test_targets_losses_and_update_never_wait_for_the_device(self):
        module = self.make()
        module.train()
        module.begin(STEPS, PER_EPOCH)
        batch = self.batch_for(module, 0)
        with NothingWaits():
            with torch.no_grad():
                targets = module.targets(batch)
            module.losses(batch, targets)
            with torch.no_grad():
                module.update(targets)

    def test_same_seed_same_losses(self):
        first, second = self.make(), self.make()
        assert run_steps(first, self.batches(first)) == run_steps(second, self.batches(second))

    def test_a_run_rebuilt_from_its_record_and_state_goes_on_as_if_never_stopped(self):
        """Nothing of a method's state lives outside its state dict, nor of its settings outside its record."""
        straight = self.make()
        run_steps(straight, self.batches(straight))

        first = self.make()
        optimizers = start(first)
        run_steps(first, self.batches(first)[:2], optimizers)
        torch.manual_seed(1234)
        second = build(describe(first))
        second.load_state_dict(first.state_dict())
        resumed = start(second)
        for new, old in zip(resumed, optimizers, strict=True):
            new.load_state_dict(old.state_dict())
        run_steps(second, self.batches(second)[2:], resumed)
        ours, theirs = flat_state(second), flat_state(straight)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert second.step == straight.step == STEPS
