import pytest
import torch
from torch.testing import assert_close

from lightning_modules.further_pretraining import FurtherPretraining
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks
from ssd.record import describe
from ssd.views.recipes import PlainViews
from tests.contract import MethodContract, flat_state
from tests.lightning_modules import test_mae
from tests.lightning_modules.test_mae import DECODER, VIT, random_batch


def tiny(**settings) -> FurtherPretraining:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments=VIT)
    return FurtherPretraining(backbone, **{"views": PlainViews(size=32), "lr": 1e-4, **DECODER} | settings)


def begun(steps: int = 4, **settings):
    module = tiny(**settings)
    module.begin_fresh()
    module.train()
    module.begin(steps, 2)
    return module, module.build_optimizers()


def masked_batch(module, samples: int, seed: int):
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


class TestContract(MethodContract):
    """A stage of one step, and one of three with a teacher."""

    def make(self, **engine):
        # keys' biases have no gradient but rounding, of which Adam makes whole steps
        module = tiny(**{"stages": (1.0, 3.0), "lr": 2e-5} | engine)
        module.begin_fresh()
        return module

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def test_the_first_stage_is_mae():
    module, optimizers = begun(lr=1e-3)
    plain = test_mae.tiny(lr=1e-3, lr_rule="none", weight_decay=0.01, views=PlainViews(size=32))
    plain.student.load_state_dict(module.student.state_dict())
    plain.begin(4, 2)
    theirs = plain.train().build_optimizers()
    for step in range(2):
        batch = masked_batch(module, 4, step)
        ours = module.take_step(batch, optimizers).terms if step == 0 else None
        expected = plain.take_step(batch, theirs).terms
        if ours is not None:
            assert ours == expected
            after, plain_after = flat_state(module.student), flat_state(plain.student)
            assert all(torch.equal(after[name], plain_after[name]) for name in plain_after)


def test_the_second_stage_begins_where_the_first_began_with_what_the_first_made_as_its_teacher():
    module, optimizers = begun(lr=1e-2)
    origin = flat_state(module.student)
    for step in range(2):
        last = flat_state(module.student.backbone)
        module.take_step(masked_batch(module, 4, step), optimizers)
    assert module.stage == 1 and not optimizers[0].state
    now = flat_state(module.student)
    assert all(torch.equal(now[name], origin[name]) for name in origin)
    teacher = flat_state(module.teacher.network)
    moved = [name for name in teacher if (teacher[name] != origin[f"backbone.{name}"]).any()]
    assert moved and any((teacher[name] != last[name]).any() for name in moved), "its last step included"


def test_the_distance_is_summed_over_dimensions_and_averaged_over_samples():
    module, _ = begun()
    module.step = 2
    batch = masked_batch(module, 3, 0)
    with torch.no_grad():
        same = module.losses(batch, module.targets(batch))
        assert same["distillation"] == 0, "the teacher is the same network still"
        module.teacher.network.model.norm.bias += 0.1
        apart = module.losses(batch, module.targets(batch))
    assert_close(apart["distillation"], torch.tensor(24 * 0.01), atol=1e-6, rtol=1e-5)
    assert apart["pixels"] == same["pixels"]


def test_without_distillation_there_is_no_second_stage_and_no_term():
    module, optimizers = begun(stages=(1.0,))
    for step in range(3):
        report = module.take_step(masked_batch(module, 4, step), optimizers)
    assert module.stage == 0 and set(report.terms) == {"pixels"}


def test_published_rates_fall_to_what_would_follow_the_last_step():
    module = tiny(lr=FurtherPretraining.__init__.__kwdefaults__["lr"])
    module.begin(40_000, 100)
    rates = [module.value_of(module.lr, step) for step in (0, 5_000, 19_999, 20_000)]
    assert rates == pytest.approx([1.5e-4, 1.5e-4 * 0.75, 1.5e-4 / 20_000, 1.5e-4])


def test_a_run_begins_with_encoder_and_decoder_of_an_mae_run(tmp_path):
    earlier = test_mae.tiny()
    file = tmp_path / "mae.ckpt"
    torch.save({"ssd": {"method": describe(earlier)}, "state_dict": earlier.state_dict()}, file)
    module = tiny(pretrained=str(file))
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(1)
    module.begin_fresh()
    found, kept, expected = (flat_state(m) for m in (module.student, module.origin.network, earlier.student))
    assert all(torch.equal(found[name], expected[name]) and torch.equal(kept[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"stages": (1, 1, 1)}, "or two with distillation"), ({"masks": BlockMasks()}, "Use RandomMasks")],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)
