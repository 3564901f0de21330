"""Weights in the layouts of published releases, made here key by key."""

import argparse
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.rotary_vit import RotaryViT
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.evaluation.outputs import output_of
from ssd.heads import PrototypeHead
from ssd.weights.checkpoint import read_file, strict_load
from ssd.weights.public import read_public, timm_state
from tests.weights.networks import RESNET, TINY, again, pictures, same, tiny_resnet, tiny_vit


def test_an_encoder_of_moco_v3_is_loaded_without_the_projector_in_the_classifiers_place(tmp_path):
    networks = {"momentum_encoder": tiny_resnet(seed=1), "base_encoder": tiny_resnet(seed=2)}
    state = {
        f"module.{name}.{key}": value
        for name, network in networks.items()
        for key, value in network.model.state_dict().items()
    }
    state |= {f"module.{name}.fc.0.weight": torch.ones(4, 16) for name in networks}
    state["module.predictor.0.weight"] = torch.ones(4, 4)
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "moco.pth.tar")
    for suffix, name in (("", "momentum_encoder"), ("#student", "base_encoder")):
        found = ConvNet(networks[name].name, weights=f"{tmp_path}/moco.pth.tar{suffix}", arguments=RESNET)
        theirs = networks[name].model.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in found.model.state_dict().items())
    heads = read_public({"state_dict": state}, "teacher").heads
    assert heads["projector"].keys() == {"0.weight"}
    with pytest.raises(UserError, match=r"no network 'other'. Name one after the file: #teacher, #student"):
        ConvNet(networks["base_encoder"].name, weights=f"{tmp_path}/moco.pth.tar#other", arguments=RESNET)


def head_state(modern: bool) -> dict[str, Tensor]:
    """A head as published: an MLP and a weight-normed layer, spelled by torch itself."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for number, (width_in, width_out) in {0: (24, 32), 2: (32, 32), 4: (32, 16)}.items():
        state[f"mlp.{number}.weight"] = torch.randn(width_out, width_in, generator=generator)
        state[f"mlp.{number}.bias"] = torch.randn(width_out, generator=generator)
    layer = torch.nn.Linear(16, 8, bias=False)
    layer.weight.data = torch.randn(8, 16, generator=generator)
    layer = weight_norm(layer) if modern else torch.nn.utils.weight_norm(layer)
    return state | {f"last_layer.{key}": value.detach() for key, value in layer.state_dict().items()}


def dino_file(student: ViT, teacher: ViT, modern: bool = False) -> dict:
    def branch(backbone: ViT, prefix: str) -> dict[str, Tensor]:
        state = {f"{prefix}backbone.{key}": value for key, value in backbone.model.state_dict().items()}
        return state | {f"{prefix}head.{key}": value for key, value in head_state(modern).items()}

    return {
        "student": branch(student, "module."),
        "teacher": branch(teacher, ""),
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", out_dim=8),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def test_a_training_file_of_dino_gives_teacher_or_student(tmp_path):
    student, teacher = tiny_vit(seed=1), tiny_vit(seed=2)
    torch.save(dino_file(student, teacher), tmp_path / "checkpoint.pth")
    same(again(teacher, tmp_path / "checkpoint.pth"), teacher)
    same(again(student, f"{tmp_path}/checkpoint.pth#student"), student)
    with pytest.raises(UserError, match=r"no network 'partner'.*#teacher, #student"):
        again(student, f"{tmp_path}/checkpoint.pth#partner")


@pytest.mark.parametrize("modern", [False, True])
def test_both_spellings_of_weight_norm_give_the_same_head(tmp_path, modern):
    torch.save(dino_file(tiny_vit(), tiny_vit(), modern), tmp_path / "checkpoint.pth")
    public = read_public(read_file(tmp_path / "checkpoint.pth"))
    state = public.heads["head"]
    assert state["last_layer.weight_g"].shape == (8, 1) and state["last_layer.weight_v"].shape == (8, 16)
    head = PrototypeHead(24, 8, hidden_dim=32, bottleneck_dim=16)
    strict_load(head, state, "the head")
    x = torch.randn(5, 24)
    hidden = x
    for number in (0, 2, 4):
        hidden = hidden @ state[f"mlp.{number}.weight"].T + state[f"mlp.{number}.bias"]
        hidden = torch.nn.functional.gelu(hidden) if number < 4 else hidden
    last = weight_norm(torch.nn.Linear(16, 8, bias=False))
    last.load_state_dict({key.removeprefix("last_layer."): v for key, v in head_state(True).items() if "last" in key})
    expected = last(torch.nn.functional.normalize(hidden, dim=-1))
    assert_close(head(x).logits(), expected)


def test_a_release_of_ibot_loses_only_its_mask_embedding(tmp_path):
    backbone = tiny_vit()
    state = dict(backbone.model.state_dict()) | {"masked_embed": torch.zeros(1, 24)}
    torch.save({"state_dict": state}, tmp_path / "ibot.pth")
    with pytest.warns(UserWarning, match=r"not used by a backbone: masked_embed\."):
        same(again(backbone, tmp_path / "ibot.pth"), backbone)


def dinov2_state(depth: int = 4) -> dict[str, Tensor]:
    """DINOv2 with registers, as published: positions for the class token and patches, none for registers."""
    arguments = {**TINY, "depth": depth, "reg_tokens": 0, "no_embed_class": False}
    reference = tiny_vit("vit_small_patch14_reg4_dinov2", img_size=56, arguments=arguments)
    state = dict(reference.model.state_dict())
    generator = torch.Generator().manual_seed(4)
    state["register_tokens"] = torch.randn(1, 4, 24, generator=generator)
    state["mask_token"] = torch.zeros(1, 24)
    return state


def in_chunks(state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """FSDP's layout of blocks: chunks that keep the number of each block."""

    def key_in_chunk(key: str) -> str:
        if not key.startswith("blocks."):
            return key
        number = int(key.split(".")[1])
        return f"blocks.{number // size}.{key.removeprefix('blocks.')}"

    return {key_in_chunk(key): value for key, value in state.items()}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("no_embed_class", [True, False])
