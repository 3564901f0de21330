import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from ssd.backbones.rotary import RotaryPositions, border_places, grid_places, turned
from ssd.backbones.rotary_vit import RotaryViT
from ssd.errors import UserError
from ssd.evaluation.outputs import outputs_of, parts_of
from ssd.record import build
from ssd.teachers import EMA
from ssd.weights.export import export_backbone

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_registers": 4, "predictor_depth": 2}


def network(**settings) -> RotaryViT:
    """With gains that are not 1, and learned tokens that are not nearly 0."""
    torch.manual_seed(0)
    backbone = RotaryViT(**{**SMALL, **settings}).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "token" in name or "registers" in name:
                parameter.normal_()
    return backbone


def pictures(rows: int = 3, columns: int = 4, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(1))


def some(batch: int, count: int, of: int = 12, seed: int = 2) -> torch.Tensor:
    noise = torch.rand(batch, of, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, :count].sort(1).values


# ------------------------------------------------------------------ positions


def test_frequencies_are_seven_to_seven_ten_thousandths_in_equal_ratios_rows_first():
    freqs = RotaryPositions(16).freqs / (2 * math.pi)
    half = torch.tensor([7.0, 7 * 1e-4 ** (1 / 3), 7 * 1e-4 ** (2 / 3), 7e-4])
    assert_close(freqs[0], torch.cat([half, half, torch.zeros(8)]))
    assert_close(freqs[1], torch.cat([torch.zeros(8), half, half]))
    assert not list(RotaryPositions(16).parameters()) and "freqs" in RotaryPositions(16).state_dict()


def test_products_depend_on_how_far_apart_two_tokens_lie_and_lengths_stay():
    rope = RotaryPositions(16)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor(
        [[[0.1, 0.2]], [[0.4, 0.9]], [[0.35, 0.1]], [[0.65, 0.8]]]
    )  # the last two are both moved alike
    places = rope(pairs)
    here = (turned(query, places[0:1]) * turned(key, places[1:2])).sum()
    there = (turned(query, places[2:3]) * turned(key, places[3:4])).sum()
    assert_close(here, there, atol=1e-4, rtol=0)
    assert_close(turned(query, places[1:2]).norm(), query.norm())
    mixed = [(turned(query, places[i : i + 1], True) * turned(key, places[i + 1 : i + 2], True)).sum() for i in (0, 2)]
    assert (mixed[0] - mixed[1]).abs() > 0.1, "the published pairing is no rotation"


def test_a_turn_by_hand():
    """Four channels of a head: two of the row at 2 pi 7 r, two of the column; as published channel 0 with 2 and 1 with 3."""
    rope = RotaryPositions(4)(torch.tensor([[[0.01, 0.03]]]))
    row, column = 2 * math.pi * 7 * 0.01, 2 * math.pi * 7 * 0.03
    a, b, c, d = 1.0, 2.0, 3.0, 4.0
    cos, sin = math.cos, math.sin
    own = [a * cos(row) - b * sin(row), b * cos(row) + a * sin(row)]
    own += [c * cos(column) - d * sin(column), d * cos(column) + c * sin(column)]
    published = [a * cos(row) - c * sin(row), b * cos(row) - d * sin(row)]
    published += [c * cos(column) + a * sin(column), d * cos(column) + b * sin(column)]
    x = torch.tensor([a, b, c, d]).view(1, 1, 1, 4)
    assert_close(turned(x, rope).flatten(), torch.tensor(own))
    assert_close(turned(x, rope, mixed_axes=True).flatten(), torch.tensor(published))


def test_places_of_patches_and_registers():
    assert grid_places((2, 3)).tolist() == [[0, 0], [0, 0.5], [0, 1], [1, 0], [1, 0.5], [1, 1]]
    assert grid_places((1, 2)).tolist() == [[0, 0], [0, 1]]
    border = [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5]]
    assert border_places(8).tolist() == border


def test_registers_lie_on_the_border_of_what_is_visible():
    backbone = network()
    visible = torch.tensor([[5, 6, 9]])  # rows 1 to 2 of 3, columns 1 to 2 of 4
    places = backbone.with_registers(backbone.places_of((3, 4), visible, torch.device("cpu")))[0]
    low, high = torch.tensor([1 / 2, 1 / 3]), torch.tensor([1.0, 2 / 3])
    corners = [[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]]
    assert_close(places[:4], torch.tensor(corners))
    assert_close(places[4:], torch.tensor([[1 / 2, 1 / 3], [1 / 2, 2 / 3], [1.0, 1 / 3]]))


