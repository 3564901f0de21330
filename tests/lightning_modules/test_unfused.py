"""UnFuSeD: the equations, who is labelled by what, and that labels are found once and are the same everywhere."""

import csv

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from datamodules.digits import Digits
from datamodules.sound import Sound
from lightning_modules.unfused import LABEL_FILE, UnFuSeD
from ssd.backbones.convnet import ConvNet
from ssd.backbones.mel_convnet import MelConvNet
from ssd.backbones.speech import LogMelEncoder, SpeechEncoder
from ssd.backbones.video import VideoViT
from ssd.backbones.vit import ViT
from ssd.batch import Batch, Rows, Targets
from ssd.data.manifest import read_manifest
from ssd.errors import UserError
from ssd.optim import SGD
from ssd.views.clips import ClipViews
from ssd.views.recipes import CropViews
from ssd.views.sound import SoundViews
from ssd.views.spectra import draw_spectra
from tests.contract import MethodContract, flat_state, start
from tests.data.media_files import write_digits
from tests.lightning_modules.runs import At, differences, everything, fit, fit_as_rank, last

RATE_HZ = 8000
HEARS = {"rate_hz": RATE_HZ, "mels": 16, "patch": (2, 16), "embed_dim": 32, "depth": 3, "num_heads": 2}
VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
SOUNDS = SoundViews(
    rate_hz=RATE_HZ,
    global_length_s=0.2,
    global_count=1,
    local_count=0,
    gain_db=(0.0, 0.0),
    noise_prob=0.0,
    mix_share=0.4,
    mix_group=2,
    resize=(0.6, 1.5),
)
CLIPS = ClipViews(global_count=1, global_size=16, global_frames=4, local_count=0)
LABELLED = {"labels": 6, "clusters": 3}


def log_mel() -> LogMelEncoder:
    return LogMelEncoder(**HEARS)


def vit(**settings) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=16, in_chans=1, arguments={**VIT, **settings})


def made(make=log_mel, labeller=None, **settings) -> UnFuSeD:
    """Freshly drawn from one seed, without layers that couple samples, and without labels."""
    torch.manual_seed(0)
    views = {log_mel: SOUNDS, vit: CropViews(size=16)}.get(make, CLIPS)
    defaults = {"views": views, "num_clusters": 3, "taught_blocks": (1, 2), "head_batch_norm": False, "lr": 1e-3}
    return UnFuSeD(make(), (labeller or make)(), **defaults | {"random_labeller": True} | settings)


def labelled(module: UnFuSeD, samples: int = 16) -> UnFuSeD:
    """With labels that do not come from its labeller."""
    features = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    module.pseudo_labels.settle(features, torch.arange(samples), samples, "data")
    return module


def sounds(samples: int, seed: int) -> Batch:
    """Noise of unequal lengths."""
    views, valid = torch.zeros(1, samples, 1600), torch.zeros(1, samples, 1600, dtype=torch.bool)
    for row in range(samples):
        length = 1600 - 90 * (row % 8)
        drawn = torch.randn(length, generator=torch.Generator().manual_seed(1000 * seed + row))
        views[0, row, :length], valid[0, row, :length] = drawn, True
    spectra = np.stack([draw_spectra(SOUNDS, 0, seed, row)["global"] for row in range(samples)], axis=1)
    index = torch.arange(samples) + seed
    spectra = {"global": torch.from_numpy(spectra)}
    return Batch({"global": views}, index, samples, valid={"global": valid}, spectra=spectra)