def test_registers_of_dinov2_enter_without_positions(tmp_path, no_embed_class, chunked):
    """Both of timm's forms, with and without positions of prefix tokens, are the published function:
    class token + its position, then registers as they are, then patches + positions."""
    state = dinov2_state()
    stored = in_chunks(state, 2) if chunked else state
    torch.save({"teacher": {f"backbone.{key}": value for key, value in stored.items()}}, tmp_path / "eval.pth")
    with pytest.warns(UserWarning, match="mask_token"):
        backbone = ViT(
            "vit_small_patch14_reg4_dinov2",
            img_size=56,
            weights=f"{tmp_path}/eval.pth",
            arguments={**TINY, "depth": 4, "no_embed_class": no_embed_class},
        ).eval()
    x = pictures(size=56)
    _, sequence, _ = backbone.embed(x, None, None, None)
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(2, -1, -1)
    assert_close(sequence[:, :1], cls)
    assert_close(sequence[:, 1:5], state["register_tokens"].expand(2, -1, -1))
    patches = backbone.model.patch_embed.proj(x).flatten(2).mT + state["pos_embed"][:, 1:]
    assert_close(sequence[:, 5:], patches)
    for number in range(4):
        own = backbone.blocks[number].attn.qkv.weight
        assert_close(own.detach(), state[f"blocks.{number}.attn.qkv.weight"], atol=0, rtol=0)


def test_swiglu_of_dinov2_is_packed_as_timm_packs_it():
    model = ViT("vit_giant_patch14_dinov2", img_size=56, arguments={**TINY, "depth": 1}).eval().model
    mlp = model.blocks[0].mlp
    hidden = mlp.fc2.in_features
    w12, w3 = torch.randn(2 * hidden, 24), torch.randn(24, hidden)
    public = {"blocks.0.0.mlp.w12.weight": w12, "blocks.0.0.mlp.w3.weight": w3}
    public |= {"blocks.0.0.mlp.w12.bias": torch.randn(2 * hidden), "blocks.0.0.mlp.w3.bias": torch.randn(24)}
    state, left_out = timm_state(public, model)
    assert not left_out
    strict_load(mlp, {key.removeprefix("blocks.0.mlp."): value for key, value in state.items()}, "the MLP")
    x = torch.randn(2, 3, 24)
    gate, value = (x @ w12.T + public["blocks.0.0.mlp.w12.bias"]).chunk(2, -1)
    assert_close(mlp(x), (torch.nn.functional.silu(gate) * value) @ w3.T + public["blocks.0.0.mlp.w3.bias"])


