import inspect
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_modules.leap import LEAP
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.cka import linear_cka
from ssd.errors import UserError
from ssd.optim import resolve_lr
from ssd.record import build, describe
from ssd.views.recipes import CropViews
from tests.contract import MethodContract, average_gradients, flat_state, poison, run_steps, start

STUDENT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
TEACHER = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8, "reg_tokens": 2}


def vit(**arguments) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, arguments=arguments)


def tiny(teacher: dict = TEACHER, **settings) -> LEAP:
    torch.manual_seed(0)
    defaults = {"views": CropViews(size=32), "mixup_group": 2, "cka_patches": 4, "lr": 1.0, "lr_rule": "none"}
    return LEAP(vit(**STUDENT), vit(**teacher), **defaults | settings)


def random_batch(samples: int, seed: int) -> Batch:
    pictures = torch.randn(1, samples, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Batch(views={"global": pictures}, index=torch.arange(samples), total=samples)


class TestContract(MethodContract):
    """The target moves on in every step, so that what is compared holds several of them."""

    def make(self, **engine):
        return tiny(**{"cka_threshold": 1e-3, "patience": "1 steps", "start_block": 1} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractCalibrated(TestContract):
    def make(self, **engine):
        return tiny(**{"cka_threshold": 0.2, "cka_smoothing": 0.5, "patience": None} | engine)


class TestContractAll(TestContract):
    def make(self, **engine):
        return tiny(match="all", **engine)


def outputs(network: ViT, pictures, blocks: int, final_norm: bool = True):
    """Class token and patches after so many blocks, the network written out."""
    model = network.model
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(pictures)))
    for block in list(model.blocks)[:blocks]:
        tokens = block(tokens)
    tokens = model.norm(tokens) if final_norm else tokens
    return tokens[:, 0], tokens[:, network.num_prefix :]


@pytest.mark.parametrize("final_norm", [True, False])
def test_the_loss_is_the_equation_on_mixed_pictures_of_which_registers_are_no_part(final_norm):
    module = tiny(start_block=3, final_norm=final_norm)
    module.begin(4, 2)
    batch = random_batch(6, 0)
    with torch.no_grad():
        found = module.losses(batch, module.targets(batch))
        pictures = batch.views["global"][0]
        share = find_share(module, batch)
        pictures = share * pictures + (1 - share) * pictures[[1, 0, 3, 2, 5, 4]]
        cls, patches = outputs(module.teacher.network.backbone, pictures, 3, final_norm)
        own_cls, own = outputs(module.student.backbone, pictures, 2)
        project = module.student.projectors[0]
        assert_close(found["patches"], (project(own) - patches).square().mean(), atol=1e-6, rtol=1e-5)
        assert_close(found["cls"], (project(own_cls) - cls).square().mean(), atol=1e-6, rtol=1e-5)
    assert module.at("cls_weight") == 0.05


def find_share(module: LEAP, batch: Batch) -> float:
    x, mixture = batch.views["global"][0], module.seen(batch)[0]
    share = ((mixture[0] - x[1]) * (x[0] - x[1])).sum() / (x[0] - x[1]).square().sum()
    assert 0 <= share < 1
    return float(share)


def test_shares_are_of_the_step_and_the_seed_and_spread_over_all_shares():
    module, batch = tiny(), random_batch(2, 0)
    shares = []
    for module.step in range(200):
        shares.append(find_share(module, batch))
    assert 0.4 < sum(shares) / 200 < 0.6 and min(shares) < 0.05 and max(shares) > 0.95
    module.step = 7
    assert find_share(module, batch) == shares[7]
    other = tiny(mixup_seed=1)
    other.step = 7
    assert find_share(other, batch) != pytest.approx(shares[7], abs=1e-3)
    assert torch.equal(tiny(mixup=False).seen(batch), batch.views["global"])
    uneven = random_batch(5, 0)
    assert torch.equal(tiny().eval().seen(uneven), uneven.views["global"]), "what evaluates takes any number"


def test_the_teacher_stops_at_its_target_and_is_there_what_a_hook_sees_on_the_whole_way():
    module = tiny(start_block=2, final_norm=False, mixup=False)
    module.begin(4, 2)
    batch, seen = random_batch(2, 0), []
    model = module.teacher.network.backbone.model
    hook = model.blocks[1].register_forward_hook(lambda block, given, answer: seen.append(answer))
    model(batch.views["global"][0])
    hook.remove()
    for block in list(model.blocks)[2:]:
        block.register_forward_hook(lambda *_: pytest.fail("a block behind the target was run"))
    tokens = module.targets(batch).tokens[0, :, 0]  # (B, 1 + N, D)
    assert_close(tokens, torch.cat([seen[0][:, :1], seen[0][:, 3:]], dim=1))


