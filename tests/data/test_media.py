"""What a folder holds, and what its names say."""

from pathlib import Path

import pytest

from ssd.data.media import kind_of
from tests.data.files import write


def filled(folder: Path, names: str) -> str:
    for name in names.split():
        write(folder / name, b"anything")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("a/1.mp4 b/2.MKV notes.txt", "Clips"),
        ("1.wav 2.flac 3.jpg", "Sound"),
        ("a/1.jpg a/2.png film.mp4", "Images"),
        ("1.npy", "Images"),
        ("notes.txt", "Images"),
        ("part.parquet", "Images"),
    ],
)
def test_a_folder_is_what_most_of_its_files_are(tmp_path, names, kind):
    assert kind_of(filled(tmp_path / "some", names)) == kind


def test_a_list_is_what_it_lists(tmp_path):
    filled(tmp_path, "a/1.mp4 a/2.mp4 b/3.wav")
    for text, kind in [
        ("a/1.mp4 run\na/2.mp4 sit\n", "Clips"),
        ("b/3.wav\n", "Sound"),
        ("path\tgroup\nb/3.wav\tx\n", "Sound"),
    ]:
        listed = write(tmp_path / "list.tsv", text.encode())
        assert kind_of(str(listed)) == kind
