import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.testing import assert_close

from ssd.backbones.base import set_drop_path_zero
from ssd.backbones.vit import ViT, attention_of
from ssd.benchmarks.memory import peak_bytes
from ssd.errors import UserError
from ssd.record import build, describe

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 2}
NAMES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_240",  # no class token
    "vit_base_patch16_clip_224",  # a norm before the blocks
    "vit_small_patch16_dinov3",  # rotary positions and registers
    "vit_small_patch16_rope_mixed_224",  # rotary positions of each block and head
    "eva02_tiny_patch14_224",  # learned and rotary positions
]


def vit(name: str = "vit_tiny_patch16_224", **settings) -> ViT:
    torch.manual_seed(0)
    backbone = ViT(name, arguments={**TINY, **settings.pop("arguments", {})}, **settings).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():  # timm's zeros and tiny scales would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def pictures(backbone: ViT, rows: int = 3, columns: int = 4, batch: int = 2, seed: int = 1) -> Tensor:
    size = (rows * backbone.patch[0], columns * backbone.patch[1])
    return torch.randn(batch, backbone.in_chans, *size, generator=torch.Generator().manual_seed(seed))


def some_visible(batch: int, tokens: int, count: int, seed: int = 2) -> Tensor:
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :count].sort(1).values


def plain_vit(
    backbone: ViT, x: Tensor, masked: Tensor | None, token: Tensor | None, visible: Tensor | None, until: int
) -> Tensor:
    """A pre-norm ViT with a class token written out from its state dict. All tokens, (B, 1 + n, D)."""
    w, width, heads = backbone.model.state_dict(), backbone.embed_dim, 2
    patch = backbone.patch_size
    pixels = x.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, h, w, p, p)
    grid = pixels.shape[2:4]
    pixels = pixels.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B, N, C p p)
    patches = pixels @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    if masked is not None:
        patches = patches.clone()
        patches[masked] = token
    pos = resample_abs_pos_embed(w["pos_embed"], new_size=list(grid))
    patches = patches + pos[:, 1:]
    if visible is not None:
        patches = torch.stack([patches[b, visible[b]] for b in range(len(x))])
    z = torch.cat([(w["cls_token"] + pos[:, :1]).expand(len(x), -1, -1), patches], 1)

    def norm(y: Tensor, key: str) -> Tensor:
        return F.layer_norm(y, (width,), w[f"{key}.weight"], w[f"{key}.bias"], eps=1e-6)

    for i in range(until):
        key = f"blocks.{i}"
        qkv = norm(z, f"{key}.norm1") @ w[f"{key}.attn.qkv.weight"].T + w[f"{key}.attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = ((q @ k.mT) / math.sqrt(width // heads)).softmax(-1) @ v
        z = z + mixed.transpose(1, 2).flatten(2) @ w[f"{key}.attn.proj.weight"].T + w[f"{key}.attn.proj.bias"]
        hidden = F.gelu(norm(z, f"{key}.norm2") @ w[f"{key}.mlp.fc1.weight"].T + w[f"{key}.mlp.fc1.bias"])
        z = z + hidden @ w[f"{key}.mlp.fc2.weight"].T + w[f"{key}.mlp.fc2.bias"]
    return norm(z, "norm")


@pytest.mark.parametrize("until", [1, 3])
@pytest.mark.parametrize("with_visible", [False, True])
@pytest.mark.parametrize("with_masked", [False, True])
def test_agrees_with_a_plain_statement_of_the_equations(with_masked, with_visible, until):
    """Covers where the mask token enters (before positions), what `visible` leaves, where `until` stops."""
    backbone = vit(img_size=96)
    x, token = pictures(backbone), torch.randn(1, 24)
    masked = torch.rand(2, 12) < 0.4 if with_masked else None
    visible = some_visible(2, 12, 5) if with_visible else None
    tokens = backbone(x, masked=masked, mask_token=token, visible=visible, until=until)
    expected = plain_vit(backbone, x, masked, token, visible, until)
    assert_close(tokens.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert_close(tokens.patches, expected[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_answers_what_timm_answers(name):
    backbone = vit(name)
    x = pictures(backbone)
    tokens = backbone(x)
    assert_close(tokens.pooled(), backbone.model(x))
    cls = None if tokens.cls is None else tokens.cls[:, None]
    parts = [part for part in (cls, tokens.registers, tokens.patches) if part is not None]
    assert_close(torch.cat(parts, 1), backbone.model.forward_features(x))
    assert tokens.grid == backbone.grid(*x.shape[-2:]) == (3, 4)


@pytest.mark.parametrize("name", NAMES)
def test_visible_patches_see_only_each_other(name):
    """The same as the whole sequence with every key outside `visible` hidden from attention, which keeps
    positions where they were, learned and rotary alike."""
    backbone = vit(name)
    x, visible = pictures(backbone), some_visible(2, 12, 5)
    tokens = backbone(x, visible=visible)
    model, prefix = backbone.model, backbone.num_prefix
    _, sequence, ropes = backbone.embed(x, None, None, None)
    shown = torch.zeros(2, 12, dtype=torch.bool).scatter(1, visible, True)
    keys = torch.cat([torch.ones(2, prefix, dtype=torch.bool), shown], 1)[:, None, None]
    for number, block in enumerate(backbone.blocks):
        place = {"rope": ropes[number]} if backbone.rotary else {}
        sequence = block(sequence, attn_mask=keys, **place)
    sequence = model.norm(sequence)
    expected = sequence[:, prefix:].gather(1, visible[..., None].expand(-1, -1, 24))
    assert_close(tokens.patches, expected, atol=1e-4, rtol=1e-4)
    if tokens.cls is not None:
        assert_close(tokens.cls, sequence[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_that_are_not_visible_change_nothing(name):
    backbone = vit(name)
    x, visible = pictures(backbone), some_visible(2, 12, 5)
    patch = backbone.patch_size
    shown = torch.zeros(2, 12, dtype=torch.bool).scatter(1, visible, True).unflatten(1, (3, 4))
    shown = shown.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    other = torch.where(shown, x, torch.full_like(x, float("nan")))
    assert_close(backbone(other, visible=visible).patches, backbone(x, visible=visible).patches, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_that_are_masked_change_nothing_and_indices_are_the_boolean_form(name):
    backbone = vit(name)
    x, hidden, token = pictures(backbone), some_visible(2, 12, 5), torch.randn(24)
    boolean = torch.zeros(2, 12, dtype=torch.bool).scatter(1, hidden, True)
    tokens = backbone(x, masked=boolean, mask_token=token)
    assert_close(backbone(x, masked=hidden, mask_token=token).patches, tokens.patches, atol=0, rtol=0)
    patch = backbone.patch_size
    gone = boolean.unflatten(1, (3, 4)).repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    assert_close(backbone(x.masked_fill(gone, 7.0), masked=boolean, mask_token=token).patches, tokens.patches)
    assert not torch.allclose(backbone(x).patches, tokens.patches)


STEMMED = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize(
    ("name", "stem"), [*((name, "linear") for name in NAMES), *((name, "conv") for name in STEMMED)]
)
def test_several_masks_of_a_picture_are_as_many_pictures_that_are_embedded_once(name, stem):
    backbone = vit(name, stem=stem)
    x, visible = pictures(backbone), some_visible(6, 12, 5)
    seen = []
    embedding = backbone.model.patch_embed
    hook = embedding.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    tokens = backbone(x, visible=visible, taps=(1,))
    hook.remove()
    repeated = backbone(x.repeat(3, 1, 1, 1), visible=visible, taps=(1,))
    assert_close(tokens.pooled(), repeated.pooled(), atol=1e-5, rtol=1e-5)
    assert_close(tokens.patches, repeated.patches, atol=1e-5, rtol=1e-5)
    assert_close(tokens.taps["block1"], repeated.taps["block1"], atol=1e-5, rtol=1e-5)
    assert seen == [6 if stem == "conv" else 2], "hidden pixels would be seen through overlapping convolutions"


@pytest.mark.parametrize("name", STEMMED)
def test_a_stem_of_convolutions_changes_what_a_patch_sees_and_nothing_else(name):
    plain, stemmed = vit(name), vit(name, stem="conv")
    assert (stemmed.patch_size, stemmed.grid(48, 64), stemmed.embed_dim) == (16, (3, 4), 24)
    x = pictures(stemmed)
    assert_close(stemmed(x).pooled(), stemmed.model(x))
    beyond = x.clone()
    beyond[:, :, :16, :16] += 1.0  # the first patch
    moved = [net.embed(x, None, None, None)[1] - net.embed(beyond, None, None, None)[1] for net in (plain, stemmed)]
    second = [float(change[:, plain.num_prefix + 1].detach().abs().max()) for change in moved]
    assert second[0] == 0 and second[1] > 1e-4, "convolutions overlap, patches do not"
    behind = [name for name, depth in stemmed.depths().items() if "patch_embed" in name and depth != 0]
    assert not behind, "layer decay counts the stem as what stands before the blocks"


@pytest.mark.parametrize("name", STEMMED)
def test_behind_a_stem_of_convolutions_hidden_pixels_change_nothing_either(name):
    """They would, through neighbours that are seen, if only their own embedding were replaced."""
    backbone, token = vit(name, stem="conv"), torch.randn(24)
    x, hidden = pictures(backbone), some_visible(2, 12, 5)
    boolean = torch.zeros(2, 12, dtype=torch.bool).scatter(1, hidden, True)
    pixels = boolean.unflatten(1, (3, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    other = torch.where(pixels, torch.full_like(x, float("nan")), x)
    expected = backbone(x, masked=boolean, mask_token=token).patches
    assert_close(backbone(other, masked=hidden, mask_token=token).patches, expected, atol=0, rtol=0)
    shown = (~boolean).nonzero()[:, 1].view(2, 7)
    assert_close(backbone(other, visible=shown).patches, backbone(x, visible=shown).patches, atol=0, rtol=0)


def test_a_stem_of_convolutions_takes_sizes_that_are_padded():
    backbone, token = vit(stem="conv"), torch.randn(24)
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[:, -1] = True
    with pytest.warns(UserWarning, match="pads"):
        tokens = backbone(pictures(backbone)[..., :40, :60], masked=hidden, mask_token=token)
    assert tokens.grid == (3, 4)


def test_the_mask_token_learns_and_masked_places_keep_their_positions():
    backbone, token = vit(), nn.Parameter(torch.randn(1, 24))
    x, everything = pictures(backbone), torch.ones(2, 12, dtype=torch.bool)
    tokens = backbone(x, masked=everything, mask_token=token)
    assert_close(tokens.patches[0], tokens.patches[1])  # nothing of the pictures is left
    assert tokens.patches[0].std(0).min() > 1e-3  # but the places still differ
    tokens.patches.square().sum().backward()
    assert token.grad.abs().min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_early_stop_is_the_tap_of_the_whole_forward_after_the_final_norm(name):
    backbone = vit(name)
    x = pictures(backbone)
    whole = backbone(x, taps=(1, "block2", 3, "block2.mlp"))
    assert sorted(whole.taps) == ["block1", "block2", "block2.mlp", "block3"]
    for until in (1, 2, 3):
        early = backbone(x, until=until)
        normed = backbone.model.norm(whole.taps[f"block{until}"])
        assert_close(early.patches, normed[:, backbone.num_prefix :], atol=0, rtol=0)
    assert_close(backbone(x).patches, whole.patches, atol=0, rtol=0)


def test_the_mlp_tap_is_what_the_block_adds_before_its_scale():
    backbone = vit("vit_small_patch14_reg4_dinov2")
    block = backbone.blocks[1]
    x = pictures(backbone)
    taps = backbone(x, taps=("block1", "block2", "block2.mlp")).taps
    middle = taps["block1"] + block.ls1(block.attn(block.norm1(taps["block1"])))
    assert_close(taps["block2"], middle + block.ls2(taps["block2.mlp"]))
    assert_close(taps["block2.mlp"], block.mlp(block.norm2(middle)))
    assert not block.mlp._forward_hooks


def test_early_stop_does_not_run_the_later_blocks():
    backbone = vit()
    backbone.blocks[2].forward = None
    backbone(pictures(backbone), until=2)


def test_registers_are_returned_between_class_token_and_patches():
    backbone = vit("vit_small_patch14_reg4_dinov2")
    x = pictures(backbone)
    tokens = backbone(x)
    assert_close(tokens.registers, backbone.model.forward_features(x)[:, 1:5])
    assert vit()(pictures(vit())).registers is None


@pytest.mark.parametrize("name", NAMES)
def test_two_crop_sizes_with_one_network_are_two_separate_forwards(name):
    """Nothing of one size (positions, rotary cache) leaks into the next."""
    backbone = vit(name)
    large, small = pictures(backbone, 4, 4), pictures(backbone, 2, 2)
    first, second, again = backbone(large), backbone(small), backbone(large)
    assert_close(again.patches, first.patches, atol=0, rtol=0)
    fresh = vit(name)
    assert_close(fresh(small).patches, second.patches, atol=0, rtol=0)
    assert second.grid == (2, 2)


def test_positions_of_another_size_are_resized_and_learn():
    backbone = vit(img_size=224)
    tokens = backbone(torch.randn(1, 3, 96, 96))
    assert tokens.grid == (6, 6)
    tokens.patches.square().sum().backward()
    assert backbone.model.pos_embed.grad.abs().sum(-1).min() > 0


def test_padding_is_zeros_at_the_right_and_bottom_and_is_said_once():
    backbone = vit()
    x = torch.randn(1, 3, 30, 33)
    with pytest.warns(UserWarning, match="30 x 33"):
        tokens = backbone(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(x)
    assert tokens.grid == backbone.grid(30, 33) == (2, 3)
    assert_close(tokens.patches, backbone(F.pad(x, (0, 15, 0, 2))).patches)


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels):
    backbone = vit(in_chans=channels)
    x = pictures(backbone)
    x.requires_grad_()
    backbone(x).pooled().square().sum().backward()
    assert (x.grad.abs().amax((0, 2, 3)) > 0).all()
    with pytest.raises(UserError, match=f"{channels} channels.*in_chans"):
        backbone(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    backbone = vit(name).train()
    tokens = backbone(pictures(backbone))
    (tokens.pooled().square().sum() + tokens.patches.square().sum()).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


def test_bfloat16_on_the_cpu_uses_plain_attention_and_float32_the_fused_one(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    for backbone in (vit(), vit("vit_small_patch16_dinov3")):
        x = pictures(backbone)
        exact = backbone(x).patches
        assert len(calls) == 3
        with torch.autocast("cpu", torch.bfloat16):
            half = backbone(x).patches
        assert len(calls) == 3
        assert_close(half.float(), exact, atol=0.1, rtol=0.1)  # bfloat16 keeps 8 bits
        backbone(x)
        assert len(calls) == 6
        backbone.to(torch.bfloat16)(x.bfloat16())
        assert len(calls) == 6
        calls.clear()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_activation_checkpointing_gives_the_same_gradients_in_less_memory(name):
    plain = vit(name, drop_path_rate=0.5).train()
    saving = vit(name, drop_path_rate=0.5, activation_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    x = pictures(plain, batch=8)

    def pass_through(backbone):
        torch.manual_seed(2)  # of drop path: the same samples skip the same blocks, also when a block runs again
        tokens = backbone(x, taps=(2, "block3.mlp"))
        (tokens.patches.square().sum() + tokens.taps["block2"].sum() + tokens.taps["block3.mlp"].sum()).backward()

    peaks = [peak_bytes(lambda backbone=backbone: pass_through(backbone)) for backbone in (plain, saving)]
    for (key, one), other in zip(plain.named_parameters(), saving.parameters()):
        assert_close(one.grad, other.grad, msg=lambda text, key=key: f"{key}: {text}")
    assert peaks[1] < 0.8 * peaks[0]
    with torch.no_grad():
        assert_close(saving.eval()(x).patches, plain.eval()(x).patches)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_compiles_without_a_graph_break(name):
    backbone = vit(name)
    x, visible, token = pictures(backbone), some_visible(2, 12, 5), torch.randn(24)

    def answer(x, visible, token):
        whole = backbone(x, masked=visible, mask_token=token, taps=(2,))
        return whole.patches, whole.taps["block2"], backbone(x, visible=visible, until=2).patches

    expected = answer(x, visible, token)
    compiled = torch.compile(answer, fullgraph=True, backend="eager")
    for ours, plain in zip(compiled(x, visible, token), expected, strict=True):
        assert_close(ours, plain)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x, visible, token)
    torch._dynamo.reset()


def test_without_its_drops_a_network_in_train_mode_is_the_one_in_eval_mode():
    settings = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "pos_drop_rate": 0.3}
    backbone = vit(drop_path_rate=0.5, arguments=settings)
    x = pictures(backbone)
    expected = backbone(x).patches
    backbone.train()
    assert not torch.allclose(backbone(x).patches, expected)
    set_drop_path_zero(backbone)
    assert_close(backbone(x).patches, expected)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_the_state_dict_is_the_models_own_and_a_record_rebuilds_the_network(stem):
    settings = {"in_chans": 1, "img_size": (32, 48), "drop_path_rate": 0.1, "stem": stem, "arguments": TINY}
    backbone = ViT("vit_tiny_patch16_224", **settings)
    again = build(describe(backbone))
    again.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 1, 32, 48)
    assert_close(again.eval()(x).patches, backbone.eval()(x).patches)
    assert all(key.startswith("model.") for key in backbone.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, "vit_small_patch16_224"),
        ({"name": "resnet50"}, "ConvNet"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "distillation"),
        ({"name": "vit_small_patch16_224.augreg_in21k"}, "weights: timm:augreg_in21k"),
        ({"img_size": 100}, r"100.*16 px.*112"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is 1.5"),
        ({"arguments": {"widths": 3}}, "widths"),
        ({"arguments": {"in_chans": 3}}, "takes by name"),
        ({"arguments": {"patch_drop_rate": 0.5}}, "visible"),
        ({"stem": "resnet"}, "'resnet' is unknown.*linear, conv"),
        ({"name": "vit_small_patch14_dinov2", "stem": "conv"}, r"14 x 14 px.*linear"),
    ],
)
def test_impossible_settings_are_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        ViT(**settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"until": 0}, "1 to 3"),
        ({"until": 4}, "1 to 3"),
        ({"taps": (4,)}, "block4.*1 to 3"),
        ({"taps": (3,), "until": 2}, "stops after block 2"),
        ({"taps": ("norm",)}, "norm"),
        ({"visible": torch.zeros(3, 5, dtype=torch.long)}, "3 rows for 2 pictures"),
        ({"masked": torch.zeros(2, 12, dtype=torch.bool)}, "mask_token"),
        ({"masked": torch.zeros(2, 9, dtype=torch.bool), "mask_token": torch.zeros(24)}, r"\(2, 9\).*\(2, 12\)"),
    ],
)
def test_impossible_questions_are_refused(asked, message):
    backbone = vit()
    with pytest.raises(UserError, match=message):
        backbone(pictures(backbone), **asked)


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_what_the_last_block_multiplies_its_values_with(name):
    """Shares of the whole last block, times its values, give what its fused product gives, and the class token's row is
    what is shown; without a class token, the mean over patches."""
    backbone = vit(name)
    x, block = pictures(backbone), backbone.blocks[-1]
    found = backbone.attention_map(x)
    grid, sequence, ropes = backbone.embed(x, None, None, None)
    place = {"rope": ropes[-1]} if backbone.rotary else {}
    for number, before in enumerate(backbone.blocks[:-1]):
        sequence = before(sequence, **({"rope": ropes[number]} if backbone.rotary else {}))
    shares = attention_of(block, sequence, place)
    assert_close(shares.sum(-1), torch.ones(2, 2, sequence.shape[1]))
    values = []
    projection = block.attn.proj
    hook = projection.register_forward_pre_hook(lambda module, arguments: values.append(arguments[0]))
    with torch.no_grad():
        block(sequence, **place)
        normed = block.norm1(sequence)
        if block.attn.qkv is not None:
            bias = block.attn.qkv.bias
            if bias is None and getattr(block.attn, "q_bias", None) is not None:
                bias = torch.cat([block.attn.q_bias, torch.zeros_like(block.attn.v_bias), block.attn.v_bias])
            v = F.linear(normed, block.attn.qkv.weight, bias).chunk(3, -1)[2]
        else:
            v = block.attn.v_proj(normed)
    hook.remove()
    mixed = (shares @ v.unflatten(-1, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    norm = getattr(block.attn, "norm", nn.Identity())
    assert_close(values[0], norm(mixed), atol=1e-5, rtol=1e-4)
    prefix = backbone.num_prefix
    if backbone.model.cls_token is not None:
        assert_close(found.shares, shares[:, :, 0, prefix:])
        assert found.query == "class token"
    else:
        assert_close(found.shares, shares.mean(2))
        assert found.query == "mean of the patches"
    assert found.grid == grid == (3, 4)


def test_asking_for_attention_leaves_the_network_as_it_was():
    backbone = vit()
    x = pictures(backbone)
    before = backbone(x).patches
    backbone.attention_map(x)
    assert all(module.fused_attn for module in backbone.attention)
    assert not backbone.blocks[-1].attn.attn_drop._forward_pre_hooks
    assert_close(backbone(x).patches, before, atol=0, rtol=0)


def test_attention_of_compiled_blocks_is_read_without_compiling_for_it():
    backbone = vit()
    expected = backbone.attention_map(pictures(backbone)).shares
    for block in backbone.blocks:
        block.compile(backend=refuse)
    assert_close(backbone.attention_map(pictures(backbone)).shares, expected, atol=0, rtol=0)


def refuse(graph, inputs):
    raise AssertionError("compiled")