def random_views(samples: int, seed: int, *shape: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {"global": torch.randn(1, samples, *shape, generator=generator)}
    return Batch(views=views, index=torch.arange(samples) + seed, total=samples)


class TestContract(MethodContract):
    """Sounds of unequal lengths, mixed and cropped."""

    def make(self, **engine):
        return labelled(made(**engine))

    def batch(self, samples, seed):
        return sounds(samples, seed)


class TestContractOfPictures(MethodContract):
    """The classifier pulled towards its blocks too, as published."""

    def make(self, **engine):
        return labelled(made(vit, **{"detach_teacher": False} | engine))

    def batch(self, samples, seed):
        return random_views(samples, seed, 1, 16, 16)


def video() -> VideoViT:
    return VideoViT("vit_tiny_patch16_224", arguments=VIT)


def test_clips_go_through_the_same_step():
    module = labelled(made(video))
    report = module.take_step(random_views(4, 0, 3, 4, 16, 16), start(module))
    assert set(report.terms) == {"label", "block_label", "kl", "cosine"} and not report.not_finite


# ---------------------------------------------------------------- the equations


class Says(nn.Module):
    """Answers what it was told: the classifier's logits and those of blocks, for every sample."""

    blocks = (1, 2, 3)

    def __init__(self, deep: list[float], blocks: list[list[float]]):
        super().__init__()
        self.deep, self.shallow = (nn.Parameter(torch.tensor(logits)) for logits in (deep, blocks))
        self.backbone = made(vit).student.backbone

    def forward(self, samples):
        return torch.cat([self.deep[None], self.shallow]).expand(len(samples), -1, -1)


def terms_of(deep, blocks, labels, **settings):
    module = made(vit, num_clusters=2, **settings)
    module.student = Says(deep, blocks)
    batch = random_views(len(labels), 0, 1, 16, 16)
    return module, module.losses(batch, Targets(labels=Rows(torch.tensor(labels))))


def test_worked_example():
    """K = 2, g = [2, 0], three a = [0, 0], y = 0: .126928, .693147 each, .327813 each; 1.877569 without the last term."""
    module, terms = terms_of([2.0, 0.0], [[0.0, 0.0]] * 3, [0, 0])
    expected = {"label": 0.126928, "block_label": 3 * 0.693147, "kl": 3 * 0.327813}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=3e-6)
    total = sum(module._weight(name) * terms[name] for name in expected)
    assert total.item() == pytest.approx(1.877569, abs=3e-6)


def test_distances_are_0_between_parallel_logits_2_between_orthogonal_and_4_between_opposite_ones():
    _, terms = terms_of([2.0, 1.0], [[4.0, 2.0], [-1.0, 2.0], [-2.0, -1.0]], [0])
    assert terms["cosine"].item() == pytest.approx(0 + 2 + 4, abs=1e-5)


def test_terms_are_means_over_samples_and_views_and_sums_over_blocks():
    once, twice = (terms_of([2.0, 0.0], [[0.5, 0.0]] * 3, [0, 1] * times)[1] for times in (1, 2))
    for name in once:
        assert_close(once[name], twice[name])


def test_published_weights_and_rates():
    module = UnFuSeD(MelConvNet(), MelConvNet())
    assert (module.block_label_weight, module.kl_weight, module.cosine_weight) == (0.7, 0.3, 0.003)
    assert (module.lr, module.optimizer, module.weight_decay) == (0.03, SGD(momentum=0.9), 1e-4)
    assert module.clip is None and module.student.blocks == (1, 2, 3) and module.pseudo_labels.num_clusters == 32
    widths = [[part.out_features for part in head if isinstance(part, nn.Linear)] for head in module.student.heads]
    assert widths == [[32, 32, 32]] * 3 and [head[0].in_features for head in module.student.heads] == [2048, 1024, 512]
    assert [type(part).__name__ for part in module.student.heads[0]] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + [
        "Linear"
    ]


@pytest.mark.parametrize("detached", [True, False])
def test_the_classifier_is_drawn_towards_its_blocks_only_where_that_is_asked_for(detached):
    module, terms = terms_of([2.0, 1.0], [[0.5, 2.0]] * 3, [0], detach_teacher=detached)
    (terms["kl"] + terms["cosine"]).backward()
    assert (module.student.shallow.grad != 0).all()
    assert (module.student.deep.grad == 0).all() == detached


def test_a_sample_without_a_label_learns_from_the_classifier_alone():
    _, with_label = terms_of([2.0, 0.0], [[0.5, 0.0]] * 3, [0, 1])
    _, without = terms_of([2.0, 0.0], [[0.5, 0.0]] * 3, [0, -1])
    assert without["label"].item() == pytest.approx(0.126928 / 2, abs=1e-6)
    assert without["kl"] == with_label["kl"] and without["cosine"] == with_label["cosine"]


def test_blocks_answer_by_their_means_without_padding():
    module = labelled(made())
    batch = sounds(4, 0)
    batch.spectra = {}
    logits = module.student(module._samples(batch))
    for row in range(4):
        alone = batch.views["global"][0, row : row + 1, : int(batch.valid["global"][0, row].sum())]
        assert_close(module.student(alone)[0], logits[row], atol=1e-5, rtol=1e-4)


def test_targets_are_the_labels_of_the_samples_in_the_batch():
    module = labelled(made(vit))
    batch = random_views(4, 5, 1, 16, 16)
    batch.index = torch.tensor([9, 3, 3, 99])
    expected = [*module.pseudo_labels.labels[[9, 3, 3]].tolist(), -1]
    assert module.targets(batch).labels.tolist() == expected


