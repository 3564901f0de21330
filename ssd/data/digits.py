"""The digits that come with scikit-learn: real data that needs no download."""

import hashlib

import numpy as np

from ssd.data.randomness import generator
from ssd.errors import UserError

NUM_TRAIN = 1297
SPLIT = -7  # key of the fixed split: the same pictures are held out whatever the run's seed is


class DigitsSource:
    """1,797 handwritten digits, 8x8, grey: 1,297 to train on and 500 held out, split once and for all.

    Values 0 to 16 become 0 to 255. Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits",
    UCI 1998; the copy inside scikit-learn.
    """

    classes: list[str] | None = [str(digit) for digit in range(10)]

    def __init__(self, split: str = "train"):
        if split not in ("train", "val"):
            raise UserError(f"split is {split!r}. The digits have 'train' and 'val'.")
        from sklearn.datasets import load_digits

        pictures, labels = load_digits(return_X_y=True)  # (1797, 64) 0 to 16
        order = generator(SPLIT).permutation(len(pictures))
        rows = np.sort(order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:])
        self.split = split
        self.labels = labels[rows].astype(np.int64)
        self._pictures = np.rint(pictures[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)

    def __len__(self) -> int:
        return len(self._pictures)

    def open(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"digit {index} of the {self.split} split"

    def fingerprint(self) -> str:
        return hashlib.sha256(self._pictures.tobytes() + self.labels.tobytes()).hexdigest()
