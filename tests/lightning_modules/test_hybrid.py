import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.hybrid import HybridDistillation, kept_counts, rows_at, shared_tokens
from ssd.backbones.convnet import ConvNet
from ssd.backbones.redundancy import least_redundant
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.relations import compared, relation_logits
from ssd.schedules import Linear
from ssd.views.recipes import CropViews
from tests.contract import MethodContract, run_steps, start

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
DATA = torch.tensor([[0.2, 0.5, 0.7], [0.1, 0.2, 0.3]])


def vit(seed: int = 0, **arguments) -> ViT:
    torch.manual_seed(seed)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments={**SMALL, **arguments})
    with torch.no_grad():
        for parameter in backbone.parameters():  # as drawn, attention is nearly even and would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def tiny(**settings) -> HybridDistillation:
    given = {
        "relation_teacher": vit(1, embed_dim=36, depth=6, num_heads=3),
        "feature_teacher": vit(2, embed_dim=40, depth=2),
        "relation_heads": 3,
        "views": CropViews(size=32),
        "drop_ratio": 0.25,
        "lr": 1e-4,
        "lr_rule": "none",
    }
    backbone = settings.pop("backbone", None) or vit(0)
    torch.manual_seed(3)
    return HybridDistillation(backbone, **given | settings)


def random_batch(samples: int, seed: int, side: int = 32) -> Batch:
    pictures = torch.randn(1, samples, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return Batch({"global": pictures}, torch.arange(samples), samples, normalisation=DATA)


def terms(module: HybridDistillation, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))