# ---------------------------------------------------------------- labels from data


def digits(**settings) -> Digits:
    data = Digits(**{"batch_size": 16, "limit": 96, "num_workers": 0} | settings)
    data.prepare(CropViews(size=16))
    return data


def with_batch_norm() -> ConvNet:
    arguments = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
    return ConvNet("resnet18", in_chans=1, arguments=arguments)


def test_clip_vectors_of_the_whole_labeller_are_clustered_and_not_its_first_block():
    module, data = made(vit), digits()
    seen = {}
    module.pseudo_labels.settle = lambda features, index, *rest: seen.update(features=features, index=index)
    module._embedded_by_labeller, kept = module._embedded_by_labeller, module._labeller[0]
    found = module._embedded_by_labeller(data)
    batch = next(iter(data.look_at(data.source)))
    with torch.no_grad():
        assert_close(found.features[:16], kept(batch["sample"]).pooled())
    assert found.index.tolist() == list(range(96))
    named = made(vit, labeller_output="last3_cls")._embedded_by_labeller(data).features
    assert named.shape == (96, 72) and torch.equal(named[:, 48:], found.features)


def test_batch_normalisation_evaluates_while_samples_are_labelled():
    found = []
    for size in (16, 5):
        module = made(vit, with_batch_norm)
        (labeller,) = module._labeller
        module.train()
        before = flat_state(labeller)
        module.survey(digits(batch_size=size))
        assert all(torch.equal(before[name], value) for name, value in labeller.state_dict().items())
        found.append(module.pseudo_labels.labels)
    assert torch.equal(*found), "batches of another size change no label"


def test_the_labeller_is_neither_trained_nor_saved():
    module = made(vit)
    (labeller,) = module._labeller
    own = {id(parameter) for parameter in module.parameters()}
    assert not own & {id(parameter) for parameter in labeller.parameters()}
    assert not any(parameter.requires_grad for parameter in labeller.parameters())
    assert not any("labeller" in name for name in module.state_dict())


def test_a_labeller_without_weights_is_refused_unless_it_is_meant():
    module = made(vit, random_labeller=False)
    with pytest.raises(UserError, match=r"no weights.*random_labeller: true"):
        module.survey(digits())
    with pytest.raises(UserError, match="num_clusters: 97 are more than the 96"):
        made(vit, num_clusters=97).survey(digits())


def test_loaders_without_a_datamodule_are_refused():
    with pytest.raises(UserError, match="NoneType does not give them"):
        made(vit).survey(None)


def test_other_samples_are_labelled_anew_before_the_first_step_and_refused_later():
    module = made(vit)
    module.survey(digits())
    first = module.pseudo_labels.labels
    module.survey(digits())
    assert module.pseudo_labels.labels is first, "not again"
    module.survey(digits(limit=80))
    assert len(module.pseudo_labels.labels) == 80
    module.step = 1
    with pytest.raises(UserError, match="other training samples"):
        module.survey(digits())


