"""Picture files: a folder of them, or a text file that lists them."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssd.data.manifest import PATH_COLUMNS, has_header, read_manifest
from ssd.data.memory import ByteTable, SharedArray
from ssd.errors import UserError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy",
)  # fmt: skip
LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
MOST_CHANNELS = 16  # of a picture whose channels come first: told from its rows by its number of columns
LABEL_CHOICES = ("auto", True, False)


class FolderSource:
    """Picture files under a folder, at any depth, or those that a text file lists.

    A folder is read in the order of its sorted names; hidden files and files with other suffixes are
    passed over; links are followed, and one to nothing counts as a broken picture. A list has one path a
    line, relative to the list's own folder or absolute, and optionally a label (a class name, or whole
    numbers throughout) behind a tab, a comma or a space; one with a header is a manifest, whose column `group` says
    which samples belong together (`ssd/data/manifest.py`). Files are opened when they are needed, not
    before. Raises UserError where there is nothing to read.

    Args:
        path: the folder or the list.
        suffixes: of the files that count, in lower case.
        word: what they are called in messages.
        labels: of a folder: True = the first folder below `path` is the class, False = none, "auto" = the
            former where all pictures lie exactly one folder down and there are two or more such folders.
            Of a list: "auto" and True = what it says, False = none.
    """

    def __init__(
        self,
        path: str | Path,
        labels: bool | str = "auto",
        *,
        suffixes: tuple[str, ...] = SUFFIXES,
        word: str = "picture",
    ):
        if labels not in LABEL_CHOICES:
            raise UserError(f"labels is {labels!r}. Use 'auto', true (folder names are the classes) or false.")
        path = Path(path)
        self.classes: list[str] | None = None
        groups = None
        if path.is_dir():
            self.root = str(path)
            names = list(picture_files(self.root, suffixes))
            if not all(name.lower().endswith(".npy") for name in names):
                # arrays beside pictures are something else: labels, features
                names = [name for name in names if not name.lower().endswith(".npy")]
            if not names:
                raise UserError(
                    f"folder '{path}' holds no {word}s, at no depth. Looked for files that end in "
                    f"{', '.join(suffixes)}. Is it the right folder?"
                )
            found, self.classes = classes_of_folders(names, path, labels, word)
        elif path.is_file():
            self.root = str(path.parent)
            if has_header(path):
                table = read_manifest(path)
                check_files(path, table.names[:10])
                names, given, groups = table.names, table.labels, table.groups
            else:
                names, given = read_list(path, suffixes)
            found, self.classes = classes_of_list(given) if labels is not False else (None, None)
        else:
            raise UserError(f"there is no folder or list '{path}'. Give a folder of {word}s or a text file of paths.")
        self._names = ByteTable.of([os.fsencode(name) for name in names])
        self._labels = None if found is None else SharedArray.of(found)
        self._groups = None if groups is None else SharedArray.of(groups)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def groups(self) -> np.ndarray | None:
        """(N,) int64, -1 for a sample that stands alone; None where no manifest gives them."""
        return None if self._groups is None else self._groups.array

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.array

    def open(self, index: int) -> bytes | np.ndarray:
        path = self.describe(index)
        if path.lower().endswith(".npy"):
            return read_array(path, path)
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels.array[index])

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self.path_within(index))

    def path_within(self, index: int) -> str:
        """Below the folder, or as the list has it."""
        return os.fsdecode(self._names[index])

    def fingerprint(self) -> str:
        """Of names and labels, not of what the files hold; the same wherever the folder lies."""
        state = hashlib.sha256(self._names.content().data)
        state.update(self._names.ends().data)
        if self._labels is not None:
            state.update(self._labels.array.data)
        return state.hexdigest()


def read_array(file: str | io.BytesIO, name: str) -> np.ndarray:
    """One picture, (H, W), (H, W, C), or (C, H, W) with C up to 16. Raises OSError where the file is damaged."""
    try:
        picture = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise OSError(f"{name}: {error}") from None
    if picture.ndim == 3 and picture.shape[0] <= MOST_CHANNELS < picture.shape[2]:
        picture = picture.transpose(1, 2, 0)
    return np.ascontiguousarray(picture)


def picture_files(root: str, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[str]:
    """Files that end in one of `suffixes`, relative to `root`, folder by folder in sorted order; each folder once."""
    seen: set[tuple[int, int]] = set()

    def walk(folder: str) -> Iterator[str]:
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            return
        seen.add((status.st_dev, status.st_ino))
        folders: list[str] = []
        files: list[str] = []
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if leads_to_folder(entry):
                    folders.append(os.path.join(folder, entry.name))
                elif entry.name.lower().endswith(suffixes) and (entry.is_symlink() or entry.is_file()):
                    files.append(os.path.join(folder, entry.name))
        yield from sorted(files)
        for below in sorted(folders):
            yield from walk(below)

    try:
        yield from walk("")
    except PermissionError as error:
        raise UserError(f"folder '{error.filename}' may not be read. Change its permissions or move it away.") from None


def leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Also over a link; links that lead to each other lead nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def classes_of_folders(
    names: Sequence[str], root: Path, labels: bool | str, word: str = "picture"
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,) and classes from the first folder of each relative path, as `FolderSource` says."""
    if labels is False:
        return None, None
    depths = {name.count(os.sep) for name in names}
    if labels == "auto" and depths != {1}:
        return None, None
    if 0 in depths:
        stray = next(name for name in names if os.sep not in name)
        raise UserError(
            f"labels: true takes the class from the folder that a {word} lies in, but '{stray}' lies in '{root}' "
            "itself. Move it into the folder of its class, or use labels: false."
        )
    firsts = [name.partition(os.sep)[0] for name in names]
    classes = sorted(set(firsts))
    if labels == "auto" and len(classes) < 2:
        return None, None
    number = {name: place for place, name in enumerate(classes)}
    return np.fromiter((number[first] for first in firsts), np.int64, len(firsts)), classes