class TestContract(MethodContract):
    def make(self, **engine):
        return tiny(**engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


@pytest.mark.parametrize("alone", ["relation_teacher", "feature_teacher"])
def test_with_one_teacher_all_that_is_trained_gets_a_gradient(alone):
    """What nothing asks for stands still, so that processes wait for no gradient that never comes."""
    other = {"relation_teacher": "feature_teacher", "feature_teacher": "relation_teacher"}[alone]
    module = tiny(**{other: None})
    batch = random_batch(4, 0)
    with torch.no_grad():
        targets = module.targets(batch)
    found = module.losses(batch, targets)
    assert list(found) == [alone.partition("_")[0]]
    sum(found.values()).backward()
    silent = [name for name, p in module.student.named_parameters() if p.requires_grad and p.grad is None]
    still = [name for name, p in module.student.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not silent and not still
    frozen = {name for name, p in module.student.backbone.model.named_parameters() if not p.requires_grad}
    if alone == "relation_teacher":
        assert module.student.projector is None
        assert {
            "norm.weight",
            "blocks.2.mlp.fc1.weight",
            "blocks.1.mlp.fc1.weight",
            "blocks.1.attn.proj.bias",
        } <= frozen
        assert not any(
            name.startswith(("blocks.0.", "blocks.1.attn.qkv", "blocks.1.norm1", "patch")) for name in frozen
        )
    else:
        assert not frozen


def plain_pass(backbone: ViT, x: torch.Tensor, until: int, keep: dict[int, int] | None = None):
    """Sequences that enter each block, and what leaves the last, with plain timm parts; places that each block sees."""
    model = backbone.model
    sequence = model._pos_embed(model.patch_embed(x))
    places, entering, seen = torch.arange(16).expand(len(x), -1), [], []
    for number in range(until):
        if keep and number in keep:
            chosen = least_redundant(sequence[:, 1:], keep[number])
            rows = [torch.cat([row[:1], row[1:][which]]) for row, which in zip(sequence, chosen, strict=True)]
            sequence, places = torch.stack(rows), places.gather(1, chosen)
        entering.append(sequence)
        seen.append(places)
        sequence = model.blocks[number](sequence)
    return entering, seen, sequence


def plain_relation(block, sequence: torch.Tensor, heads: int) -> torch.Tensor:
    """Logits of queries and keys in so many heads, (n, n) each, for one picture's tokens (n, D)."""
    queries, keys, _ = (block.norm1(sequence) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
    width = queries.shape[1] // heads
    parts = [slice(width * head, width * head + width) for head in range(heads)]
    return torch.stack([queries[:, part] @ keys[:, part].T / math.sqrt(width) for part in parts])


def test_the_loss_is_that_of_the_equations_written_out():
    """Picture by picture, with dropping, teachers of other depth, width and heads."""
    module = tiny(relation_blocks=[1, 3], teacher_relation_blocks=[2, 5])
    batch = random_batch(3, 0)
    found = terms(module, batch)
    backbone, x = module.student.backbone, batch.views["global"][0]
    relating, describing = module._relating, module._describing
    with torch.no_grad():
        mine, seen, last = plain_pass(backbone, x, 3, {0: 12, 1: 9, 2: 7})
        theirs, _, _ = plain_pass(relating, x, 5)
        _, _, described = plain_pass(describing, x, 2)
        divergences, errors = [], []
        for own, other in ((1, 2), (3, 5)):
            for sample in range(3):
                kept = [0, *(1 + place for place in seen[own - 1][sample].tolist())]
                student = plain_relation(backbone.blocks[own - 1], mine[own - 1][sample], 3)
                teacher = plain_relation(relating.blocks[other - 1], theirs[other - 1][sample], 3)
                for head in range(3):
                    for row, place in enumerate(kept):
                        p = torch.softmax(teacher[head, place, kept], 0)  # of the kept alone: it sums to 1
                        q = torch.softmax(student[head, row], 0)
                        assert_close(p.sum(), torch.tensor(1.0))
                        divergences.append((p * (p / q).log()).sum())
        counted = {1: 13, 3: 8}
        first, second = 3 * 3 * counted[1], 3 * 3 * counted[3]
        assert len(divergences) == first + second
        each = torch.stack(divergences)
        assert_close(found["relation"], (each[:first].mean() + each[first:].mean()) / 2, atol=1e-5, rtol=1e-4)

        projected = module.student.projector[0](backbone.model.norm(last))
        for sample in range(3):
            for row, place in enumerate([0, *(1 + place for place in seen[2][sample].tolist())]):
                token = described[sample, place]
                target = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
                error = (projected[sample, row] - target).abs()
                errors.append(torch.where(error < 2, error**2 / 4, error - 1).mean())
    assert len(errors) == 3 * 8
    assert_close(found["feature"], torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("relation", ["qk", "kk", "vv"])
def test_a_student_that_is_its_teacher_and_drops_nothing_pays_nothing_and_is_not_moved(relation):
    module = tiny(
        backbone=vit(5),
        relation_teacher=vit(5),
        relation_heads=None,
        feature_teacher=None,
        drop_ratio=0.0,
        relation=relation,
    )
    batch = random_batch(2, 0)
    with torch.no_grad():
        targets = module.targets(batch)
    loss = module.losses(batch, targets)["relation"]
    assert loss.abs() < 1e-6
    loss.backward()
    gradients = [p.grad for p in module.student.parameters() if p.grad is not None]
    assert gradients and all(gradient.abs().max() < 1e-5 for gradient in gradients)
    with torch.no_grad():
        module.student.backbone.blocks[0].attn.qkv.weight.mul_(1.5)
    assert terms(module, batch)["relation"] > 1e-3


def test_rows_of_what_is_left_sum_to_one_and_slicing_probabilities_would_not():
    qkv = torch.randn(3, 2, 2, 17, 6, generator=torch.Generator().manual_seed(0))
    pair = compared(qkv, "qk", 2).transpose(0, 1)
    places = torch.tensor([[0, 3, 4], [2, 7, 15]])
    kept = rows_at(pair, places, True, dim=3).transpose(0, 1)
    rows = relation_logits(kept).softmax(-1)
    assert_close(rows.sum(-1), torch.ones(2, 2, 4))
    whole = relation_logits(pair.transpose(0, 1))
    for sample in range(2):
        index = [0, *(1 + places[sample]).tolist()]
        sliced = whole[sample][:, index][:, :, index]
        assert_close(rows[sample], sliced.softmax(-1))
        assert whole[sample].softmax(-1)[:, index][:, :, index].sum(-1).max() < 0.9


def test_kept_counts_are_whole_and_fall():
    assert kept_counts(196, 0.3, 3) == [138, 97, 68]
    assert kept_counts(100, 0.1, 3) == [90, 81, 73]
    assert kept_counts(190, 0.3, 1) == [133], "57 go, not 56"
    for ratio in (0.1, 0.3, 0.5):
        counts = [196, *kept_counts(196, ratio, 3)]
        assert all(a > b and a - b == math.floor(ratio * a + 1e-9) for a, b in zip(counts, counts[1:], strict=False))


def test_places_are_thirds_of_the_way_and_patches_alone_are_dropped():
    backbone = vit(0, depth=6, reg_tokens=2)
    module = tiny(backbone=backbone, drop_ratio=0.5)
    assert module.student.drop_behind == (0, 2, 4) and module.relation_blocks == (2, 4)
    assert module._teachers.relation_blocks == (2, 4)
    tokens, features = module.student(random_batch(2, 0).views["global"])
    assert {number: kept.shape[1] for number, kept in tokens.kept.items()} == {0: 8, 2: 4, 4: 2}
    assert tokens.cls is not None and tokens.registers.shape == (2, 2, 24)
    assert features.shape == (2, 1 + 2, 40), "the class token and what is left, without registers"
    assert set(terms(module, random_batch(2, 0))) == {"relation", "feature"}


def test_class_tokens_count_where_both_networks_have_one():
    sequence = torch.arange(7.0).view(1, 7, 1)
    backbone = vit(0, reg_tokens=2)
    assert shared_tokens(sequence, backbone, True, dim=1).flatten().tolist() == [0, 3, 4, 5, 6]
    assert shared_tokens(sequence, backbone, False, dim=1).flatten().tolist() == [3, 4, 5, 6]
    without = tiny(
        relation_teacher=vit(1, class_token=False), feature_teacher=vit(2, class_token=False), relation_heads=2
    )
    targets = without.targets(random_batch(2, 0))
    assert targets.features.shape == (1, 2, 16, 24) and targets.relation0.shape == (1, 2, 2, 2, 16, 12)
    assert set(terms(without, random_batch(2, 0))) == {"relation", "feature"}


@pytest.mark.parametrize("off", ["relation", "feature"])
def test_a_weight_of_zero_leaves_its_teacher_uncalled(off):
    calls = {"relation": 0, "feature": 0}
    teachers = {"relation_teacher": vit(1), "feature_teacher": vit(2)}

    def counted(kind: str):
        def count(*_):
            calls[kind] += 1

        return count

    for name, network in teachers.items():
        network.register_forward_hook(counted(name.partition("_")[0]))
    module = tiny(**teachers, relation_heads=2, **{f"{off}_weight": 0.0})
    run_steps(module, [random_batch(4, 0), random_batch(4, 1)])
    (on,) = {"relation", "feature"} - {off}
    assert calls == {off: 0, on: 2}
    assert len([p for p in module.teacher.parameters()]) == len([p for p in teachers[f"{on}_teacher"].parameters()])
    both = tiny(**teachers, relation_heads=2, **{f"{off}_weight": Linear(0.0, 1.0)})
    run_steps(both, [random_batch(4, 0)])
    assert calls == {off: 1, on: 3}, "a weight that grows from 0 is no absence"


def test_weights_weigh_their_terms():
    module = tiny(relation_weight=0.5, feature_weight=2.0)
    report = module.take_step(random_batch(4, 0), start(module))
    assert report.total == pytest.approx(0.5 * report.terms["relation"] + 2 * report.terms["feature"])


def test_the_relation_teacher_stops_at_its_deepest_tap():
    module = tiny()
    batch = random_batch(2, 0)
    before = terms(module, batch)
    blocks, calls = module._relating.blocks, []
    assert module._teachers.relation_blocks == (2, 4)
    for block in blocks[4:]:
        block.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.fill_(float("nan"))
    assert terms(module, batch) == before and not calls


def test_teachers_with_other_patches_and_normalisations_are_shown_their_own_pictures():
    """The student sees 64 px in 8 x 8 patches of 8; a teacher with patches of 4 sees 32 px, by the statistics of CLIP."""
    module = tiny(
        relation_teacher=vit(1, patch_size=4), relation_heads=2, relation_normalize="clip", feature_normalize="imagenet"
    )
    shown = {}
    for name, network in (("relation", module._relating), ("feature", module._describing)):
        network.register_forward_pre_hook(lambda module, given, name=name: shown.update({name: given[0]}))
    batch = random_batch(2, 0, side=64)
    raw = batch.views["global"][0] * DATA[1][:, None, None] + DATA[0][:, None, None]
    assert set(terms(module, batch)) == {"relation", "feature"}
    mean, std = (torch.tensor(row)[:, None, None] for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert_close(shown["feature"], (raw - mean) / std, atol=1e-4, rtol=1e-4)
    clip = [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    mean, std = (torch.tensor(row)[:, None, None] for row in clip)
    expected = F.interpolate((raw - mean) / std, (32, 32), mode="bicubic", antialias=True)
    assert_close(shown["relation"], expected, atol=1e-4, rtol=1e-4)
    batch.normalisation = None
    with pytest.raises(UserError, match="does not say"):
        module.targets(batch)


def test_what_is_evaluated_and_exported_is_the_whole_student():
    module = tiny()
    assert module.evaluated_backbone is module.student.backbone
    assert module.evaluated_backbone(random_batch(2, 0).views["global"][0]).patches.shape == (2, 16, 24)


def test_a_run_without_weights_of_its_teachers_is_refused_before_its_first_step(tmp_path):
    module = tiny()
    with pytest.raises(UserError, match="relation_teacher: 'vit_tiny_patch16_224' has no weights"):
        module.begin_fresh()
    file = tmp_path / "teacher.pth"
    torch.save(vit(1).model.state_dict(), file)

    def loaded() -> ViT:
        return ViT("vit_tiny_patch16_224", img_size=32, weights=str(file), arguments=SMALL)

    with pytest.raises(UserError, match=r"feature_teacher: .* has no weights"):
        tiny(relation_teacher=loaded(), relation_heads=2).begin_fresh()
    tiny(relation_teacher=loaded(), relation_heads=2, feature_teacher=None).begin_fresh()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"relation_teacher": None, "feature_teacher": None}, "no teacher with a weight above 0"),
        ({"relation_weight": 0.0, "feature_teacher": None}, "no teacher with a weight above 0"),
        ({"relation": "qv"}, "Choose one of qk, kk, vv"),
        ({"feature_distance": "cosine"}, "Choose one of smooth_l1, l2"),
        ({"relation_blocks": [4]}, "relation_blocks: .*1 to 3"),
        ({"relation_blocks": []}, "relation_blocks: .*1 to 3"),
        ({"teacher_relation_blocks": [1, 7]}, "teacher_relation_blocks: .*1 to 6"),
        ({"teacher_relation_blocks": [1]}, "as many of each"),
        ({"relation_heads": 5}, "24 and 36. Use a divisor of 12"),
        ({"drop_ratio": 0.6}, "no share from 0 to .5"),
        ({"drop_behind": [0, 3]}, "to 2"),
        ({"drop_behind": [1, 0]}, "growing numbers"),
        ({"relation_normalize": "openai"}, "relation_normalize"),
        ({"feature_teacher": "convnet"}, "hybrid distillation as a teacher needs"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    if settings.get("feature_teacher") == "convnet":
        settings = {"feature_teacher": ConvNet("resnet18")}
    with pytest.raises(UserError, match=said):
        tiny(**settings)