def test_the_label_file_has_a_line_for_each_training_sound_and_is_data(tmp_path, capsys):
    folder = write_digits(tmp_path / "digits")
    (folder / "1_bob_2.wav").write_bytes(b"broken")
    data = Sound(folder, label_pattern="^(?P<label>[0-9])_", held_out_pattern="_0[.]wav$", num_workers=0, batch_size=8)
    data.max_broken_share = 0.1
    module = made()
    data.prepare(SOUNDS)
    module.survey(data, tmp_path)
    with open(tmp_path / LABEL_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    training = {data.source.describe(index) for index in range(len(data.source))}
    assert {row["path"] for row in rows} == training - {str(folder / "1_bob_2.wav")} and len(rows) == 26
    assert not any("_0.wav" in row["path"] for row in rows), "nothing that is held out"
    numbers = {int(row["label"]) for row in rows}
    assert numbers == set(range(len(numbers))) and len(numbers) <= 3
    assert read_manifest(tmp_path / LABEL_FILE).labels == [row["label"] for row in rows]
    again = Sound(tmp_path / LABEL_FILE, val_share=0)
    assert again.source.labels.tolist() == [int(row["label"]) for row in rows]
    said = capsys.readouterr().out
    assert "26 sounds in" in said and "1 that cannot be read without" in said and "of 1 (not used)" in said


# ---------------------------------------------------------------- runs


def pictures(**settings) -> UnFuSeD:
    return made(vit, **settings)


def test_a_run_goes_on_as_if_never_stopped_and_clusters_once(tmp_path, monkeypatch):
    fit(tmp_path / "whole", pictures(steps=12))
    fit(tmp_path / "part", pictures(steps=12), callbacks=[At(5, lambda trainer, module: module._stop())])
    labels = (tmp_path / "part" / LABEL_FILE).read_text()
    assert labels == (tmp_path / "whole" / LABEL_FILE).read_text() and labels.count("\n") == 161

    def again(*arguments):
        raise AssertionError("clusters a second time")

    monkeypatch.setattr("ssd.pseudo_labels.clustered", again)
    rest = pictures(steps=12, cluster_seed=5, random_labeller=False)
    fit(tmp_path / "rest", rest, resume=last(tmp_path / "part"))
    found, expected = everything(last(tmp_path / "rest")), everything(last(tmp_path / "whole"))
    assert not differences(found, expected)
    assert expected["state_dict"]["pseudo_labels._extra_state"]["labels"].shape == (160,)


def test_two_processes_of_a_run_have_one_runs_labels_and_weights(tmp_path, pair):
    alone = pictures(steps=6)
    torch.manual_seed(7)
    fit(tmp_path / "one", alone, limit_val_batches=0)
    runs = pair.run(fit_as_rank, tmp_path / "two", pictures, {"steps": 6}, {})
    for module, error in runs:
        assert error is None
        assert torch.equal(module.pseudo_labels.labels, alone.pseudo_labels.labels)
        for name, value in flat_state(module).items():
            assert_close(value, flat_state(alone)[name], atol=2e-5, rtol=1e-4)


def test_slices_with_batch_normalisation_are_refused_and_without_are_not(tmp_path):
    with pytest.raises(UserError, match="micro_batches: 2 with batch normalisation"):
        fit(tmp_path, pictures(steps=2, micro_batches=2, head_batch_norm=True))


def test_the_student_learns_the_labels_it_is_given():
    """Better than naming the largest cluster, of sounds that were never shown in the same way."""
    torch.manual_seed(0)
    views = SoundViews(rate_hz=RATE_HZ, global_length_s=0.2, global_count=1, local_count=0, noise_prob=0.0)
    backbone = MelConvNet(rate_hz=RATE_HZ, mels=16, channels=8, embed_dim=32, dropout=0.0)
    module = UnFuSeD(backbone, log_mel(), views=views, num_clusters=8, steps=80)
    labels = torch.arange(32) % 8
    module.pseudo_labels.settle(torch.eye(8)[labels], torch.arange(32), 32, "data")
    of = module.pseudo_labels.labels
    module.train()
    module.begin(80, 80)
    optimizers = module.build_optimizers()
    for step in range(80):
        module.take_step(tones(of, step), optimizers)
    module.eval()
    with torch.no_grad():
        answers = module.student(module._samples(tones(of, 99))).argmax(2)
    assert ((answers == of[:, None]).float().mean(0) > 0.9).all(), "the classifier and each block"


def tones(labels: torch.Tensor, seed: int) -> Batch:
    """A pitch for each label, in noise."""
    time = torch.arange(1600) / RATE_HZ
    clean = torch.sin(2 * torch.pi * (300 + 400 * labels)[:, None] * time)
    noise = torch.randn(len(labels), 1600, generator=torch.Generator().manual_seed(seed))
    return Batch({"global": (clean + noise)[None]}, torch.arange(len(labels)), len(labels))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"taught_blocks": (0, 1)}, "numbers from 1 to 3"),
        ({"taught_blocks": (4,)}, "numbers from 1 to 3"),
        ({"taught_blocks": ()}, "numbers from 1 to 3"),
        ({"num_clusters": 1}, "num_clusters: 1"),
        ({"views": "unfused"}, "hears 8000 samples a second, and views are of 16000"),
        ({"views": "crop"}, "hears 8000 samples a second, and views are CropViews"),
        ({"labeller": vit}, "different kinds of data"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        made(**settings)


def test_networks_without_a_spectrogram_refuse_to_change_one():
    def waveform() -> SpeechEncoder:
        return SpeechEncoder(rate_hz=RATE_HZ, conv_dim=16, embed_dim=32, depth=2, num_heads=2)

    with pytest.raises(UserError, match="makes none"):
        made(waveform, views=SOUNDS)
    with pytest.raises(UserError, match="mix_group: 2 does not fit the 1 sounds"):
        module = labelled(made())
        module.losses(sounds(1, 0), module.targets(sounds(1, 0)))
