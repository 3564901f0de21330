import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.optim import lr_scales
from ssd.record import build, describe
from tests.backbones.test_vit import pictures, refuse, some_visible, vit


def post_norm(**settings) -> ViT:
    return vit(post_norm=True, fixed_positions=True, img_size=64, **settings)


def written_out(backbone: ViT, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """A post-norm ViT from its state dict: every token behind the last block, and what each MLP answers."""
    w, width, heads = backbone.model.state_dict(), 24, 2
    pixels = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    patches = pixels @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"][:, 1:]
    z = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), patches], 1)

    def norm(y, key):
        mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, correction=0)
        return (y - mean) / (var + 1e-6).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]

    z, answers = norm(z, "norm_pre"), {}
    for i in range(3):
        key = f"blocks.{i}"
        q, k, v = (z @ w[f"{key}.attn.qkv.weight"].T + w[f"{key}.attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = ((q @ k.mT) / (width // heads) ** 0.5).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2) @ w[f"{key}.attn.proj.weight"].T + w[f"{key}.attn.proj.bias"]
        z = norm(z + mixed, f"{key}.norm1")
        hidden = F.gelu(z @ w[f"{key}.mlp.fc1.weight"].T + w[f"{key}.mlp.fc1.bias"])
        answers[i + 1] = hidden @ w[f"{key}.mlp.fc2.weight"].T + w[f"{key}.mlp.fc2.bias"]
        z = norm(z + answers[i + 1], f"{key}.norm2")
    return z, answers


def test_the_equations_written_out_and_what_the_mlp_answers_before_sum_and_norm():
    backbone = post_norm()
    x = pictures(backbone, 4, 4)
    expected, mlps = written_out(backbone, x)
    tokens = backbone(x, taps=("block2", "block2.mlp", "block3.mlp"))
    assert_close(tokens.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert_close(tokens.patches, expected[:, 1:], atol=1e-4, rtol=1e-4)
    for number in (2, 3):
        assert_close(tokens.taps[f"block{number}.mlp"], mlps[number], atol=1e-4, rtol=1e-4)
    block = backbone.blocks[1]
    before = backbone(x, taps=("block1",)).taps["block1"]
    middle = block.norm1(before + block.attn(before))
    assert_close(tokens.taps["block2"], block.norm2(middle + tokens.taps["block2.mlp"]))


def test_there_is_a_norm_behind_the_embedding_none_behind_the_blocks_and_a_bias_in_between():
    model = post_norm().model
    names = {name for name, _ in model.named_parameters()}
    assert {"norm_pre.weight", "norm_pre.bias", "patch_embed.proj.bias"} <= names
    assert not names & {"norm.weight", "norm.bias", "fc_norm.weight"}
    scales = lr_scales(torch.nn.ModuleDict({"backbone": post_norm()}), 0.5, 1.0)
    assert scales["backbone.model.norm_pre.weight"] == 0.5**4, "layer decay: it stands before the blocks"


def test_pixels_that_are_not_visible_change_nothing():
    backbone = post_norm()
    x, visible = pictures(backbone, 4, 4), some_visible(2, 16, 5)
    shown = torch.zeros(2, 16, dtype=torch.bool).scatter(1, visible, True).unflatten(1, (4, 4))
    shown = shown.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    other = torch.where(shown, x, torch.full_like(x, float("nan")))
    assert_close(backbone(other, visible=visible).patches, backbone(x, visible=visible).patches, atol=0, rtol=0)


def test_drop_path_skips_a_branch_and_not_its_norm():
    backbone = post_norm(drop_path_rate=0.999999, drop_path_rule="uniform").train()
    x = pictures(backbone, 4, 4)
    taps = backbone(x, taps=(0, 1)).taps
    block = backbone.blocks[0]
    assert_close(taps["block1"], block.norm2(block.norm1(taps["block0"])))


def test_a_record_rebuilds_it_and_compiled_blocks_can_be_tapped():
    backbone = post_norm()
    again = build(describe(backbone)).eval()
    again.load_state_dict(backbone.state_dict())
    x = pictures(backbone, 4, 4)
    expected = backbone(x, taps=("block3.mlp",))
    again.blocks[2].compile(backend=refuse)
    found = again(x, taps=("block3.mlp",))
    assert_close(found.patches, expected.patches, atol=0, rtol=0)
    assert_close(found.taps["block3.mlp"], expected.taps["block3.mlp"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "vit_small_patch16_dinov3"}, "built another way"),
        ({"name": "vit_base_patch16_rpn_224"}, "are ResPostBlock"),
        ({"drop_path_rate": 0.1, "drop_path_rule": "subset"}, "PostNormBlock"),
    ],
)
def test_blocks_that_cannot_be_changed_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        ViT(**{"post_norm": True, "arguments": {"depth": 2, "embed_dim": 24, "num_heads": 2}} | settings)