def test_the_first_target_is_the_block_that_the_untrained_student_is_most_like():
    same = {**TEACHER, "depth": 3}
    for block in (1, 2, 3):
        torch.manual_seed(0)
        teacher = vit(**same)
        settings = {"views": CropViews(size=32), "mixup_group": 2, "cka_smoothing": 0.5, "patience": None}
        module = LEAP(vit(**{**same, "depth": block}), teacher, **settings)
        student = module.student.backbone.model
        student.load_state_dict({k: v for k, v in teacher.model.state_dict().items() if k in student.state_dict()})
        nn.init.eye_(module.student.projectors[0].get_submodule("0").weight)
        assert module.curriculum.block == 0
        run_steps(module, [random_batch(4, 0)])
        assert (module.curriculum.block, module.curriculum.since) == (block, 0)
        assert module.evident[0] == pytest.approx(1.0, abs=1e-5)


def test_likeness_is_measured_on_what_the_losses_saw_before_the_step():
    module = tiny(start_block=2, cka_patches=None)
    batch = random_batch(8, 0)
    with torch.no_grad():
        pictures = module.seen(batch)
        student = module.student(pictures, (2,))[0, :, 0, 1:].flatten(0, 1)
        teacher = module.teacher(pictures, (2,))[0, :, 0, 1:].flatten(0, 1)
    run_steps(module, [batch])
    assert module.evident[0] == pytest.approx(float(linear_cka(student, teacher)), abs=1e-5)


def test_likeness_is_measured_every_so_many_steps_on_other_patches_each_time():
    module = tiny(start_block=1, cka_every=3, cka_patches=4)
    module.begin(6, 2)
    optimizers, measured = start(module), []
    for step in range(6):
        module.take_step(random_batch(4, step), optimizers)
        measured.append(len(module.evident))
    assert measured == [1, 0, 0, 1, 0, 0]
    places = torch.arange(17.0).expand(1, 2, 1, 17)[..., None]
    module.step = 0
    assert module.measured(places)[0, 0, 0, :, 0].tolist() == [1, 5, 9, 13]
    module.step = 14
    assert module.measured(places)[0, 0, 0, :, 0].tolist() == [15, 3, 7, 11]


def course(module: LEAP, batches: list[Batch]) -> list[tuple[int, int, float]]:
    optimizers, found = start(module), []
    for batch in batches:
        module.take_step(batch, optimizers)
        state = module.curriculum
        found.append((state.block, state.since, state.likeness))
    return found


def test_slices_take_the_same_course_as_the_whole_batch():
    settings = {"cka_threshold": 0.25, "cka_smoothing": 0.5, "patience": "3 steps"}
    batches = [random_batch(8, step) for step in range(8)]
    whole, sliced = course(tiny(**settings), batches), course(tiny(**settings, micro_batches=4), batches)
    assert [step[:2] for step in whole] == [step[:2] for step in sliced]
    assert [step[2] for step in whole] == pytest.approx([step[2] for step in sliced], abs=1e-4)
    assert whole[-1][0] > whole[0][0], "nothing moved on"


def test_a_step_that_is_skipped_moves_nothing_on_and_settles_nothing():
    module = tiny(patience="1 steps")
    optimizers = start(module)
    bad = random_batch(4, 0)
    poison(bad)
    module.take_step(bad, optimizers)
    assert module.curriculum.block == 0 and module.skipped_steps == 1
    module.take_step(random_batch(4, 1), optimizers)
    first = module.curriculum.block
    assert first > 0
    before = module.curriculum.state_dict()
    bad = random_batch(4, 2)
    poison(bad)
    module.take_step(bad, optimizers)
    assert module.curriculum.state_dict() == before


def two_courses(rank: int, world: int) -> list:
    """Each process sees pictures of its own, of other brightness and contrast, which alone would take it another way."""
    module = tiny(cka_threshold=0.3, cka_smoothing=0.5, patience="5 steps")
    optimizers, found = start(module), []
    for step in range(8):
        batch = random_batch(4, 10 * step + rank)
        batch.total = 8
        batch.views["global"] *= 1 + 3 * rank
        module.take_step(batch, optimizers, backward=lambda loss: (loss.backward(), average_gradients(module, world)))
        found.append((module.curriculum.block, module.curriculum.since, module.curriculum.likeness))
    return found


