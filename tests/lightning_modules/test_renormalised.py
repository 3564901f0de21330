"""Prototypes at unit length after each step, in every method that has them under weight normalisation otherwise."""

import pytest
import torch
from torch.testing import assert_close

from ssd.heads import UnitPrototypes
from tests.contract import start
from tests.lightning_modules import test_dinov2, test_franca, test_ibot
from tests.lightning_modules.masked import drawn

SETTINGS = {"renormalize_prototypes": True, "norm_last_layer": True, "freeze_last_layer": 0.0, "lr_rule": "none"}


@pytest.mark.parametrize(
    ("tiny", "settings", "count"),
    [
        (test_ibot.tiny, {}, 1),
        (test_ibot.tiny, {"shared_head": False}, 2),
        (test_dinov2.tiny, {}, 1),
        (test_dinov2.tiny, {"shared_head": False}, 2),
        (test_franca.tiny, {"levels": 2}, 4),
        (test_franca.tiny, {"levels": 2, "projected": True}, 4),
    ],
)
def test_every_head_moves_its_prototypes_and_brings_them_back_to_unit_length(tiny, settings, count):
    module = tiny(lr=0.1, **SETTINGS, **settings)
    optimizers = start(module)
    prototypes = [part for part in module.modules() if isinstance(part, UnitPrototypes)]
    before = [part.weight.clone() for part in prototypes]
    module.take_step(drawn(module, 4, 0), optimizers)
    assert len(prototypes) == 2 * count, "of the student and of the teacher"
    for part, old in zip(prototypes, before):
        assert_close(part.weight.norm(dim=1), torch.ones(len(old)))
    for part, old in zip(prototypes[:count], before):
        assert (part.weight - old).abs().max() > 1e-5
