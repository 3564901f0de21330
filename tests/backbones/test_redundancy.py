"""Which patches are dropped on the way through a network, and that all others pass as if they had been alone."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.redundancy import least_redundant
from ssd.backbones.vit import attention_of
from ssd.errors import UserError
from tests.backbones.test_vit import NAMES, pictures, vit


def test_of_a_patch_that_is_there_twice_one_is_left():
    a, b, c = torch.eye(4)[:3]
    for row in ([a, a, b, c], [b, a, a, c], [a, b, c, a]):
        kept = least_redundant(torch.stack(row)[None], 3)[0]
        left = torch.stack(row)[kept]
        assert sorted(left.argmax(1).tolist()) == [0, 1, 2], "one of each"
        assert kept.tolist() == sorted(kept.tolist())


def test_the_length_of_a_patch_says_nothing():
    patches = torch.randn(5, 9, 6, generator=torch.Generator().manual_seed(0))
    lengths = torch.rand(5, 9, 1) + 0.1
    assert torch.equal(least_redundant(patches, 6), least_redundant(patches * lengths, 6))


def test_those_nearest_to_one_that_is_compared_with_go_and_no_others():
    """Against a loop over pairs."""
    patches = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1))
    for keep in (11, 9, 5):
        found = least_redundant(patches, keep)
        for row, kept in zip(patches, found, strict=True):
            near = {
                i: max(float(torch.cosine_similarity(row[i], row[j], dim=0)) for j in range(1, 11, 2))
                for i in range(0, 11, 2)
            }
            gone = sorted(near, key=near.get, reverse=True)[: 11 - keep]
            assert kept.tolist() == [place for place in range(11) if place not in gone]


@pytest.mark.parametrize("keep", [0, 2, 8])
def test_more_than_half_cannot_go_at_once(keep):
    with pytest.raises(UserError, match="Keep 3 to 7"):
        least_redundant(torch.randn(1, 7, 4), keep)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_passes_with_the_positions_it_had_and_sees_no_others(name):
    """The same as the whole sequence with every dropped key hidden from attention."""
    backbone = vit(name)
    x = pictures(backbone)
    tokens = backbone(x, keep={0: 9, 2: 5}, taps=(2, 3, "block3.qkv"))
    assert {number: kept.shape for number, kept in tokens.kept.items()} == {0: (2, 9), 2: (2, 5)}
    assert (tokens.kept[0].diff(dim=1) > 0).all() and (tokens.kept[2].diff(dim=1) > 0).all()
    assert all(set(b) <= set(a) for a, b in zip(tokens.kept[0].tolist(), tokens.kept[2].tolist(), strict=True))
    assert torch.equal(tokens.places_in(2), tokens.kept[0]) and torch.equal(tokens.places_in(3), tokens.kept[2])

    prefix = backbone.num_prefix
    grid, sequence, ropes = backbone.embed(x, None, None, None)
    assert torch.equal(tokens.kept[0], least_redundant(sequence[:, prefix:], 9))
    for number, block in enumerate(backbone.blocks, 1):
        shown = torch.zeros(2, 12, dtype=torch.bool).scatter(1, tokens.places_in(number), True)
        keys = torch.cat([torch.ones(2, prefix, dtype=torch.bool), shown], 1)[:, None, None]
        place = {"rope": ropes[number - 1]} if backbone.rotary else {}
        sequence = block(sequence, attn_mask=keys, **place)
    expected = backbone.model.norm(sequence)
    places = prefix + tokens.kept[2]
    assert_close(tokens.patches, expected.gather(1, places[..., None].expand(-1, -1, 24)), atol=1e-4, rtol=1e-4)
    if tokens.cls is not None:
        assert_close(tokens.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert tokens.taps["block2"].shape == (2, prefix + 9, 24), "a tap is what left the block"
    assert tokens.taps["block3.qkv"].shape[3] == prefix + 5, "what a block compares is what it sees"
    assert tokens.grid == grid


def test_among_visible_patches_places_are_those_of_the_picture():
    backbone = vit()
    x, visible = pictures(backbone), torch.tensor([[1, 3, 4, 7, 8, 11], [0, 2, 5, 6, 9, 10]])
    kept = backbone(x, visible=visible, keep={1: 4}).kept[1]
    for row, seen in zip(kept.tolist(), visible.tolist(), strict=True):
        assert len(row) == 4 and set(row) <= set(seen) and row == sorted(row)


def test_without_anything_to_drop_nothing_changes():
    backbone = vit()
    x = pictures(backbone)
    all_of_them = backbone(x, keep={0: 12})
    assert_close(all_of_them.patches, backbone(x).patches, atol=0, rtol=0)
    assert backbone(x).places_in(3) is None


def test_dropping_compiles_without_a_graph_break():
    backbone = vit()
    x = pictures(backbone)

    def answer(x):
        tokens = backbone(x, keep={0: 9, 1: 6}, taps=("block2.qkv",))
        return tokens.patches, tokens.kept[1], tokens.taps["block2.qkv"]

    expected = answer(x)
    compiled = torch.compile(answer, fullgraph=True, backend="eager")
    for ours, plain in zip(compiled(x), expected, strict=True):
        assert_close(ours, plain)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in NAMES), ("vit_tiny_patch16_224", {"qk_norm": True})]
)
def test_queries_keys_and_values_are_those_that_the_block_multiplies(name, settings):
    backbone = vit(name, arguments=settings)
    x = pictures(backbone)
    queries, keys, values = backbone(x, taps=("block2.qkv",), until=2).taps["block2.qkv"]
    assert all(module.fused_attn for module in backbone.attention), "fused attention stays on"
    _, sequence, ropes = backbone.embed(x, None, None, None)
    places = [{"rope": rope} if backbone.rotary else {} for rope in ropes]
    sequence = backbone.blocks[0](sequence, **places[0])
    block = backbone.blocks[1]
    shares = attention_of(block, sequence, places[1])
    assert_close((queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1), shares, atol=1e-5, rtol=1e-4)
    seen = []
    hook = block.attn.proj.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    block(sequence, **places[1])
    hook.remove()
    mixed = getattr(block.attn, "norm", torch.nn.Identity())((shares @ values).transpose(1, 2).flatten(2))
    assert_close(seen[0], mixed, atol=1e-5, rtol=1e-4)


def test_they_are_tapped_beside_compiled_and_recomputed_blocks_too():
    plain, saving = vit(), vit(activation_checkpointing=True)
    x = pictures(plain)
    expected = plain(x, taps=("block2.qkv",)).taps["block2.qkv"]
    expected.square().sum().backward()
    found = saving(x, taps=("block2.qkv",)).taps["block2.qkv"]
    found.square().sum().backward()
    assert_close(found, expected)
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert_close(one.grad, other.grad)
    for block in plain.blocks:
        block.compile(backend="eager")
    assert_close(plain(x, taps=("block2.qkv",)).taps["block2.qkv"], expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": {3: 5}}, "Use 0.* to 2"),
        ({"keep": {1: 5}, "until": 1}, "to 0"),
        ({"keep": {0: 5}}, "Keep 6 to 12"),
        ({"taps": ("block4.qkv",)}, "blocks 1 to 3"),
    ],
)
def test_impossible_questions_are_refused(asked, message):
    backbone = vit()
    with pytest.raises(UserError, match=message):
        backbone(pictures(backbone), **asked)


def test_a_block_that_is_written_in_another_order_is_not_guessed_at():
    class Behind(Block):
        pass

    backbone = vit()
    backbone.blocks[1].__class__ = Behind
    with pytest.raises(UserError, match="Behind normalises or attends in another order"):
        backbone(pictures(backbone), taps=("block2.qkv",))


def test_a_convnet_drops_nothing():
    network = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8})
    with pytest.raises(UserError, match="go on with fewer patches"):
        network(torch.randn(1, 3, 32, 32), keep={1: 4})
    with pytest.raises(UserError, match="Use numbers"):
        network(torch.randn(1, 3, 32, 32), taps=("block1.qkv",))
