"""Networks that are spread over processes take the same steps as whole ones."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from ssd.distributed import is_sharded, whole
from ssd.optim import Clip
from ssd.parallel import shard
from ssd.record import describe
from ssd.sharded import Sharded
from ssd.weights.checkpoint import read_checkpoint
from ssd.weights.stages import start_stage
from tests.contract import STEPS, flat_state, start
from tests.lightning_modules import test_capi, test_dino, test_dinov2, test_dinov3, test_ibot
from tests.lightning_modules.runs import At, fit_as_rank, vit

CONTRACTS = {
    "dino": test_dino.TestContract,
    "ibot": test_ibot.TestContract,
    "dinov2": test_dinov2.TestContractOfSinkhornAndOwnHeads,
    "dinov3": test_dinov3.TestContractOfTheGramStage,
    "capi": test_capi.TestContract,
}
CLIPS = {"tensor": Clip(0.5, over="tensor"), "module": Clip(0.5, over="module"), "all": Clip(0.5, over="all")}


def made(method: str, clip: str):
    # rates of SGD keep a gradient's size in the weights, which Adam would take out
    from ssd.optim import SGD

    return CONTRACTS[method]().make(optimizer=SGD(), lr=0.05, clip=CLIPS[clip])


def steps_of_rank(rank: int, world: int, method: str, clip: str):
    from torch.distributed.device_mesh import init_device_mesh

    contract, module = CONTRACTS[method](), made(method, clip)
    mesh = init_device_mesh("cpu", (world,))
    teachers = [module.teacher, getattr(module, "gram_teacher", None)]
    networks = [plan.module for plan in module.optimized()] + [each.network for each in teachers if each is not None]
    for network in networks:
        shard(network, mesh)
    assert all(is_sharded(parameter) for parameter in module.parameters())
    optimizers = start(module)
    reports = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            batch = contract.batch_for(module, step, rank, world)
            report = module.take_step(batch, optimizers)
            reports.append((report.terms, report.gradient_norm))
    state = {name: whole(value) for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return reports, {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize(
    ("method", "clip"),
    [("dino", "tensor"), ("ibot", "all"), ("dinov2", "module"), ("dinov3", "module"), ("capi", "tensor")],
)
def test_two_processes_with_half_of_each_network_step_like_one_with_the_whole(pair, method, clip):
    one = made(method, clip)
    contract = CONTRACTS[method]()
    optimizers = start(one)
    expected = []
    for step in range(STEPS):
        report = one.take_step(contract.batch_for(one, step), optimizers)
        expected.append((report.terms, report.gradient_norm))
    for reports, state in pair.run(steps_of_rank, method, clip):
        for (terms, norm), (terms_of_one, norm_of_one) in zip(reports, expected, strict=True):
            assert terms == pytest.approx(terms_of_one, abs=1e-4)
            assert norm == pytest.approx(norm_of_one, rel=1e-3)
        state_of_one = flat_state(one)
        assert state.keys() == state_of_one.keys()
        for name, value in state_of_one.items():
            assert_close(state[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def fit_sharded(rank: int, world: int, folder, strategy: str, method: dict, trainer: dict):
    chosen = {"strategy": Sharded() if strategy == "fsdp2" else strategy}
    module, error = fit_as_rank(rank, world, folder, vit, method, {**chosen, **trainer})
    return error, {name: whole(value) for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def test_a_run_under_fsdp2_is_the_run_under_ddp(pair, tmp_path):
    method = {"steps": 6, "lr": 1e-3}
    (no_error, expected), _ = pair.run(fit_sharded, tmp_path / "ddp", "ddp", method, {})
    assert no_error is None
    for error, state in pair.run(fit_sharded, tmp_path / "fsdp2", "fsdp2", method, {}):
        assert error is None
        for name, value in expected.items():
            assert_close(state[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_of_fsdp2_is_one_file_and_goes_on_exactly(pair, tmp_path):
    method = {"steps": 14, "lr": 1e-3}
    (_, expected), _ = pair.run(fit_sharded, tmp_path / "straight", "fsdp2", method, {})
    errors = [error for error, _ in pair.run(stop_as, tmp_path / "stopped", "fsdp2", method)]
    assert errors == [None, None]
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    found = read_checkpoint(file)
    assert 7 <= found["state_dict"]["_extra_state"]["step"] < 14
    assert found["state_dict"].keys() - {"_extra_state"} == expected.keys()
    for error, state in pair.run(go_on_as, tmp_path / "on", file, "fsdp2", method):
        assert error is None
        different = {n: float((state[n] - v).abs().max()) for n, v in expected.items() if not torch.equal(state[n], v)}
        assert not different


def go_on_as(rank: int, world: int, folder, file, strategy: str, method: dict):
    chosen = {"strategy": Sharded() if strategy == "fsdp2" else strategy, "resume": file}
    module, error = fit_as_rank(rank, world, folder, vit, method, chosen)
    state = {name: whole(value) for name, value in module.state_dict().items() if torch.is_tensor(value)}
    return error, {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize(("before", "after"), [("fsdp2", "ddp"), ("ddp", "fsdp2")])
def test_a_run_may_change_how_it_is_spread_where_it_goes_on(pair, tmp_path, before, after):
    """Moments of the optimiser too: Adam's first steps after them would be others without."""
    method = {"steps": 14, "lr": 1e-3, "freeze_last_layer": 0.2}
    (_, expected), _ = pair.run(fit_sharded, tmp_path / "straight", "ddp", method, {})
    pair.run(stop_as, tmp_path / "stopped", before, method)
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    for error, state in pair.run(go_on_as, tmp_path / "on", file, after, method):
        assert error is None
        for name, value in expected.items():
            assert_close(state[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def stop_as(rank: int, world: int, folder, strategy: str, method: dict):
    return fit_sharded(rank, world, folder, strategy, method, {"callbacks": [At(7, ask_to_stop)]})


def two_optimisers_as(rank: int, world: int, folder, strategy: str, trainer: dict):
    chosen = {"strategy": Sharded() if strategy == "fsdp2" else strategy}
    method = {"steps": 10, "drop_path_rate": 0.0, "lr": 1e-3, "clustering_lr": 1e-2}
    module, error = fit_as_rank(rank, world, folder, test_capi.small, method, {**chosen, **trainer})
    state = {name: whole(value) for name, value in module.state_dict().items() if torch.is_tensor(value)}
    return error, {name: value.detach().clone() for name, value in state.items()}


def test_a_run_with_two_optimisers_goes_on_from_a_checkpoint_of_fsdp2(pair, tmp_path):
    (no_error, expected), _ = pair.run(two_optimisers_as, tmp_path / "straight", "ddp", {})
    assert no_error is None
    pair.run(two_optimisers_as, tmp_path / "stopped", "fsdp2", {"callbacks": [At(6, ask_to_stop)]})
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    found = read_checkpoint(file)
    assert 6 <= found["state_dict"]["_extra_state"]["step"] < 10
    assert [len(state["state"]) > 0 for state in found["optimizer_states"]] == [True, True]
    for error, state in pair.run(two_optimisers_as, tmp_path / "on", "fsdp2", {"resume": file}):
        assert error is None
        for name, value in expected.items():
            assert_close(state[name], value, atol=1e-4, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


def begin_stage_as(rank: int, world: int, file: str, anchor: str, spread: bool):
    from torch.distributed.device_mesh import init_device_mesh

    module = test_dinov3.tiny(views=test_dinov3.GRAM, gram_anchor=anchor, start_from=file)
    if spread:
        mesh = init_device_mesh("cpu", (world,))
        for network in (module.student, module.teacher.network, module.gram_teacher.network):
            shard(network, mesh)
    start_stage(module, file)
    module.begin_fresh()
    return {name: whole(value).clone() for name, value in module.state_dict().items() if torch.is_tensor(value)}


@pytest.mark.parametrize("anchor", ["start", "file"])
def test_a_stage_begins_with_networks_that_are_spread_as_with_whole_ones(pair, tmp_path, anchor):
    torch.manual_seed(1)
    earlier = test_dinov3.tiny()
    for parameter in earlier.parameters():
        parameter.data.uniform_(-1, 1)
    file = tmp_path / "first.ckpt"
    torch.save({"ssd": {"method": describe(earlier)}, "state_dict": earlier.state_dict()}, file)
    anchor = str(file) if anchor == "file" else anchor
    expected = begin_stage_as(0, 1, str(file), anchor, spread=False)
    patches = "backbone.model.patch_embed.proj.weight"
    assert torch.equal(
        expected[f"gram_teacher.network.{patches.removeprefix('backbone.')}"], expected[f"teacher.network.{patches}"]
    )
    for state in pair.run(begin_stage_as, str(file), anchor, True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def ask_to_stop(trainer, module) -> None:
    module.stop_requested = True