def test_two_processes_that_see_other_pictures_have_one_target(pair):
    first, second = pair.run(two_courses)
    assert first == second and first[-1][0] > first[0][0]


def test_a_resumed_run_goes_on_in_the_middle_of_a_block():
    settings = {"cka_threshold": 0.3, "cka_smoothing": 0.3, "patience": "3 steps"}
    batches = [random_batch(8, step) for step in range(7)]
    straight = tiny(**settings)
    straight.begin(7, 2)
    run_steps(straight, batches)
    first = tiny(**settings)
    first.begin(7, 2)
    optimizers = start(first)
    run_steps(first, batches[:4], optimizers)
    assert first.curriculum.since > 0 or first.curriculum.block > 0
    torch.manual_seed(99)
    second = build(describe(first))
    second.load_state_dict(first.state_dict())
    resumed = start(second)
    resumed[0].load_state_dict(optimizers[0].state_dict())
    run_steps(second, batches[4:], resumed)
    assert second.curriculum.state_dict() == straight.curriculum.state_dict()
    ours, theirs = flat_state(second), flat_state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_new_run_from_anothers_networks_counts_a_blocks_time_anew():
    module = tiny(start_block=3)
    module.curriculum.begin(3, 500)
    module.begin_fresh()
    assert (module.curriculum.block, module.curriculum.since) == (3, 0)


def test_the_baselines_match_the_last_block_or_each_block_with_the_one_as_deep():
    last = tiny(match="last")
    assert last.teacher_blocks == (4,) and len(last.student.projectors) == 1
    each = tiny(match="all", mixup=False)
    assert each.student_blocks == (1, 2) and each.teacher_blocks == (2, 4) and len(each.student.projectors) == 2
    batch = random_batch(4, 0)
    with torch.no_grad():
        found = each.losses(batch, each.targets(batch))["patches"]
        errors = []
        for own, theirs, projector in zip((1, 2), (2, 4), each.student.projectors, strict=True):
            mine = projector(outputs(each.student.backbone, batch.views["global"][0], own)[1])
            errors.append((mine - outputs(each.teacher.network.backbone, batch.views["global"][0], theirs)[1]).square())
    assert_close(found, torch.stack(errors).mean(), atol=1e-6, rtol=1e-5)
    for module in (last, each):
        run_steps(module, [batch])
        assert module.curriculum.block == 0 and module.evident == ()


def test_without_a_class_token_on_one_side_patches_alone_are_matched():
    module = tiny({**TEACHER, "class_token": False, "reg_tokens": 0}, start_block=2)
    batch = random_batch(4, 0)
    targets = module.targets(batch)
    assert targets.tokens.shape == (1, 4, 1, 16, 32)
    assert module.losses(batch, targets).keys() == {"patches"}


def test_the_rate_ends_at_a_thousandth_of_its_peak_in_a_batch_of_any_size():
    rate = inspect.signature(LEAP).parameters["lr"].default
    for batch in (256, 1536, 6144):
        resolved = resolve_lr(rate, "sqrt", 1536, batch)
        assert resolved.start == pytest.approx(9.0 * math.sqrt(batch / 1536))
        assert resolved.end == pytest.approx(1e-3 * resolved.start)


def test_published_rate_of_a_batch_of_256():
    """6 sqrt(256 / 1536) = 2.449."""
    assert resolve_lr(6.0, "sqrt", 1536, 256) == pytest.approx(2.449, abs=1e-3)
    module = tiny(**{"lr": 6.0, "lr_rule": "sqrt"})
    assert (module.lr_rule, module.lr_reference_batch) == ("sqrt", 1536)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"match": "first"}, "match: 'first' is unknown. Choose one of curriculum, last, all"),
        ({"start_block": 5}, "Use 1 to 4"),
        ({"start_block": 0}, "Use 1 to 4"),
        ({"cka_every": 0}, "cka_every: 0"),
        ({"patience": "5 weeks"}, "length '5 weeks' is not understood"),
        ({"cka_patches": 0}, "cka_patches: 0"),
        ({"teacher": {**TEACHER, "patch_size": 16}}, "patches of one size"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_a_convnet_is_refused():
    with pytest.raises(UserError, match=r"LEAP needs a backbone that can stop after a block.*ViT"):
        LEAP(ConvNet("resnet18"), vit(**TEACHER), views=CropViews(size=32))
