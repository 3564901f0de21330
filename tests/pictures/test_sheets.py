"""What stands on the sheets: attention over the picture, neighbours in their frames, prototypes' best rows."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ssd.backbones.base import Attention
from ssd.batch import Scores, Tokens
from ssd.errors import UserError
from ssd.heads import Branch, PrototypeHead
from ssd.patch_heads import PatchBranch, PatchHead
from ssd.pictures.attention import attention_sheet, overlaid, spread
from ssd.pictures.layout import FRAME, GAP, LINE, Cell, cut_off, font, table
from ssd.pictures.neighbours import OTHER, SAME, UNKNOWN, agreement, nearest, neighbour_sheet
from ssd.pictures.prototypes import OUTLINE, answers_of, most_used, patch_in_place

GREY = np.full((16, 16, 3), 100, np.uint8)


def test_attention_that_is_even_is_spread_over_all_patches_and_one_that_is_not_over_one():
    shares = torch.stack([torch.full((8,), 0.05), torch.eye(8)[3], torch.tensor([0.5, 0.5] + [0.0] * 6)])
    assert_close(spread(shares), torch.tensor([8.0, 1.0, 2.0]))


def test_the_patch_that_is_looked_at_is_bright_and_the_others_keep_the_picture():
    values = torch.zeros(2, 2)
    values[0, 1] = 0.9
    shown = overlaid(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2), values).astype(int)
    assert shown[:8, 8:].mean() > 150 and shown[8:].mean() < 60
    assert shown[15, 15].sum() > shown[8, 0].sum() + 50, "the picture shows through"


def test_a_row_is_the_picture_the_mean_and_each_head():
    shares = torch.zeros(1, 3, 4)
    shares[0, :, :3] = torch.eye(3)
    page = np.array(attention_sheet([GREY], Attention(shares, (2, 2), "class token"), cell=16)).astype(int)
    assert page.shape[1] == GAP + 5 * (16 + GAP)
    top = GAP + LINE
    cells = [page[top : top + 16, GAP + n * (16 + GAP) :][:, :16].sum(2) for n in range(5)]
    bright = [[int(cell[r : r + 8, c : c + 8].mean()) for r in (0, 8) for c in (0, 8)] for cell in cells[1:]]
    assert [int(np.argmax(of_head)) for of_head in bright[1:]] == [0, 1, 2]
    assert bright[0][0] == bright[0][1] == bright[0][2] > bright[0][3]


def test_neighbours_are_those_of_a_plain_search_and_never_the_query_itself():
    bank = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) + 1
    queries, own = bank[[4, 9]] * 3, torch.tensor([4, -1])
    similarity, rows = nearest(queries, bank, 4, own)
    centred = bank - bank.mean(0)
    for query, mine, near, found in zip(queries - bank.mean(0), own.tolist(), similarity, rows):
        plain = torch.nn.functional.cosine_similarity(query[None], centred)
        plain[mine] = -2 if mine >= 0 else plain[mine]
        assert found.tolist() == plain.argsort(descending=True)[:4].tolist()
        assert_close(near, plain[found])
    assert nearest(queries, bank[:3], 8)[1].shape == (2, 3), "as many as there are"


def test_frames_say_whether_classes_agree():
    assert [agreement(2, 2), agreement(2, 3), agreement(-1, 3), agreement(2, -1)] == [SAME, OTHER, UNKNOWN, UNKNOWN]
    page = neighbour_sheet([GREY], [[GREY, GREY]], torch.tensor([[0.9, 0.8]]), [1], [[1, 0]], ["ant", "bee"], cell=16)
    row = np.array(page)[GAP + LINE + FRAME - 1]
    assert tuple(row[GAP + 16 + GAP + 8]) == SAME and tuple(row[GAP + 2 * (16 + GAP) + 8]) == OTHER


def test_the_most_used_prototypes_come_first_with_the_rows_that_score_highest_for_them():
    """By hand: prototypes along x, y, -x; five rows nearest x, two nearest y, none nearest -x."""
    prototypes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    rows = torch.tensor([[0.9, 0.1], [0.1, 0.8], [1.0, 0.0], [0.7, 0.3], [0.6, 0.2], [0.2, 0.9], [0.8, 0.0]])
    shown = most_used(Scores(rows, prototypes), prototypes=3, count=4)
    assert shown.numbers.tolist() == [1, 0] and shown.shares.tolist() == pytest.approx([5 / 7, 2 / 7])
    assert shown.rows.tolist() == [[2, 0, 6, 3], [5, 1, -1, -1]]


def test_of_the_patches_of_a_picture_one_is_shown():
    rows = torch.tensor([[0.9], [1.0], [0.8], [0.2], [0.5], [0.7]])  # three pictures of two patches
    shown = most_used(Scores(rows, torch.ones(1, 1)), prototypes=1, count=6, together=2)
    assert shown.rows.tolist() == [[1, 2, 5]]


def test_most_used_prototypes_do_not_depend_on_how_many_rows_are_compared_at_once(monkeypatch):
    scores = Scores(torch.randn(50, 4), torch.randn(20, 4))
    whole = most_used(scores, 5, 3)
    monkeypatch.setattr("ssd.pictures.prototypes.SCORES_AT_ONCE", 7 * 20)
    assert all(torch.equal(a, b) for a, b in zip(whole, most_used(scores, 5, 3)))


@pytest.mark.parametrize(("patch", "shown"), [(5, (1, 1)), (0, (0, 0)), (15, (2, 2)), (3, (0, 2))])
def test_a_patch_is_outlined_among_its_neighbours(patch, shown):
    """On a grid of 4 x 4: in the middle of nine where there are nine around it, else at their edge."""
    picture = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, 2).repeat(8, 0).repeat(8, 1)
    cut = patch_in_place(picture, patch, (4, 4))
    side = len(cut) // 3
    assert cut.shape == (3 * side, 3 * side, 3) and side >= 24
    row, column = shown
    inside = cut[row * side : (row + 1) * side, column * side : (column + 1) * side]
    assert (inside[0] == OUTLINE).all() and (inside[:, -1] == OUTLINE).all()
    assert (inside[1:-1, 1:-1] == patch).all()


def test_prototypes_of_patches_are_asked_with_patches_and_those_of_pictures_with_pictures():
    backbone = torch.nn.Identity()
    backbone.embed_dim, backbone.model = 6, None
    tokens = Tokens(patches=torch.randn(2, 4, 6), grid=(2, 2), cls=torch.randn(2, 6))
    head = PrototypeHead(6, 5, hidden_dim=8, bottleneck_dim=4)
    answers, what = answers_of(Branch(backbone, head), tokens)
    assert what == "samples" and torch.equal(answers.logits(), head(tokens.cls).logits())
    for network in (PatchBranch(backbone, PatchHead(head)), PatchBranch(backbone, torch.nn.Identity(), head)):
        answers, what = answers_of(network, tokens)
        assert what == "patches"
        assert_close(answers.features, head(tokens.patches.flatten(0, 1)).features)
    with pytest.raises(UserError, match="no prototypes"):
        answers_of(Branch(backbone, torch.nn.Identity()), tokens)


def test_text_that_does_not_fit_ends_in_dots():
    assert cut_off("ant", 90) == "ant"
    short = cut_off("a name that goes on for ever", 90)
    assert short.endswith("...") and 60 < font().getlength(short) <= 90


def test_rows_may_have_different_numbers_of_cells():
    page = table([[Cell(GREY)], [Cell(GREY, "x"), Cell(GREY)]], titles=["a", "b"], cell=16)
    assert isinstance(page, Image.Image) and page.width == GAP + 2 * (16 + GAP)
