import numpy as np
import pytest
import torch
from PIL import Image

from ssd.data.folder import FolderSource
from ssd.data.label_maps import LabelMaps
from ssd.data.sources import Subset, open_source
from ssd.errors import UserError
from ssd.views.geometry import evaluation_map, evaluation_picture

LABELS = np.array([[0, 1, 2], [255, 3, 7]], dtype=np.uint8)


def written(folder, names, labels=LABELS, mode="L"):
    """Pictures under `pictures`, maps under `maps`."""
    for name in names:
        picture = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
        image = Image.fromarray(labels)
        if mode == "P":
            image.putpalette([3 * i % 256 for i in range(768)])
        elif mode != "L":
            image = image.convert(mode)
        for kind, one in (("pictures", picture), ("maps", image)):
            file = (folder / kind / name).with_suffix(".png" if kind == "maps" else ".jpg")
            file.parent.mkdir(parents=True, exist_ok=True)
            one.save(file)
    return FolderSource(folder / "pictures")


@pytest.mark.parametrize("mode", ["L", "P"])
def test_labels_are_the_numbers_in_the_file_not_its_colours(tmp_path, mode):
    source = written(tmp_path, ["a.jpg", "b/c.jpg"], mode=mode)
    maps = LabelMaps(tmp_path / "maps", source)
    assert len(maps) == 2 and (maps[0] == LABELS).all() and (maps[1] == LABELS).all()


def test_maps_follow_their_pictures_through_a_choice_of_them(tmp_path):
    for number in range(4):
        source = written(tmp_path, [f"{number}.jpg"], np.full((2, 3), number, np.uint8))
    maps = LabelMaps(tmp_path / "maps", Subset(source, np.array([3, 1])))
    assert [maps[i][0, 0] for i in range(2)] == [3, 1]


def test_parts_of_the_pictures_may_be_parts_of_the_maps(tmp_path):
    written(tmp_path, ["train/a.jpg", "val/a.jpg"])
    maps = LabelMaps(tmp_path / "maps", FolderSource(tmp_path / "pictures" / "val"))
    assert maps.files == [str(tmp_path / "maps" / "val" / "a.png")]


def test_a_turned_picture_has_a_map_as_it_is_seen(tmp_path):
    source = written(tmp_path, ["a.jpg"], LABELS.T.copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "pictures" / "a.jpg").save(tmp_path / "pictures" / "a.jpg", exif=exif)
    assert LabelMaps(tmp_path / "maps", source)[0].shape == (3, 2)


@pytest.mark.parametrize("shape", [(20, 30), (31, 17), (9, 9), (64, 40)])
@pytest.mark.parametrize(("size", "crop"), [(16, 0.875), (16, 1.0), (24, 0.6)])
def test_a_map_is_seen_where_its_picture_is(shape, size, crop):
    """A picture that is its own map, in blocks: away from borders between labels both show the same."""
    blocks = np.add.outer(np.arange(shape[0]) * 3 // shape[0], np.arange(shape[1]) * 3 // shape[1]) % 2 * 200
    labels = blocks.astype(np.uint8)
    picture = evaluation_picture(labels[:, :, None].repeat(3, 2), size, crop)[0].numpy()
    seen = evaluation_map(labels, size, crop)
    assert seen.shape == (size, size) and set(np.unique(seen)) <= {0, 200}
    sure = (picture < 5) | (picture > 195)
    assert sure.mean() > 0.4 and ((picture > 100) == (seen == 200))[sure].all()
    # a border may fall to either side of a pixel that is nearly half and half
    assert ((picture > 100) == (seen == 200)).mean() > 0.95


def test_a_map_of_the_size_that_is_asked_for_is_itself():
    labels = torch.arange(64, dtype=torch.uint8).view(8, 8).numpy()
    assert (evaluation_map(labels, 8, 1.0) == labels).all()
    assert (evaluation_map(labels, 4, 0.5) == labels[2:6, 2:6]).all()


def test_what_does_not_fit_is_said(tmp_path):
    source = written(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(UserError, match="there is no folder of label maps"):
        LabelMaps(tmp_path / "nowhere", source)
    (tmp_path / "maps" / "b.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 3 pictures have no label map in .*maps', for instance b\.jpg, for which b\.png"
    ):
        LabelMaps(tmp_path / "maps", source)
    np.save(tmp_path / "stack.npy", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(UserError, match="belong to pictures in a folder"):
        LabelMaps(tmp_path / "maps", open_source(tmp_path / "stack.npy"))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.zeros((2, 3, 3), np.uint8)), "has mode RGB. Labels are one number a pixel"),
        (Image.fromarray(np.zeros((3, 3), np.uint8)), "is 3 x 3 px, and its picture"),
        (Image.fromarray(np.zeros((2, 3), np.uint16)), "8 bits"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_map_is_named(tmp_path, image, words):
    source = written(tmp_path, ["a.jpg"])
    file = tmp_path / "maps" / "a.png"
    if image is None:
        file.write_bytes(b"nothing")
    else:
        image.save(file)
    with pytest.raises(UserError, match=r"a\.png") as told:
        LabelMaps(tmp_path / "maps", source)[0]
    assert words in str(told.value)