def dinov3_state(swiglu: bool, bias: float) -> dict[str, Tensor]:
    """A release of DINOv3 of width 24 and depth 2: names and shapes of the published files."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = {"cls_token": drawn(1, 1, 24), "storage_tokens": drawn(1, 4, 24), "mask_token": torch.zeros(1, 24)}
    state |= {"rope_embed.periods": drawn(3), "patch_embed.proj.weight": drawn(24, 3, 16, 16)}
    state |= {"patch_embed.proj.bias": drawn(24), "norm.weight": drawn(24), "norm.bias": drawn(24)}
    state |= {"local_cls_norm.weight": drawn(24), "local_cls_norm.bias": drawn(24)}
    mask = torch.cat([torch.ones(24), torch.zeros(24), torch.ones(24)])
    for number in range(2):
        block = {"attn.qkv.weight": drawn(72, 24), "attn.qkv.bias": bias * drawn(72), "attn.qkv.bias_mask": mask}
        block |= {"attn.proj.weight": drawn(24, 24), "attn.proj.bias": drawn(24), "ls1.gamma": drawn(24)}
        block |= {"ls2.gamma": drawn(24)}
        block |= {f"norm{i}.{kind}": drawn(24) for i in (1, 2) for kind in ("weight", "bias")}
        shapes = {"w1": (96, 24), "w2": (96, 24), "w3": (24, 96)} if swiglu else {"fc1": (96, 24), "fc2": (24, 96)}
        for name, shape in shapes.items():
            block |= {f"mlp.{name}.weight": drawn(*shape), f"mlp.{name}.bias": drawn(shape[0])}
        state |= {f"blocks.{number}.{name}": value for name, value in block.items()}
    return state


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("name", "swiglu"), [("vit_small_patch16_dinov3_qkvb", False), ("vit_huge_plus_patch16_dinov3_qkvb", True)]
)
def test_a_release_of_dinov3_is_the_published_block(tmp_path, name, swiglu, chunked):
    state = dinov3_state(swiglu, bias=1.0)
    torch.save(in_chunks(state, 1) if chunked else state, tmp_path / "dinov3.pth")
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}
    with pytest.warns(UserWarning, match=r"mask_token, local_cls_norm\.weight, local_cls_norm\.bias\."):
        backbone = ViT(name, img_size=32, weights=f"{tmp_path}/dinov3.pth", arguments=arguments).eval()
    x = pictures(size=32)
    _, sequence, ropes = backbone.embed(x, None, None, None)
    assert_close(sequence[:, 1:5], state["storage_tokens"].expand(2, -1, -1))
    found = backbone.blocks[1](sequence, rope=ropes[1])

    def norm(x, name):
        return torch.nn.functional.layer_norm(
            x, (24,), state[f"blocks.1.{name}.weight"], state[f"blocks.1.{name}.bias"], 1e-5
        )

    def linear(x, name):
        return x @ state[f"blocks.1.{name}.weight"].T + state[f"blocks.1.{name}.bias"]

    bias = state["blocks.1.attn.qkv.bias"] * state["blocks.1.attn.qkv.bias_mask"]
    qkv = norm(sequence, "norm1") @ state["blocks.1.attn.qkv.weight"].T + bias
    q, k, v = qkv.view(2, 9, 3, 2, 12).permute(2, 0, 3, 1, 4)
    sin, cos = ropes[1].chunk(2, -1)

    def turned(x):
        patches = x[:, :, 5:]
        half = torch.cat([-patches[..., 6:], patches[..., :6]], -1)
        return torch.cat([x[:, :, :5], patches * cos + half * sin], 2)

    attention = torch.softmax(turned(q) @ turned(k).mT / 12**0.5, -1) @ v
    x = sequence + state["blocks.1.ls1.gamma"] * linear(attention.transpose(1, 2).flatten(2), "attn.proj")
    y = norm(x, "norm2")
    if swiglu:
        y = linear(torch.nn.functional.silu(linear(y, "mlp.w1")) * linear(y, "mlp.w2"), "mlp.w3")
    else:
        y = linear(torch.nn.functional.gelu(linear(y, "mlp.fc1")), "mlp.fc2")
    assert_close(found, x + state["blocks.1.ls2.gamma"] * y, atol=2e-3, rtol=1e-4)


def capi_state(bare: bool = False) -> dict[str, Tensor]:
    """A release of CAPI of width 32, 2 + 2 blocks: names and shapes of the published files."""
    generator = torch.Generator().manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    frequencies = 2 * torch.pi * 7 * 1e4 ** torch.linspace(0, -1, 4)
    freqs = torch.zeros(2, 16)
    freqs[0, :8] = freqs[1, 8:] = torch.cat([frequencies, frequencies])
    state = {"registers": drawn(1, 4, 32), "mask_token": 5 * drawn(1, 32)}
    state |= {"patch_embed.weight": drawn(32, 3, 8, 8), "patch_embed.bias": drawn(32)}
    for network in ("encoder", "decoder"):
        for number in range(2):
            block = {f"residual1.fn.{name}_proj.weight": drawn(32, 32) for name in "qkv"}
            block |= {"residual1.fn.proj.weight": drawn(32, 32), "residual1.fn.rope.freqs": freqs.clone()}
            block |= {"residual2.fn.fc1.weight": drawn(128, 32), "residual2.fn.fc2.weight": drawn(32, 128)}
            block |= {f"residual{i}.norm.weight": 1 + drawn(32) for i in (1, 2)}
            state |= {f"{network}.blocks.{number}.{name}": value for name, value in block.items()}
    return state if bare else {f"backbone.{name}": value for name, value in state.items()}


CAPI = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_registers": 4}


def published_capi(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What the published forward answers for whole pictures: normed tokens, and the predictor's first block pooled."""
    batch, _, height, width = x.shape
    rows, columns = torch.linspace(0, 1, height // 8), torch.linspace(0, 1, width // 8)
    places = torch.cartesian_prod(rows, columns)
    places = torch.cat([torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), places])

    def norm(x, gain=1.0):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain

    def heads(x, weight):
        return (x @ weight.T).view(batch, -1, 2, 16).transpose(1, 2)

    def block(name, x, at, context=None, of=None):
        part = lambda key: state[f"{name}.{key}.weight"]
        normed = norm(x, part("residual1.norm"))
        context, of = (normed, at) if context is None else (context, of)

        def turn(x, at):
            angle = at @ state[f"{name}.residual1.fn.rope.freqs"]
            half = torch.cat([-x[..., 8:], x[..., :8]], -1)  # over both axes
            return x * angle.cos() + half * angle.sin()

        q = turn(heads(normed, part("residual1.fn.q_proj")), at)
        k = turn(heads(context, part("residual1.fn.k_proj")), of)
        shares = torch.softmax(q @ k.mT / 4, -1)
        answer = (shares @ heads(context, part("residual1.fn.v_proj"))).transpose(1, 2).flatten(2)
        x = x + answer @ part("residual1.fn.proj").T
        inner = torch.nn.functional.gelu(norm(x, part("residual2.norm")) @ part("residual2.fn.fc1").T)
        return x + inner @ part("residual2.fn.fc2").T

    patches = torch.nn.functional.conv2d(x, state["patch_embed.weight"], state["patch_embed.bias"], stride=8)
    sequence = torch.cat([state["registers"].expand(batch, -1, -1), patches.flatten(2).mT], 1)
    for number in range(2):
        sequence = block(f"encoder.blocks.{number}", sequence, places)
    answered = norm(sequence)
    queries = state["mask_token"].expand(batch, len(places) - 4, -1)
    return answered, norm(block("decoder.blocks.0", queries, places[4:], answered, places)).mean(1)