# ------------------------------------------------------------------ the network


def plain(backbone: RotaryViT, picture: torch.Tensor, visible: list[int], asked: list[int]):
    """Patch by patch and head by head, in plain products: what is answered for one picture, and predicted."""
    model, rows, columns = backbone.model, picture.shape[1] // 8, picture.shape[2] // 8
    place = {p: (p // columns / (rows - 1), p % columns / (columns - 1)) for p in range(rows * columns)}
    squares = [picture[:, p // columns * 8 :, p % columns * 8 :][:, :8, :8] for p in visible]
    kernel = model.patch_embed.weight.flatten(1)
    patches = [kernel @ square.flatten() + model.patch_embed.bias for square in squares]
    ys, xs = zip(*(place[p] for p in visible))
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    where = [(min(ys) + y * (max(ys) - min(ys)), min(xs) + x * (max(xs) - min(xs))) for y, x in corners]
    where += [place[p] for p in visible]

    def norm(x, gain=1.0):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def turn(x, at):
        f = 2 * math.pi * 7 * 1e4 ** -torch.linspace(0, 1, 4)
        parts = []
        for half, coordinate in zip(x.chunk(2), at):
            first, second = half.chunk(2)
            cos, sin = (f * coordinate).cos(), (f * coordinate).sin()
            parts += [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(parts)

    def attend(attn, x, at, context, of):
        answers = []
        for head in (slice(0, 16), slice(16, 32)):
            q = torch.stack([turn(attn.q_proj.weight[head] @ t, p) for t, p in zip(x, at)])
            k = torch.stack([turn(attn.k_proj.weight[head] @ t, p) for t, p in zip(context, of)])
            v = torch.stack([attn.v_proj.weight[head] @ t for t in context])
            answers.append(torch.softmax(q @ k.T / 4, -1) @ v)
        return torch.cat(answers, 1) @ attn.proj.weight.T

    def mlp(block, x):
        inner = norm(x, block.norm2.weight) @ block.mlp.fc1.weight.T
        return (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ block.mlp.fc2.weight.T

    sequence = torch.cat([model.registers[0], torch.stack(patches)])
    for block in model.blocks:
        source = norm(sequence, block.norm1.weight)
        sequence = sequence + attend(block.attn, source, where, source, where)
        sequence = sequence + mlp(block, sequence)
    answered = norm(sequence)
    queries = model.predictor.mask_token.expand(len(asked), -1)
    for block in model.predictor.blocks:
        wanted = [place[p] for p in asked]
        queries = queries + attend(block.attn, norm(queries, block.norm1.weight), wanted, answered, where)
        queries = queries + mlp(block, queries)
    return answered, norm(queries)


def test_agrees_with_a_plain_statement_of_the_equations():
    backbone, x = network(), pictures()
    visible, asked = some(2, 5), some(2, 3, seed=3)
    with torch.no_grad():
        tokens = backbone(x, visible=visible)
        predictions = backbone.predict(tokens, visible, asked)
        for row in range(2):
            answered, predicted = plain(backbone, x[row], visible[row].tolist(), asked[row].tolist())
            assert_close(tokens.registers[row], answered[:4], atol=1e-4, rtol=1e-4)
            assert_close(tokens.patches[row], answered[4:], atol=1e-4, rtol=1e-4)
            assert_close(predictions[row], predicted, atol=1e-4, rtol=1e-4)
        whole = list(range(12))
        answered, predicted = plain(backbone, x[0], whole, whole)
        tokens = backbone(x)
        assert_close(tokens.patches[0], answered[4:], atol=1e-4, rtol=1e-4)
        assert_close(backbone.predict(tokens)[0], predicted, atol=1e-4, rtol=1e-4)
    assert tokens.grid == (3, 4) and tokens.cls is None


def test_a_prediction_does_not_depend_on_what_else_is_asked_for():
    backbone = network()
    visible = some(2, 5)
    with torch.no_grad():
        tokens = backbone(pictures(), visible=visible)
        every = backbone.predict(tokens, visible)
        few = torch.tensor([[7, 2], [0, 11]])
        chosen = every.gather(1, few[..., None].expand(-1, -1, 32))
        assert_close(backbone.predict(tokens, visible, few), chosen, atol=1e-5, rtol=1e-4)
    assert (every[:, 0] - every[:, 1]).abs().max() > 0.01, "places are told apart"


def test_pixels_that_are_not_visible_change_nothing():
    backbone, x, visible = network(), pictures(), some(2, 5)
    with torch.no_grad():
        before = backbone(x, visible=visible)
        hidden = torch.ones(2, 12, dtype=torch.bool).scatter(1, visible, False)
        where = hidden.unflatten(1, (3, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        after = backbone(torch.where(where[:, None], 9.0, x), visible=visible)
    assert torch.equal(before.patches, after.patches) and torch.equal(before.registers, after.registers)


def test_an_early_stop_is_the_tap_after_the_final_norm():
    backbone, x = network(), pictures()
    with torch.no_grad():
        tokens = backbone(x, taps=(0, 1, "block2"))
        assert list(tokens.taps) == ["block0", "block1", "block2"]
        stopped = backbone(x, until=2)
        assert_close(backbone.tokens_at(tokens.taps["block2"], tokens.grid).patches, stopped.patches)
        assert tokens.taps["block0"].shape == (2, 16, 32) and backbone.num_prefix == 4
        assert_close(tokens.taps["block0"][0, :4], backbone.model.registers[0])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (6, 2)])
def test_any_height_and_width(rows, columns):
    backbone = network(num_registers=0) if rows == columns else network()
    tokens = backbone(pictures(rows, columns))
    assert tokens.grid == (rows, columns) and tokens.patches.shape == (2, rows * columns, 32)
    assert tokens.patches.isfinite().all() and backbone.predict(tokens).isfinite().all()


def test_other_sizes_are_padded_at_the_right_and_bottom_which_is_said_once():
    backbone, x = network(), pictures(2, 3)
    with pytest.warns(UserWarning, match="13 x 20 px"):
        found = backbone(x[:, :, :13, :20])
    padded = torch.zeros_like(x)
    padded[:, :, :13, :20] = x[:, :, :13, :20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found.patches, backbone(padded).patches) and backbone.grid(13, 20) == (2, 3)
        backbone(x[:, :, :13, :20])


def test_outputs_are_mean_patches_and_what_the_predictors_first_block_says_of_all_places():
    backbone, x = network(), pictures()
    with torch.no_grad():
        parts = parts_of(backbone, x)
        tokens = backbone(x)
        assert list(outputs_of(parts)) == ["mean_patch", "last3_mean_patch", "predicted"]
        assert_close(parts["predicted"], backbone.predict(tokens, until=1).mean(1))
        assert_close(parts["mean-1"], tokens.patches.mean(1))
        without = network(predictor_depth=0)
        assert "predict" not in without.can and "predicted" not in parts_of(without, x)


def test_a_wider_predictor_has_heads_as_wide_as_the_encoders():
    backbone = network(predictor_dim=48)
    assert backbone.predictor_dim == 48 and backbone.model.predictor.blocks[0].attn.num_heads == 3
    tokens = backbone(pictures())
    assert backbone.predict(tokens).shape == (2, 12, 48)


def test_dropped_rows_are_not_computed_and_a_teacher_drops_nothing():
    student = network(drop_path_rate=0.5).train()
    x = pictures(batch=4)
    assert not torch.equal(student(x).patches, student(x).patches)
    teacher = EMA(student).train()
    assert torch.equal(teacher(x).patches, student.eval()(x).patches)

    block, seen = student.train().blocks[1], []
    block.mlp.register_forward_hook(lambda module, given, answer: seen.append(len(given[0])))
    visible = some(4, 5)
    _, sequence, rope = student.embed(x, visible)
    torch.manual_seed(3)
    found = block(sequence, rope)
    torch.manual_seed(3)
    attend, think = torch.randperm(4)[:2], torch.randperm(4)[:2]
    expected = sequence.clone()
    for row in attend:  # with the rotations of its own visible patches
        expected[row] += 2 * block.attn(block.norm1(sequence[row : row + 1]), rope[row : row + 1], None, None)[0]
    before = expected.clone()
    for row in think:
        expected[row] += 2 * block.mlp(block.norm2(before[row : row + 1]))[0]
    assert seen[0] == 2
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_are_drawn_as_published():
    torch.manual_seed(0)
    backbone = RotaryViT(patch_size=4, embed_dim=256, depth=1, num_heads=4, predictor_depth=1)
    model = backbone.model
    for weight in (model.blocks[0].attn.q_proj.weight, model.blocks[0].mlp.fc1.weight, model.patch_embed.weight):
        flat = weight.flatten(1)
        bound = math.sqrt(6 / sum(flat.shape))
        assert 0.98 * bound < flat.abs().max() <= bound
    assert model.registers.shape == (1, 16, 256)
    assert (
        abs(float(model.registers.detach().std()) - 0.02) < 1e-3
        and abs(float(model.predictor.mask_token.detach().std()) - 0.02) < 4e-3
    )
    biases = [name for name, _ in backbone.named_parameters() if name.endswith("bias")]
    assert biases == ["model.patch_embed.bias"]


def test_plain_attention_is_the_fused_one_and_can_be_shown():
    backbone, x = network(), pictures()
    with torch.no_grad():
        fused = backbone(x).patches
        shares = backbone.attention_map(x)
        for module in backbone.attention:
            module.fused_attn = False
        _, sequence, rope = backbone.embed(x, None)
        for block in backbone.blocks:
            sequence = block(sequence, rope)
        assert_close(backbone.tokens_at(sequence, (3, 4)).patches, fused, atol=1e-5, rtol=1e-4)
    assert shares.shares.shape == (2, 2, 12) and shares.query == "mean of the patches"
    assert bool(((shares.shares.sum(-1) > 0) & (shares.shares.sum(-1) < 1)).all()), "registers get the rest"


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        backbone = network(activation_checkpointing=checkpointing).train()
        backbone(pictures()).patches.square().sum().backward()
        gradients.append([p.grad for name, p in backbone.named_parameters() if "predictor" not in name])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_it_is_rebuilt_from_its_record_and_from_what_it_is_exported_as(tmp_path):
    backbone = network(mixed_axes=True)
    again = build(backbone.record())
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again.eval()(pictures()).patches, backbone(pictures()).patches)
    with pytest.raises(UserError, match="plain timm has none like it"):
        export_backbone(backbone, tmp_path, "timm", lengths=(24, 32), mean=[0.5] * 3, std=[0.2] * 3)
    report = export_backbone(backbone, tmp_path, "safetensors", lengths=(24, 32), mean=[0.5] * 3, std=[0.2] * 3)
    assert report.difference <= 1e-5
    loaded = RotaryViT(**SMALL, mixed_axes=True, weights=str(tmp_path)).eval()
    assert torch.equal(loaded(pictures()).patches, backbone(pictures()).patches)
    with pytest.warns(UserWarning, match=r"not used by a backbone: predictor\.blocks.*, predictor\.mask_token\."):
        encoder = RotaryViT(**{**SMALL, "predictor_depth": 0}, mixed_axes=True, weights=str(tmp_path)).eval()
    assert torch.equal(encoder(pictures()).patches, backbone(pictures()).patches)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide embed_dim: 32"),
        ({"num_heads": 16}, "heads of 2 channels"),
        ({"num_registers": 6}, "num_registers: 6"),
        ({"predictor_dim": 40}, "a multiple of the encoder's heads of 16"),
        ({"predictor_depth": -1}, "predictor_depth: -1"),
        ({"depth": 0}, "depth: 0 is not a positive count"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"weights": "timm"}, "timm has no network like"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        RotaryViT(**{**SMALL, **settings})


def test_impossible_questions_are_refused():
    backbone = network()
    for asked, said in (
        ({"until": 4}, "1 to 3"),
        ({"taps": ("block2.mlp",)}, "whole blocks"),
        ({"taps": ("block2.qkv",)}, "whole blocks"),
        ({"keep": {1: 3}}, "cannot go on with fewer patches"),
        ({"masked": torch.zeros(2, 12, dtype=torch.bool)}, "no mask token"),
    ):
        with pytest.raises(UserError, match=said):
            backbone(pictures(), **asked)
    with pytest.raises(UserError, match="channels"):
        backbone(torch.zeros(2, 1, 24, 32))
