"""The probe's numbers beside scikit-learn's on the same features of real pictures: kNN exactly, logistic within 0.1 points."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from datamodules.images import Images
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.evaluation.choice import choose_for_knn
from ssd.evaluation.feature_cache import feature_table
from ssd.evaluation.logistic import logistic_predict
from ssd.evaluation.splits import held_out
from ssd.evaluation.suite import evaluate
from ssd.views.recipes import PlainViews

pytestmark = pytest.mark.data

VIT = {"patch_size": 8, "depth": 2, "embed_dim": 96, "num_heads": 3}
RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 64], "stem_width": 16}


def cifar10(folder):
    torch.manual_seed(0)
    data = Images(folder / "cifar10-train.parquet", folder / "cifar10-test.parquet", limit=2000, num_workers=0)
    return data, PlainViews(size=32), ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT), 1000


def caltech20(folder):
    torch.manual_seed(0)
    data = Images(folder / "caltech20", val_share=0.3, limit=600, num_workers=0)
    return data, PlainViews(size=64), ConvNet("resnet18", arguments=RESNET), None


@pytest.fixture(scope="module", params=[cifar10, caltech20], ids=lambda build: build.__name__)
def tables(request, real_data):
    """Features of training and test pictures by an untrained network, whose spectrum is as bad as they come."""
    data, views, backbone, test_limit = request.param(real_data)
    data.prepare(views)
    found = []
    for source, loader in zip(data.test_sources(), data.test_dataloader(), strict=True):
        most = test_limit if found and test_limit else len(source)
        batches = (batch for number, batch in enumerate(loader) if number * data.batch_size < most)
        found.append(feature_table(backbone.eval(), batches, len(source), {}, None)[0])
    return found


def by_scikit_learn(bank, labels, queries, k, center):
    bank, queries = bank.double().numpy(), queries.double().numpy()
    if center:
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    votes = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    return votes.fit(bank, labels.numpy()).predict(queries)


def test_knn_is_exactly_scikit_learns(tables):
    bank, queries = (table.features() for table in tables)
    numbers = evaluate(bank.features, bank.labels, queries.features, queries.labels, measures=("knn",))
    found = {number.name: number.value for number in numbers}
    truth = queries.labels.numpy()
    for group, center in (("knn", False), ("knn_centred", True)):
        for k in (10, 20, 100, 200):
            theirs = by_scikit_learn(bank.features, bank.labels, queries.features, k, center)
            assert found[f"{group}/k{k}/top1"] == pytest.approx((theirs == truth).mean(), abs=1e-12)


def test_logistic_regression_is_scikit_learns_to_a_tenth_of_a_point(tables):
    bank, queries = (table.features() for table in tables)
    ours = logistic_predict(bank.features, bank.labels, queries.features)
    scaler = StandardScaler().fit(bank.features.double().numpy())
    train, test = (scaler.transform(part.features.double().numpy()) for part in (bank, queries))
    theirs = LogisticRegression(C=1 / ours.setting, tol=1e-5, max_iter=5000).fit(train, bank.labels.numpy())
    truth = queries.labels.numpy()
    accuracy = float((ours.predictions.numpy() == truth).mean())
    # a sample on a border may fall to either side of it by rounding, and one is more than 0.1 points of few
    assert accuracy == pytest.approx(theirs.score(test, truth), abs=max(0.001, 1.01 / len(truth)))


def test_the_chosen_output_is_the_one_that_scikit_learns_neighbours_choose(tables):
    bank, queries = tables
    outputs = {
        name: (lambda name=name: (bank.features(name).features, queries.features(name).features))
        for name in bank.outputs()
    }
    choice = choose_for_knn(outputs, bank.labels, queries.labels)
    fit, held = held_out(bank.labels, 0.1, 0)
    for name, give in outputs.items():
        train, _ = give()
        theirs = by_scikit_learn(train[fit], bank.labels[fit], train[held], 20, True)
        assert choice.held_out[name] == pytest.approx((theirs == bank.labels[held].numpy()).mean(), abs=1e-12)
    assert choice.held_out[choice.output] == max(choice.held_out.values())