def test_a_release_of_capi_answers_as_published_with_every_key_used(tmp_path):
    torch.save(capi_state(), tmp_path / "capi.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = RotaryViT(**CAPI, predictor_depth=2, mixed_axes=True, weights=f"{tmp_path}/capi.pth").eval()
    x = pictures(size=32)[:, :, :24]
    with torch.no_grad():
        tokens = backbone(x)
        answered, pooled = published_capi(capi_state(bare=True), x)
        assert_close(tokens.registers, answered[:, :4], atol=1e-4, rtol=1e-3)
        assert_close(tokens.patches, answered[:, 4:], atol=1e-4, rtol=1e-3)
        assert_close(output_of(backbone, x, "predicted"), pooled, atol=1e-4, rtol=1e-3)
    ours = RotaryViT(**CAPI, predictor_depth=2).eval()
    ours.model.load_state_dict(backbone.model.state_dict())
    assert (ours(x).patches - tokens.patches).abs().max() > 0.01, "the published rotations are others than ours"


def test_a_release_of_capi_without_its_predictor_says_what_is_left_out(tmp_path):
    torch.save(capi_state() | {"head.last_layer.weight_g": torch.ones(4, 1)}, tmp_path / "capi.pth")
    with pytest.warns(UserWarning, match=r"not used by a backbone: predictor\.mask_token, predictor\.blocks\.0\.attn"):
        backbone = RotaryViT(**CAPI, mixed_axes=True, weights=f"{tmp_path}/capi.pth")
    assert torch.equal(
        backbone.model.blocks[1].mlp.fc2.weight, capi_state(bare=True)["encoder.blocks.1.residual2.fn.fc2.weight"]
    )


def test_a_release_of_capi_that_does_not_fit_is_refused(tmp_path):
    network = {**CAPI, "predictor_depth": 2, "mixed_axes": True, "weights": f"{tmp_path}/capi.pth"}
    torch.save(capi_state(), tmp_path / "capi.pth")
    with pytest.raises(UserError, match="mixed_axes: true"):
        RotaryViT(**network | {"mixed_axes": False})
    with pytest.raises(UserError, match=r"unknown: predictor\.blocks\.1\.attn"):
        RotaryViT(**network | {"predictor_depth": 1})
    state = capi_state()
    state["backbone.encoder.blocks.1.residual1.fn.rope.freqs"] *= 2
    torch.save(state, tmp_path / "capi.pth")
    with pytest.raises(UserError, match=r"1 unknown: blocks\.1\.attn\.rope\.freqs"):
        RotaryViT(**network)


def test_biases_that_a_rotary_network_does_not_have_are_left_out_only_where_they_are_zero(tmp_path):
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.save(dinov3_state(False, bias=0.0), tmp_path / "zero.pth")
    with pytest.warns(UserWarning, match="mask_token"):
        ViT("vit_small_patch16_dinov3", img_size=32, weights=f"{tmp_path}/zero.pth", arguments=arguments)
    torch.save(dinov3_state(False, bias=1.0), tmp_path / "biased.pth")
    with (
        pytest.warns(UserWarning, match="mask_token"),
        pytest.raises(UserError, match=r"2 unknown: blocks\.0\.attn\.qkv\.bias"),
    ):
        ViT("vit_small_patch16_dinov3", img_size=32, weights=f"{tmp_path}/biased.pth", arguments=arguments)


POST_NORM = {"post_norm": True, "fixed_positions": True, "img_size": 64}


def data2vec_state(reference: ViT, prenet: int, decoder: bool) -> dict[str, Tensor]:
    """Names and shapes of data2vec 2.0's released files, of which `prenet` blocks stand in the picture encoder."""
    own, pictures = reference.model.state_dict(), "modality_encoders.IMAGE."
    state = {
        f"{pictures}local_encoder.proj.weight": own["patch_embed.proj.weight"],
        f"{pictures}local_encoder.proj.bias": own["patch_embed.proj.bias"],
        f"{pictures}extra_tokens": own["cls_token"],
        f"{pictures}fixed_positional_encoder.positions": own["pos_embed"][:, -16:],
        f"{pictures}context_encoder.norm.weight": own["norm_pre.weight"],
        f"{pictures}context_encoder.norm.bias": own["norm_pre.bias"],
    }
    kinds = [f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    kinds += [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    for number in range(3):
        place = f"{pictures}context_encoder.blocks.{number}" if number < prenet else f"blocks.{number - prenet}"
        state |= {f"{place}.{kind}": own[f"blocks.{number}.{kind}"] for kind in kinds}
    if decoder:
        shapes = {
            "blocks.0.0.weight": (16, 2, 3, 3),
            "blocks.0.0.bias": (16,),
            "proj.weight": (24, 16),
            "proj.bias": (24,),
        }
        state |= {f"{pictures}decoder.{name}": torch.ones(shape) for name, shape in shapes.items()}
    return state


@pytest.mark.parametrize("no_embed_class", [True, False])
@pytest.mark.parametrize("prenet", [0, 2])
def test_a_release_of_data2vec_2_gives_its_average_or_its_student(tmp_path, prenet, no_embed_class):
    student, teacher = (
        tiny_vit(seed=seed, arguments={"no_embed_class": no_embed_class}, **POST_NORM) for seed in (1, 2)
    )
    for reference in (student, teacher):
        if not no_embed_class:
            reference.model.pos_embed.data[:, 0] = 0  # the class token has no position
    state = data2vec_state(student, prenet, decoder=True)
    content = {
        "cfg": {"model": {"depth": 3 - prenet}},
        "model": state | {"_ema": data2vec_state(teacher, prenet, False)},
    }
    torch.save(content, tmp_path / "base.pt")
    settings = {"arguments": {"no_embed_class": no_embed_class}, **POST_NORM}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(again(teacher, tmp_path / "base.pt", **settings), teacher, 64)
    with pytest.warns(
        UserWarning, match=r"not used by a backbone: modality_encoders\.IMAGE\.decoder\.blocks.*proj\.bias\."
    ):
        same(again(student, f"{tmp_path}/base.pt#student", **settings), student, 64)
    with pytest.raises(UserError, match=r"no network 'partner'.*#teacher, #student"):
        again(student, f"{tmp_path}/base.pt#partner", **settings)


def test_every_key_of_data2vec_2_is_asked_for(tmp_path):
    reference = tiny_vit(**POST_NORM)
    state = data2vec_state(reference, 0, decoder=False)
    torch.save({"model": state}, tmp_path / "alone.pt")
    same(again(reference, tmp_path / "alone.pt", **POST_NORM), disturbed_positions(reference), 64)
    with pytest.raises(UserError, match="post_norm: true"):
        again(reference, tmp_path / "alone.pt", img_size=64)
    torch.save({"model": state | {"modality_encoders.IMAGE.alibi_scale": torch.ones(1)}}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"1 unknown: modality_encoders\.IMAGE\.alibi_scale"):
        again(reference, tmp_path / "more.pt", **POST_NORM)
    torch.save({"model": state | {"blocks.3.norm1.weight": torch.ones(24)}}, tmp_path / "deeper.pt")
    with pytest.raises(UserError, match=r"1 unknown: blocks\.3\.norm1\.weight"):
        again(reference, tmp_path / "deeper.pt", **POST_NORM)
    missing = {key: value for key, value in state.items() if "context_encoder.norm" not in key}
    torch.save({"model": missing}, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"2 missing: norm_pre\.weight, norm_pre\.bias"):
        again(reference, tmp_path / "less.pt", **POST_NORM)


def disturbed_positions(reference: ViT) -> ViT:
    """Without the position that a published class token does not have."""
    reference.model.pos_embed.data[:, 0] = 0
    return reference


def test_a_released_resnet_in_torchvisions_names_and_a_supervised_one_without_its_classifier(tmp_path):
    backbone = tiny_resnet()
    torch.save(backbone.model.state_dict(), tmp_path / "resnet.pth")
    same(ConvNet("resnet18", weights=f"{tmp_path}/resnet.pth", arguments=RESNET), backbone)
    supervised = dict(backbone.model.state_dict()) | {"fc.weight": torch.zeros(9, 256), "fc.bias": torch.zeros(9)}
    save_file(supervised, tmp_path / "resnet.safetensors")
    with pytest.warns(UserWarning, match=r"not used by a backbone: fc\.weight, fc\.bias"):
        same(ConvNet("resnet18", weights=f"{tmp_path}/resnet.safetensors", arguments=RESNET), backbone)
