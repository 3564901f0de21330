"""What is broken in a part or a method is seen by every case that holds it, and by no other of its family."""

import pytest

import lightning_modules.data2vec
import lightning_modules.data2vec2
from ssd.losses.regression import absolute_error
from ssd.masking.recipes import InverseSquareMasks
from ssd.parity.cases import CASES
from tests.parity.test_parity import momentum_off, row


def family(module):
    """Names of the cases that a module of `ssd.parity` computes."""
    return {case.name for case in CASES if case.compute.__module__ == f"ssd.parity.{module}"}


def seen(module):
    return {name for name in family(module) if not row(name)["ok"]}


# ---------------------------------------------------------------- averages of inner layers

DATA2VEC, MEAN, SUM = (
    f"{name}, 20 steps" for name in ("data2vec", "data2vec 2.0", "data2vec 2.0 with the published sum")
)


def layers_as_they_are(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "instance_normed", lambda layer: layer)


def last_layer_alone(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec, "average", lambda layers: layers[-1])


def absolute(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "squared_error", absolute_error)


def sum_of_two_processes(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "world_size", lambda: 2)


def nothing_is_shared(monkeypatch):
    monkeypatch.setattr(lightning_modules.data2vec2, "shared_names", lambda shared: [])


def quadratic_below_one(monkeypatch):
    error = lightning_modules.data2vec.smooth_error
    monkeypatch.setattr(
        lightning_modules.data2vec, "smooth_error", lambda said, told, beta: error(said, told, beta / 2)
    )


def fewer_squares(monkeypatch):
    monkeypatch.setattr(InverseSquareMasks.__init__, "__defaults__", (0.2, 3, -0.1))


LAYER_FAULTS = [
    (momentum_off, {DATA2VEC, MEAN, SUM}),
    (layers_as_they_are, {MEAN, SUM}),
    (last_layer_alone, {DATA2VEC}),
    (quadratic_below_one, {DATA2VEC}),
    (absolute, {MEAN, SUM}),
    (sum_of_two_processes, {SUM}),
    (nothing_is_shared, {SUM}),
    (fewer_squares, {"masks, inverse squares (data2vec 2.0)"}),
]


@pytest.mark.parametrize("fault, named", LAYER_FAULTS, ids=[fault.__name__ for fault, _ in LAYER_FAULTS])
def test_a_fault_in_averages_of_layers(fault, named, monkeypatch):
    fault(monkeypatch)
    assert seen("layer_targets") == named
