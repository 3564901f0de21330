import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.evaluation.features import Features, extract, gathered, log_mel_statistics, pixels


def batches(number, size, seed=0):
    pictures = torch.randn(number, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    labels, index = torch.arange(number) % 3 - 1, torch.arange(number)
    rows = index.split(size)
    return [{"sample": pictures[row], "label": labels[row], "index": row} for row in rows], pictures, labels


def test_features_are_those_of_the_whole_set_at_any_batch_size():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
    for size in (1, 4, 50):
        loader, pictures, labels = batches(23, size)
        features = extract(network, loader)
        assert_close(features.features, network(pictures).detach())
        assert torch.equal(features.labels, labels) and torch.equal(features.index, torch.arange(23))
        assert not features.features.requires_grad


def test_a_network_is_judged_in_eval_mode_and_left_as_it_was():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5))
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loader, pictures, _ = batches(8, 4)
    assert_close(extract(network, loader).features, pictures.flatten(1), atol=1e-4, rtol=1e-4)
    assert [part.training for part in network] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bfloat16_features_come_back_in_float32_and_near():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
    loader, pictures, _ = batches(8, 4)
    features = extract(network, loader, precision="bf16-mixed").features
    assert features.dtype == torch.float32 and not torch.equal(features, network(pictures))
    assert_close(features, network(pictures).detach(), atol=0.05, rtol=0.02)  # 8 bits of mantissa


def test_batches_come_in_order_of_index_and_a_sample_seen_twice_counts_once():
    features = torch.arange(6.0)[:, None]
    parts = [
        Features(features[[3, 0]], torch.tensor([3, 0]), torch.tensor([3, 0])),
        Features(features[[5, 3, 1]], torch.tensor([5, 3, 1]), torch.tensor([5, 3, 1])),
    ]
    whole = gathered(parts)
    assert whole.index.tolist() == whole.labels.tolist() == whole.features[:, 0].tolist() == [0, 1, 3, 5]


def test_pixels_are_the_pictures_in_a_row():
    loader, pictures, _ = batches(7, 3)
    assert torch.equal(pixels(loader).features, pictures.flatten(1))


def test_an_empty_loader_and_an_unknown_precision_are_said():
    with pytest.raises(UserError, match="no pictures"):
        extract(torch.nn.Identity(), [])
    with pytest.raises(UserError, match="32-true, bf16-mixed, 16-mixed"):
        extract(torch.nn.Identity(), [], precision="fp8")


@pytest.mark.slow
def test_two_processes_with_unequal_shares_have_the_features_of_one(tmp_path):
    program = textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from ssd.evaluation.features import Features, gathered
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        index = torch.tensor([0, 2, 4, 6, 1] if rank == 0 else [1, 3])
        part = Features(index[:, None] * torch.ones(1, 3), 10 * index, index)
        alone = gathered([part] if rank == 1 else [])
        assert torch.equal(alone.features, torch.tensor([[1.0] * 3, [3.0] * 3])) and alone.index.tolist() == [1, 3]
        torch.save(tuple(gathered([part])), sys.argv[3] + str(rank))
        dist.destroy_process_group()
    """)
    places = [str(tmp_path / "rendezvous"), str(tmp_path / "out")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, "-c", program, str(rank), *places], env=alone) for rank in (0, 1)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    index = torch.tensor([0, 1, 2, 3, 4, 6])
    for rank in (0, 1):
        features, labels, places = torch.load(tmp_path / f"out{rank}", weights_only=True)
        assert torch.equal(places, index) and torch.equal(labels, 10 * index)
        assert torch.equal(features, index[:, None] * torch.ones(1, 3))


def test_log_mel_statistics_are_of_the_sound_and_not_of_its_padding():
    sound = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 1000, dtype=torch.bool)
    about = {"label": torch.tensor([3]), "index": torch.tensor([0])}
    padded = {"sample": F.pad(sound, (0, 700)), "valid": F.pad(valid, (0, 700))}
    alone = log_mel_statistics([{"sample": sound, "valid": valid} | about], 8000)
    beside = log_mel_statistics([padded | about], 8000)
    assert alone.features.shape == (1, 128) and alone.labels.tolist() == [3]
    assert torch.allclose(alone.features, beside.features, atol=1e-4)
    louder = log_mel_statistics([{"sample": 10 * sound, "valid": valid} | about], 8000)
    assert torch.allclose(louder.features - alone.features, torch.tensor([20.0] * 64 + [0.0] * 64), atol=0.01)