def read_list(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], list[str | None]]:
    """Paths and labels as written, None where a line has no label."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not a text file. A list has one path a line, in UTF-8.") from None
    pairs = [split_line(line, suffixes) for line in lines if line.strip()]
    if pairs and pairs[0][0].lower() in PATH_COLUMNS:
        pairs = pairs[1:]
    check_files(path, [name for name, _ in pairs[:10]])
    return [name for name, _ in pairs], [label for _, label in pairs]


def check_files(path: Path, first: Sequence[str]) -> None:
    """Raises UserError where a list has no lines, or none of its first files is there."""
    if not first:
        raise UserError(f"list '{path}' is empty. Write one path a line, relative to '{path.parent}' or absolute.")
    if not any((path.parent / name).exists() for name in first):
        raise UserError(
            f"none of the first {len(first)} files in '{path}' exists, for instance '{path.parent / first[0]}'. "
            "Paths are relative to the list's own folder, or absolute."
        )


def split_line(line: str, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[str, str | None]:
    """Path and label of one line. A comma or space parts them only where no file's name would be cut."""
    line = line.strip("\r\n ")
    if "\t" in line:
        separator = "\t"
    elif line.lower().endswith(suffixes):
        return line, None
    else:
        separator = "," if "," in line else " "
    name, found, label = line.rpartition(separator)
    return (name.strip(), label.strip() or None) if found else (line, None)


def classes_of_list(given: Sequence[str | None]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,), -1 where a line has none, and class names, None where labels are numbers."""
    words = {label for label in given if label is not None}
    if not words:
        return None, None
    if all(word.isdecimal() for word in words):
        return np.fromiter((-1 if label is None else int(label) for label in given), np.int64, len(given)), None
    classes = sorted(words)
    number = {name: place for place, name in enumerate(classes)}
    return np.fromiter((-1 if label is None else number[label] for label in given), np.int64, len(given)), classes
