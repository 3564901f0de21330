import pytest
import torch
from torch.testing import assert_close

from ssd.backbones.drop_path import add_on_subset
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.teachers import EMA

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
NAMES = {"learned": ("vit_tiny_patch16_224", SMALL), "rotary": ("vit_small_patch16_dinov3", SMALL)}


def network(kind="learned", **settings):
    torch.manual_seed(0)
    name, arguments = NAMES[kind]
    return ViT(name, img_size=32, arguments=arguments, **settings)


def test_of_ten_rows_seven_pass_a_branch_and_are_scaled_by_ten_sevenths():
    seen = []

    def branch(rows, kept):
        seen.append((rows, kept))
        return torch.ones_like(rows)

    x = torch.arange(10.0).view(10, 1, 1).expand(10, 2, 3).clone()
    added = add_on_subset(x, 0.3, branch) - x
    rows, kept = seen[0]
    assert len(rows) == 7 and len(set(kept.tolist())) == 7
    assert_close(rows, x[kept])
    wanted = torch.zeros(10)
    wanted[kept] = 10 / 7
    assert_close(added, wanted.view(10, 1, 1).expand(10, 2, 3), atol=1e-5, rtol=0)


def test_one_row_is_always_kept_and_the_mean_over_draws_is_the_whole_branch():
    torch.manual_seed(0)
    x = torch.randn(5, 1, 4)
    assert (add_on_subset(x, 0.99, lambda rows, kept: torch.ones_like(rows)) != x).any(-1).sum() == 1
    mean = torch.stack([add_on_subset(x, 0.4, lambda rows, kept: 2 * rows) for _ in range(4000)]).mean(0)
    assert_close(mean, 3 * x, atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", NAMES)
def test_uniform_means_every_block_and_evaluation_has_none(kind):
    plain, dropped = network(kind), network(kind, drop_path_rate=0.5, drop_path_rule="subset")
    dropped.load_state_dict(plain.state_dict())
    x = torch.randn(6, 3, 32, 32)
    assert all(block.drop_path1.drop_prob == block.drop_path2.drop_prob == 0.5 for block in dropped.blocks)
    assert torch.equal(dropped.eval()(x).patches, plain.eval()(x).patches)
    dropped.train()
    assert not torch.equal(dropped(x).patches, dropped(x).patches)


@pytest.mark.parametrize("kind", NAMES)
def test_a_block_is_both_branches_written_out_for_the_rows_that_were_drawn(kind):
    dropped = network(kind, drop_path_rate=0.5, drop_path_rule="subset").train()
    block = dropped.blocks[1]
    place = {"rope": dropped.model.rope.get_embed((4, 4))} if kind == "rotary" else {}
    scale1, scale2 = (block.gamma_1, block.gamma_2) if kind == "rotary" else (1, 1)
    x = torch.randn(4, 16 + dropped.num_prefix, 24)
    torch.manual_seed(3)
    found = block(x, **place)
    torch.manual_seed(3)
    attend, think = torch.randperm(4)[:2], torch.randperm(4)[:2]
    expected = x.clone()
    for row in attend:
        expected[row] += 2 * (scale1 * block.attn(block.norm1(x[row : row + 1]), **place))[0]
    before = expected.clone()
    for row in think:
        expected[row] += 2 * (scale2 * block.mlp(block.norm2(before[row : row + 1])))[0]
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_of_visible_patches_follow_the_rows_that_are_kept():
    dropped = network("rotary", drop_path_rate=0.5, drop_path_rule="subset").train()
    visible = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(4)])
    tokens = dropped(torch.randn(4, 3, 32, 32), visible=visible)
    assert tokens.patches.shape == (4, 5, 24) and tokens.patches.isfinite().all()


def test_a_teacher_drops_nothing_and_a_rate_of_zero_is_exact():
    student = network(drop_path_rate=0.5, drop_path_rule="subset").train()
    teacher = EMA(student).train()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(teacher(x).patches, student.eval()(x).patches)
    none = network(drop_path_rate=0.0, drop_path_rule="subset").train()
    assert torch.equal(none(x).patches, network().train()(x).patches)


def test_the_weights_are_those_of_timms_own_blocks():
    assert network(drop_path_rate=0.2, drop_path_rule="subset").state_dict().keys() == network().state_dict().keys()


def test_what_cannot_be_dropped_so_is_refused():
    with pytest.raises(UserError, match="drop_path_rule: 'half' is unknown"):
        network(drop_path_rate=0.1, drop_path_rule="half")
    with pytest.raises(UserError, match="'subset' does not know the block ParallelThingsBlock"):
        ViT("vit_small_patch16_18x2_224", drop_path_rate=0.1, drop_path_rule="subset", arguments={"depth": 1})
