import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.teachers import EMA, Frozen


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_the_average_is_m_old_plus_one_minus_m_new():
    student = network()
    teacher = EMA(student)
    old = [p.clone() for p in teacher.network.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.update(student, 0.9)
    for before, after, new in zip(old, teacher.network.parameters(), student.parameters()):
        assert_close(after, 0.9 * before + 0.1 * new)


def test_what_is_copied_is_the_students_own_whatever_the_momentum():
    student = network()
    teacher = EMA(student, shared=("3.",))
    old = teacher.network[0].weight.clone()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.update(student, 0.9)
    assert torch.equal(teacher.network[3].weight, student[3].weight)
    assert_close(teacher.network[0].weight, 0.9 * old + 0.1 * student[0].weight)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_one_is_frozen_and_zero_is_a_copy_to_the_bit(momentum):
    student = network()
    teacher = EMA(student)
    with torch.no_grad():
        for p in student.parameters():
            p.normal_()
    before = [p.clone() for p in teacher.network.parameters()]
    teacher.update(student, momentum)
    wanted = before if momentum == 1 else list(student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.parameters(), wanted))


def test_batch_statistics_are_the_teachers_own_or_averaged_by_policy():
    student = network()
    own, average = EMA(student, buffers="own"), EMA(student, buffers="average")
    for module in (student, own, average):
        module.train()
    x = torch.randn(16, 4) + 3
    for module in (student, own, average):
        module(x)
    assert_close(own.network[1].running_mean, student[1].running_mean)
    assert not average.network[1].running_mean.any(), "an averaging teacher evaluates, so it gathers nothing itself"
    own.update(student, 0.5), average.update(student, 0.5)
    assert_close(own.network[1].running_mean, student[1].running_mean)
    assert_close(average.network[1].running_mean, 0.5 * student[1].running_mean)


def test_a_teacher_is_no_source_of_gradients_or_noise():
    student = network()
    teacher = EMA(student).train()
    x = torch.randn(8, 4, requires_grad=True)
    assert not teacher(x).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(x), teacher(x))
    assert student[2].p == 0.5 and teacher.network[2].p == 0


def test_a_teacher_keeps_its_mode_whatever_its_holder_does():
    holder = nn.ModuleDict(
        {"own": EMA(network(), "own"), "average": EMA(network(), "average"), "frozen": Frozen(network())}
    )
    holder.train()
    assert [holder[name].network.training for name in holder] == [True, False, False]
    holder.eval()
    assert not any(holder[name].network.training for name in holder)


def test_a_student_may_hold_more_than_its_teacher():
    student = network()
    teacher = EMA(student)
    student.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 4)))
    teacher.update(student, 0.9)


def test_what_a_teacher_is_made_without_is_not_in_its_state_and_the_student_keeps_it():
    student = network()
    student.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 4)))
    teacher = EMA(student, without=("mask_token",))
    assert teacher.network.mask_token is None and student.mask_token is not None
    assert set(student.state_dict()) - set(teacher.network.state_dict()) == {"mask_token"}
    teacher.update(student, 0.5)


def test_what_is_shared_is_copied_to_the_bit_and_the_rest_averaged():
    student = network()
    teacher = EMA(student, shared=("0.",))
    old = {name: value.clone() for name, value in teacher.network.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.normal_()
    teacher.update(student, 0.9)
    theirs = dict(student.named_parameters())
    for name, value in teacher.network.named_parameters():
        if name.startswith("0."):
            assert torch.equal(value, theirs[name])
        else:
            assert_close(value, 0.9 * old[name] + 0.1 * theirs[name])
    with pytest.raises(UserError, match="'positions\\.\\.\\.' for its teacher"):
        EMA(student, shared=("positions",))
