"""`ssd verify`: proofs that can fail."""

import copy
import json

import pytest
import torch

from ssd.parity.cases import CASES
from ssd.targets import Sinkhorn
from ssd.teachers import EMA
from ssd.verbs import verify
from tests.verbs.conftest import typed


def checkpoint(step=30, student=0.0, **more):
    state = {
        "student.weight": torch.full((3,), student),
        "teacher.weight": torch.zeros(3),
        "center.center": torch.zeros(2),
        "_extra_state": {"step": step},
    }
    return {"ssd": {}, "state_dict": state | more, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}


def save(folder, contents):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(contents, folder / "checkpoints" / "last.ckpt")


@pytest.fixture
def faked(monkeypatch):
    """Runs that write what they are told to instead of training."""

    def prepare(straight, resumed):
        def fit(folder, workers, resume=False):
            save(folder, resumed if resume else straight)

        def fit_and_kill(folder, workers, kill):
            save(folder, checkpoint(step=kill))
            return kill

        monkeypatch.setattr(verify, "fit", fit)
        monkeypatch.setattr(verify, "fit_and_kill", fit_and_kill)

    return prepare


@pytest.mark.parametrize(
    ("resumed", "parts"),
    [
        (checkpoint(), []),
        (checkpoint(student=1e-45), ["student"]),
        (checkpoint(step=29), ["_extra_state"]),
        (checkpoint(**{"codebook.weight": torch.zeros(1)}), ["codebook"]),
    ],
)
def test_it_is_exact_only_where_every_part_is_equal_to_the_bit(faked, tmp_path, resumed, parts):
    faked(checkpoint(), resumed)
    file = tmp_path / "rows.json"
    said = typed("verify", "resume", "--workers", 0, "--kills", 17, 10, "--json", file)
    rows = json.loads(file.read_text())
    assert said.status == (1 if parts else 0)
    assert [row["case"] for row in rows] == [
        "30 steps against 17, SIGKILL, 13; 0 workers",
        "30 steps against 10, SIGKILL, 20; 0 workers",
    ]
    assert all(row["difference"] == len(parts) and row["ok"] is not bool(parts) for row in rows)
    assert all(part in said.out for part in parts) and ("NO" in said.out) is bool(parts)


def test_the_optimizer_counts():
    one, other = checkpoint(), copy.deepcopy(checkpoint())
    other["optimizer_states"][0]["state"][0]["exp_avg"][1] += 1e-7
    assert verify.digest(one["optimizer_states"]) != verify.digest(other["optimizer_states"])


def test_a_digest_tells_dtypes_shapes_and_signs_apart():
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), -torch.zeros(4), torch.zeros(0)]
    assert len({verify.digest(value) for value in values}) == len(values)
    strided = torch.arange(6.0).reshape(2, 3).t()
    assert verify.digest(strided) == verify.digest(strided.contiguous())


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly_on_this_machine(tmp_path):
    file = tmp_path / "rows.json"
    said = typed("verify", "resume", "--workers", 0, 2, "--kills", 17, 10, "--json", file)
    assert said.status == 0, said.out
    assert all(row["ok"] for row in json.loads(file.read_text()))


# ---------------------------------------------------------------- parity


@pytest.fixture
def few_cases(monkeypatch):
    """Those of targets and teachers, and one method's steps."""
    names = ("centring", "Sinkhorn-Knopp", "teacher average", "DINOv2, Sinkhorn, own heads, 20 steps")
    monkeypatch.setattr(verify, "CASES", [case for case in CASES if case.name in names])


def test_everything_agrees_on_this_machine(tmp_path):
    file = tmp_path / "rows.json"
    said = typed("verify", "parity", "--json", file)
    rows = json.loads(file.read_text())
    assert said.status == 0, said.out
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert all(row["ok"] and row["difference"] <= row["tolerance"] for row in rows)
    assert f"torch {torch.__version__.partition('+')[0]}" in said.out and "timm" in said.out and "cpu" in said.out
    assert "differ:" not in said.out


@pytest.mark.parametrize(
    "broken, named",
    [
        (
            lambda patch: patch.setattr(Sinkhorn.__init__, "__defaults__", (2,)),
            ["Sinkhorn-Knopp", "DINOv2, Sinkhorn, own heads, 20 steps"],
        ),
        (
            lambda patch: patch.setattr(EMA, "update", lambda *arguments: None),
            ["teacher average", "DINOv2, Sinkhorn, own heads, 20 steps"],
        ),
    ],
)
def test_what_is_broken_is_named_in_one_line(few_cases, broken, named, monkeypatch, tmp_path):
    broken(monkeypatch)
    file = tmp_path / "rows.json"
    said = typed("verify", "parity", "--json", file)
    assert said.status == 1
    assert [row["case"] for row in json.loads(file.read_text()) if not row["ok"]] == named
    last = said.out.strip().splitlines()[-1]
    assert last.startswith("2 of 4 cases differ: ") and "report" in last and all(name in last for name in named)


@pytest.mark.parametrize(
    "device, message",
    [
        ("cuda:9", "--device cuda:9: torch finds"),
        ("gpu", "--device gpu is no device. Use cpu, cuda or cuda:1."),
        ("meta", "tolerances are known for cpu and cuda"),
    ],
)
def test_a_device_that_is_not_here_is_refused(device, message):
    said = typed("verify", "parity", "--device", device)
    assert said.status == 2 and message in said.err


def test_half_of_float32_is_not_used_and_comes_back():
    torch.set_float32_matmul_precision("medium")
    try:
        with verify.float32_throughout():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
def test_everything_agrees_on_a_gpu():
    said = typed("verify", "parity", "--device", "cuda")
    assert said.status == 0, said.out
