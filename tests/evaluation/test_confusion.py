import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from ssd.evaluation.confusion import class_accuracies, confusion, confusion_picture, most_confused

MATRIX = torch.tensor([[7, 3, 0], [0, 4, 0], [1, 1, 18]])


def test_rows_are_true_classes_as_in_scikit_learn():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(4, size=100), random.integers(4, size=100)
    ours = confusion(torch.from_numpy(predictions), torch.from_numpy(labels))
    assert (ours.numpy() == confusion_matrix(labels, predictions)).all()


def test_accuracy_class_by_class():
    accuracies = class_accuracies(torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]]))
    assert accuracies[[0, 2]].tolist() == [0.75, 0.5] and accuracies[1].isnan()


def test_the_pairs_confused_most_by_their_share_of_the_true_class():
    assert most_confused(MATRIX, ["cat", "dog", "car"]) == [
        "cat taken for dog: 30.0% (3 of 10)",
        "car taken for cat: 5.0% (1 of 20)",
        "car taken for dog: 5.0% (1 of 20)",
    ]
    assert most_confused(MATRIX, count=1) == ["0 taken for 1: 30.0% (3 of 10)"]
    assert most_confused(torch.eye(3, dtype=torch.long)) == []


@pytest.mark.parametrize("number", [4, 30, 120])
def test_a_confusion_is_drawn_in_the_row_of_its_class(number):
    """The first class taken for the last changes both ends of the highest row, and no other."""
    square = 10 * torch.eye(number, dtype=torch.long)
    clean = np.asarray(confusion_picture(square)).astype(int)

    def changed(row, values):
        """Where in the picture, as a share of its height, and how high and wide."""
        matrix = square.clone()
        matrix[row] = values
        rows, columns = np.nonzero((np.asarray(confusion_picture(matrix)).astype(int) != clean).any(2))
        return rows.mean() / clean.shape[0], np.ptp(rows), np.ptp(columns)

    last = torch.eye(number, dtype=torch.long)[-1]
    place, height, width = changed(0, 100 * last)
    assert place < 0.25 and height < 1.2 * clean.shape[0] / number and width > 0.5 * clean.shape[1]
    assert changed(-1, 100 * last.flip(0))[0] > 0.5
    place, height, _ = changed(number // 2, 0 * last)  # blank is not the white of a share of 0
    assert 0.25 < place < 0.65 and height < 1.2 * clean.shape[0] / number


def test_a_class_without_samples_is_in_no_pair():
    matrix = MATRIX.clone()
    matrix[1] = 0
    assert most_confused(matrix, count=9) == [
        "0 taken for 1: 30.0% (3 of 10)",
        "2 taken for 0: 5.0% (1 of 20)",
        "2 taken for 1: 5.0% (1 of 20)",
    ]
