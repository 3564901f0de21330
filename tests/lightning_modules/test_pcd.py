import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.pcd import PCD
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.projection import Projection
from ssd.views.overlap import sampled, shared_places
from ssd.views.recipes import CropViews, DINOViews
from tests.contract import MethodContract, flat_state, run_steps, start
from tests.lightning_modules.runs import fit

CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16, "reg_tokens": 1}
VIEWS = DINOViews(global_size=64, local_count=0)


def convnet_teacher() -> ConvNet:
    return ConvNet("resnet18", arguments=RESNET)


def tiny(**settings) -> PCD:
    """A student whose map is 2 x 2, without batch normalisation, and by default a ViT's of 4 x 4."""
    torch.manual_seed(0)
    teacher = settings.pop("teacher", None) or ViT("vit_tiny_patch16_224", img_size=64, arguments=VIT)
    defaults = {
        "views": VIEWS, "queue_size": 24, "attention_heads": 2, "head_hidden_dim": 32, "head_batch_norm": False,
        "lr": 1.0, "lr_rule": "none",
    }  # fmt: skip
    return PCD(ConvNet("convnext_tiny", arguments=CONVNEXT), teacher, **defaults | settings)


def random_batch(samples: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(2, samples, 3, 64, 64, generator=generator)
    corners = torch.rand(2, samples, 2, generator=generator) * 30
    sides = 20 + torch.rand(2, samples, 2, generator=generator) * 20
    flips = torch.rand(2, samples, 1, generator=generator).round()
    boxes = torch.cat([corners, sides, flips], dim=-1)
    return Batch(views={"global": pictures}, index=torch.arange(samples), total=samples, boxes={"global": boxes})


class TestContract(MethodContract):
    """The queue of 24 is filled in the third of four steps of eight."""

    def make(self, **engine):
        return tiny(**engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractBoxes(TestContract):
    def make(self, **engine):
        return tiny(pairing="boxes", **engine)


def filled(module: PCD, samples: int = 4) -> Batch:
    """A batch, with a queue that is full of others."""
    for seed in range(100, 100 + 24 // samples):
        module.queue.update(module.targets(random_batch(samples, seed)).keys[0])
    assert module.queue.valid.all()
    return random_batch(samples, 0)


def teacher_maps(module: PCD, pictures: Tensor) -> Tensor:
    model = module.teacher.network.backbone.model
    return model.forward_features(pictures)[:, 2:].mT.unflatten(2, (4, 4))


def student_maps(module: PCD, pictures: Tensor) -> Tensor:
    student = module.student
    return student.head(student.attention(student.backbone.model.forward_features(pictures)))


def plain_loss(student: Tensor, target: Tensor, queue: Tensor) -> Tensor:
    """The paper's equation place by place. (B, d, h, w), (B, d, h, w), (K, d) -> (B,)"""
    losses = []
    for s, t in zip(student.flatten(2), target.flatten(2), strict=True):
        of_places = []
        for i in range(s.shape[1]):
            x, y = s[:, i] / s[:, i].norm(), t[:, i] / t[:, i].norm()
            above = torch.exp(x @ y / 0.2)
            of_places.append(-torch.log(above / (above + torch.exp(queue @ x / 0.2).sum())))
        losses.append(torch.stack(of_places).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("pairing", ["same", "index"])
def test_the_loss_is_the_equation_for_every_place_of_either_view(pairing):
    module = tiny(pairing=pairing).eval()
    with torch.no_grad():
        batch = filled(module)
        found = module.losses(batch, module.targets(batch))["pixels"]
        views = batch.views["global"]
        expected = []
        for view in (0, 1):
            target = F.avg_pool2d(teacher_maps(module, views[view if pairing == "same" else 1 - view]), 2)
            expected.append(plain_loss(student_maps(module, views[view]), target, module.queue.vectors).mean())
    assert_close(found, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)


def test_batch_normalisation_sees_one_view_at_a_time():
    module = tiny(head_batch_norm=True)
    views = random_batch(4, 0).views["global"]
    both = module.student(views)
    for view in (0, 1):
        assert_close(both[view : view + 1], module.student(views[view : view + 1]))


def test_first_views_alone_enter_the_queue():
    module = tiny()
    batch = random_batch(4, 0)
    targets = module.targets(batch)
    module.update(targets)
    assert int(module.queue.filled) == 4 and torch.equal(module.queue.vectors[:4], targets.keys[0])


def test_places_that_boxes_pair_show_the_same_part_and_views_apart_do_not_count():
    module = tiny(pairing="boxes").eval()
    with torch.no_grad():
        batch = filled(module, 6)
        batch.boxes["global"][:, 0] = torch.tensor([[0.0, 0, 10, 10, 0], [30, 30, 10, 10, 1]])
        found = module.losses(batch, module.targets(batch))["pixels"]
        views, boxes, losses = batch.views["global"], batch.boxes["global"], []
        for view in (0, 1):
            mine, theirs, valid = shared_places(boxes[view], boxes[1 - view], (2, 2))
            student = sampled(student_maps(module, views[view]), mine)
            target = sampled(teacher_maps(module, views[1 - view]), theirs)
            assert not valid[0] and valid.any()
            losses.append(plain_loss(student, target, module.queue.vectors)[valid])
    assert_close(found, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)


def test_the_same_crop_twice_is_paired_by_boxes_as_by_index_and_views_without_common_parts_cost_nothing():
    boxes, index = tiny(pairing="boxes"), tiny(pairing="index")
    batch = random_batch(4, 0)
    batch.boxes["global"][:] = torch.tensor([3.0, 4, 20, 20, 0])
    filled(boxes), filled(index)
    maps = boxes.targets(batch).pixels
    # the same places: of 4 x 4 cells the corners of each four, whose bilinear mean is the pooled one
    assert_close(maps, index.targets(batch).pixels, atol=1e-5, rtol=1e-5)
    batch.boxes["global"][1] = torch.tensor([90.0, 90, 20, 20, 0])
    loss = boxes.losses(batch, boxes.targets(batch))["pixels"]
    assert float(loss.detach()) == 0 and loss.requires_grad


def with_projector(**settings) -> tuple[PCD, Projection]:
    torch.manual_seed(1)
    head = Projection((16, 32, 12))
    nn.init.normal_(head[1].running_mean)
    nn.init.uniform_(head[1].running_var, 0.5, 2.0)
    return tiny(teacher=convnet_teacher(), teacher_head=head, **settings), head


def test_what_the_queue_takes_in_is_the_teachers_own_embedding_of_whole_pictures():
    module, head = with_projector()
    batch = random_batch(4, 0)
    run_steps(module, [batch])
    network = module.teacher.network.backbone
    with torch.no_grad():
        embedding = F.normalize(head(network.model(batch.views["global"][0])), dim=-1)
    assert_close(module.queue.vectors[:4], embedding, atol=1e-5, rtol=1e-5)
    assert int(module.queue.filled) == int(module.queue.place) == 4, "of one view"


def test_the_teacher_never_trains_and_its_statistics_stay():
    module, _ = with_projector()
    before = flat_state(module.teacher)
    run_steps(module, [random_batch(4, seed) for seed in range(3)])
    module.train()
    assert not any(part.training for part in module.teacher.modules())
    after = flat_state(module.teacher)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert module.evaluated_backbone is module.student.backbone


def test_slices_are_not_refused_for_normalisation_that_evaluates(tmp_path):
    torch.manual_seed(0)
    student = ConvNet("convnext_tiny", in_chans=1, arguments=CONVNEXT)
    teacher = ConvNet("resnet18", in_chans=1, arguments=RESNET)
    settings = {"views": VIEWS, "queue_size": 16, "attention_heads": 0, "head_hidden_dim": 16, "head_batch_norm": False}
    module = PCD(student, teacher, teacher_head=Projection((16, 8)), micro_batches=2, steps=1, **settings)
    fit(tmp_path, module, limit_val_batches=0, checkpoints={"every_n_epochs": 0})
    assert module.step == 1 and int(module.queue.filled) == 16


def test_loss_ignores_the_length_of_features_and_where_places_lie_but_not_which_meet():
    module = tiny()
    batch = filled(module)
    targets = module.targets(batch)

    class Says(nn.Module):
        maps = torch.randn(2, 4, 24, 2, 2)

        def forward(self, views):
            return self.maps

    module.student = Says()
    loss = module.losses(batch, targets)["pixels"]
    Says.maps = 7 * Says.maps
    assert_close(module.losses(batch, targets)["pixels"], loss)
    Says.maps = Says.maps.flip(3)
    assert abs(float(module.losses(batch, targets)["pixels"] - loss)) > 1e-3
    targets._tensors["pixels"] = targets.pixels.flip(3)
    assert_close(module.losses(batch, targets)["pixels"], loss)


def test_attention_is_left_behind_and_what_only_pooled_features_pass_is_not_trained():
    module = tiny()
    still = [name for name, p in module.student.named_parameters() if not p.requires_grad]
    assert still == ["backbone.model.head.norm.weight", "backbone.model.head.norm.bias"]
    assert not any("attention" in name for name in module.evaluated_backbone.state_dict())
    assert tiny(attention_heads=0).student.attention is None


def test_published_rate_is_four_for_a_batch_of_1024_and_no_epoch_has_none():
    module = tiny(**{"lr": PCD.__init__.__kwdefaults__["lr"], "lr_rule": "linear"})
    module.begin(100 * 10, 10)
    optimizers, rates = start(module), []
    for module.step in (0, 5, 99, 100, 999):
        module._write_rates(module.optimized()[0], optimizers[0], 1024)
        rates.append(optimizers[0].param_groups[0]["lr"])
    assert rates[2:4] == pytest.approx([4.0, 4.0]) and rates[0] == 0 and 0.1 < rates[1] < 0.3 and rates[4] < 0.01


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pairing": "near"}, "pairing: 'near' is unknown. Choose one of same, boxes, index"),
        ({"pairing": "index", "views": CropViews(size=64)}, "pairing: index needs two"),
        ({"pairing": "boxes", "views": DINOViews(global_size=64, local_count=0, rotate=5.0)}, "Set rotate and shear"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"teacher_head": Projection((16, 8))}, "teacher_head takes 16 numbers and the teacher's map has 24"),
        ({"attention_heads": 5}, "attention_heads: 5"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_a_teacher_with_a_coarser_map_is_refused():
    with pytest.raises(UserError, match=r"1 x 1 and the student's 2 x 2.*as fine or finer"):
        tiny(teacher=ViT("vit_tiny_patch16_224", img_size=64, arguments={**VIT, "patch_size": 64}))


def test_a_queue_smaller_than_a_step_is_refused():
    with pytest.raises(UserError, match="queue_size: 2 is less than the 4 samples"):
        run_steps(tiny(queue_size=2), [random_batch(4, 0)])
