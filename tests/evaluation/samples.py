"""Features for tests: classes as overlapping clouds, and scikit-learn's digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor


def clouds(number: int, width: int = 16, classes: int = 5, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes that overlap, with unequal scales and offsets of the dimensions. (N, D) and (N,)"""
    random = np.random.default_rng([7, width, classes])
    centres = random.normal(size=(classes, width))
    scale, offset = random.uniform(0.2, 5, width), random.normal(size=width)
    random = np.random.default_rng([seed, number])
    labels = random.permutation(np.arange(number) % classes)
    features = (centres[labels] + spread * random.normal(size=(number, width))) * scale + offset
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def digits(order: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels and labels of 1297 training and 500 test digits, a fixed random split."""
    data = load_digits()
    place = np.random.default_rng(order).permutation(len(data.target))
    features, labels = torch.from_numpy(data.data[place] / 16).float(), torch.from_numpy(data.target[place]).long()
    return features[:1297], labels[:1297], features[1297:], labels[1297:]
