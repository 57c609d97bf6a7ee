"""Sequences: how they are read, what is refused, what a model makes of them, and a run of theirs from end to end."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae import MLP, Gaussian, Incomplete, importance_sampling, log_weights, runs
from pyro_vae.data import Schema, Sequences
from pyro_vae.data.files import read_new
from pyro_vae.data.incoming import observations
from pyro_vae.data.sequences import entries_head
from pyro_vae.errors import DataError, RunError
from pyro_vae.parts.likelihoods import Poisson
from pyro_vae.parts.mixed import Scaled
from pyro_vae.runs import figures

STEPS, FEATURES = 6, 2
LENGTHS = {"train_lengths": np.arange(40) % STEPS + 1, "test_lengths": np.arange(8) % STEPS + 1}


def arrays(padding=0.0, lengths=LENGTHS, **others):
    """Sequences of real numbers, with ``padding`` behind their ends."""
    draws = np.random.default_rng(0)
    made = {"train": draws.normal(5, 2, (40, STEPS, FEATURES)), "test": draws.normal(5, 2, (8, STEPS, FEATURES))}
    for part in made if lengths else ():
        made[part][np.arange(STEPS) >= lengths[f"{part}_lengths"][:, None]] = padding
    return made | lengths | others


def load(tmp_path, content, **settings):
    path = tmp_path / "sequences.npz"
    np.savez(path, **content)
    return Sequences("unused", path, **settings).load()


def test_sequences_are_flat_with_nan_behind_their_ends(tmp_path):
    content = arrays()
    data = load(tmp_path, content, num_validation=6)
    assert data.schema == Schema((STEPS, FEATURES), "sequence", missing=True, entries="real")
    assert Schema.loads(data.schema.dumps()) == data.schema
    assert (data.num_train, len(data.validation), len(data.test)) == (34, 6, 8)
    test = data.test.reshape(8, STEPS, FEATURES)
    assert ((~test.isnan()).sum((1, 2)) == torch.from_numpy(FEATURES * LENGTHS["test_lengths"])).all()
    assert torch.equal(test[1, :2], torch.tensor(content["test"][1, :2]).float())
    assert torch.equal(data.observe(torch.tensor([3])).nan_to_num(), data.train[3:4].nan_to_num())
    assert data.title == "Sequences of up to 6 steps, 1 at least, of 2 real numbers"


def test_padding_is_no_part_of_the_data(tmp_path):
    """Other numbers behind the ends, or NaN, are the same data."""
    found = [load(tmp_path, arrays(padding)) for padding in (0.0, -1e6, math.nan, math.inf)]
    as_nan = load(tmp_path, {name: array for name, array in arrays(math.nan).items() if name in ("train", "test")})
    for other in (*found[1:], as_nan):
        assert other.fingerprint == found[0].fingerprint
        assert torch.equal(other.train.nan_to_num(-1), found[0].train.nan_to_num(-1))
    assert load(tmp_path, arrays(test=arrays()["test"] + 1)).fingerprint != found[0].fingerprint


WHOLE = np.random.default_rng(1).integers(0, 5, (40, STEPS))


@pytest.mark.parametrize(
    ("train", "settings", "kind", "likelihood"),
    [
        (WHOLE.astype(float), {}, "real", "Scaled"),
        (WHOLE, {}, "count", "NegativeBinomial"),
        (WHOLE.astype(float), {"kind": "count"}, "count", "NegativeBinomial"),
        (WHOLE % 2, {}, "binary", "Bernoulli"),
        (WHOLE % 2 == 1, {}, "binary", "Bernoulli"),
        (WHOLE % 2, {"kind": "real"}, "real", "Scaled"),
        (WHOLE - 2, {}, "real", "Scaled"),
    ],
)
def test_kinds_of_numbers(train, settings, kind, likelihood, tmp_path):
    data = load(tmp_path, {"train": train, "test": train[:5]}, **settings)
    assert data.schema == Schema((STEPS, 1), "sequence", entries=kind)
    head = entries_head(data.schema)
    assert type(head).__name__ == likelihood
    data.check(head)
    wrong = Poisson(STEPS) if kind == "real" else Gaussian(STEPS)
    with pytest.raises(DataError, match=rf"--likelihood {type(wrong).__name__} is a .*; leave --likelihood away"):
        data.check(wrong)


REAL = arrays(lengths={})
REFUSED = {
    "lacks": ({"train": REAL["train"]}, "lacks the array 'test'"),
    "unknown": (arrays(lengths={}, lengths_of=np.ones(3)), "holds the array 'lengths_of'; those that are read are"),
    "flat": (arrays(lengths={}, train=np.ones(40)), r"train: expected an array \(N, T, F\) or \(N, T\), got .*\(40,\)"),
    "images": (arrays(lengths={}, train=np.ones((9, 2, 2, 2))), r"train: expected an array .*\(9, 2, 2, 2\)"),
    "empty": (arrays(lengths={}, test=np.ones((0, STEPS, 2))), r"test: expected an array .*\(0, 6, 2\)"),
    "strings": (arrays(lengths={}, train=np.full((40, STEPS), "a")), "train: expected numbers, got <U1"),
    "other F": (arrays(lengths={}, test=np.ones((8, STEPS, 3))), "6 steps of 2 in train and 6 steps of 3 in test"),
    "other T": (arrays(lengths={}, test=np.ones((8, 5, 2))), "6 steps of 2 in train and 5 steps of 2 in test"),
    "too long": (REAL | {"train_lengths": np.array([6, 7] * 20)}, r"train_lengths\[1\] is 7, it must be in 1\.\.6"),
    "too short": (REAL | {"test_lengths": np.array([6, 0] * 4)}, r"test_lengths\[1\] is 0, it must be in 1\.\.6"),
    "few lengths": (REAL | {"test_lengths": np.ones(7, int)}, r"test_lengths: expected 8 whole numbers, got .*\(7,\)"),
    "lengths of halves": (REAL | {"test_lengths": np.ones(8)}, "test_lengths: expected 8 whole numbers, got float64"),
    "infinite": (REAL | {"test": np.where(np.arange(2) == 1, np.inf, REAL["test"])}, r"test\[0, 0, 1\] is infinite"),
    "large": ({"train": WHOLE + 2**25, "test": WHOLE}, r"train\[0, 0, 0\] is above 16,777,216"),
    "one test": ({"train": WHOLE, "test": WHOLE[:1]}, "needs at least 2, there is 1"),
    "no training": ({"train": WHOLE[:1], "test": WHOLE}, "num_validation is 1, of only 1 training data"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(content, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, content)
    assert "\n" not in str(error.value)


def test_lengths_of_one_part_alone_are_told(tmp_path, capsys):
    load(tmp_path, REAL | {"train_lengths": LENGTHS["train_lengths"]})
    assert f"has no test_lengths: sequences of test are read as of {STEPS} steps" in capsys.readouterr().out
    load(tmp_path, REAL | LENGTHS)
    assert "_lengths" not in capsys.readouterr().out


def test_gaps_that_are_refused(tmp_path):
    train = REAL["train"].copy()
    train[7] = math.nan
    with pytest.raises(DataError, match=r"train\[7\]: nothing of this sequence was seen, all of it is NaN"):
        load(tmp_path, REAL | {"train": train})
    lengths = {"train_lengths": np.where(np.arange(40) < 36, 5, 6)}  # the longest are held out
    with pytest.raises(DataError, match=r"no training sequence was seen at \[5, 0\].*\(4 of train are held out"):
        load(tmp_path, REAL | lengths)
    with pytest.raises(DataError, match=r"train\[0, 0, 0\] is .*: --dataset.kind count is for counts"):
        load(tmp_path, REAL, kind="count")
    with pytest.raises(DataError, match=r"train\[\d+, \d, 0\] is \d: --dataset.kind binary is for zeros and ones"):
        load(tmp_path, {"train": WHOLE, "test": WHOLE}, kind="binary")
    with pytest.raises(ValueError, match="num_validation must be at least 1, got 0"):
        Sequences("unused", "x.npz", num_validation=0)
    np.save(tmp_path / "one.npy", WHOLE)
    with pytest.raises(DataError, match="is a single array"):
        Sequences("unused", tmp_path / "one.npy").load()


# What a model makes of them


def test_each_feature_has_a_scale_and_a_noise():
    head = entries_head(Schema((STEPS, FEATURES), "sequence", entries="real"))
    x = torch.randn(50, STEPS, FEATURES) * torch.tensor([3.0, 0.1]) + torch.tensor([100.0, -1.0])
    head.initialize(x.flatten(1))
    loc, scale = (each.reshape(STEPS, FEATURES) for each in (head.loc, head.scale))
    assert torch.allclose(loc, x.mean((0, 1)).expand(STEPS, -1), rtol=1e-5)
    assert torch.allclose(scale, x.flatten(0, 1).std(0).expand(STEPS, -1), rtol=1e-5)
    with torch.no_grad():
        head.head.raw_scale.copy_(torch.tensor([0.0, 2.0]))
    noise = 0.01 + torch.tensor([0.0, 2.0]).exp().log1p()
    raw = torch.randn(50, STEPS * FEATURES)
    by_hand = (
        stats.norm((loc + scale * raw.reshape(x.shape)).numpy(), (scale * noise).numpy()).logpdf(x.numpy()).sum((1, 2))
    )
    np.testing.assert_allclose(head(raw).log_prob(x.flatten(1)).detach(), by_hand, rtol=1e-4)
    with pytest.raises(ValueError, match="features must divide 12 entries, whose scale is learned, got 5"):
        Gaussian(12, features=5)
    with pytest.raises(ValueError, match="features must divide 12 entries, whose scale is learned, got 2"):
        Gaussian(12, scale="per_pixel", features=2)
    for make in (lambda: Scaled(Gaussian(12), 5), lambda: Incomplete(MLP(24, 2), 12, features=5)):
        with pytest.raises(ValueError, match="features must divide the 12 entries, got 5"):
            make()


def test_an_encoder_of_sequences_standardizes_by_feature():
    """Of a step that one sequence alone has reached, nothing can be told from itself."""
    encoder = Incomplete(MLP(24, 2), 12, features=2)
    x = (torch.randn(30, 6, 2) * torch.tensor([3.0, 0.1])).masked_fill(torch.arange(6)[:, None] > 3, math.nan)
    x[0, 5] = torch.tensor([1.0, 0.5])
    encoder.initialize(x.flatten(1))
    seen = [x[..., feature][~x[..., feature].isnan()] for feature in (0, 1)]
    expected = torch.tensor([[each.mean(), each.std(correction=0)] for each in seen])
    assert torch.allclose(encoder.loc, expected[:, 0].repeat(6), rtol=1e-4, atol=1e-6)
    assert torch.allclose(encoder.scale, expected[:, 1].repeat(6), rtol=1e-4)


@pytest.mark.parametrize("name", ["MLP", "Conv", "Recurrent"])
def test_padding_changes_no_log_p(name):
    parts = ("MLP", "MLP") if name == "MLP" else (f"{name}Encoder", f"{name}Decoder")
    chosen = [f"--{part}={made}" for part, made in zip(("encoder", "decoder"), parts, strict=True)]
    settings, _ = runs.parse(runs.Settings, ["--dataset=Sequences", "--dataset.path=x", "--latent_dim=3", *chosen])
    vae = runs.build(settings, Schema((STEPS, FEATURES), "sequence", missing=True, entries="real"))
    x = torch.randn(5, STEPS, FEATURES)
    seen = (torch.arange(STEPS) < torch.tensor([6, 4, 1, 3, 5])[:, None]).unsqueeze(-1).expand(x.shape).flatten(1)
    x = x.flatten(1)
    vae.initialize(x)
    weights = []
    for data in ((x, seen), (x.masked_fill(~seen, 1e6), seen), x.masked_fill(~seen, math.nan)):
        torch.manual_seed(0)
        weights.append(log_weights(vae.model, vae.guide, data, 4))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert weights[0].isfinite().all()


def test_log_p_of_what_was_seen_alone():
    """Decoder and encoder are affine: what was seen of a sequence is normal."""
    settings, _ = runs.parse(
        runs.Settings,
        ["--dataset=Sequences", "--dataset.path=x", "--latent_dim=2", "--decoder.hidden=[]", "--posterior=FullRank"],
    )
    vae = runs.build(settings, Schema((STEPS, FEATURES), "sequence", missing=True, entries="real")).double()
    x = (3 * torch.randn(5, STEPS * FEATURES) + 10).double()
    vae.initialize(x)
    seen = torch.arange(STEPS * FEATURES) < torch.tensor([12, 8, 2, 6, 10])[:, None]
    head, layer = vae.likelihood.head, vae.likelihood.network.layers[0]
    weight, loc = (head.scale[:, None] * layer.weight).detach(), (head.loc + head.scale * layer.bias).detach()
    noise = head.scale * (0.01 + torch.nn.functional.softplus(head.head.raw_scale.detach())).repeat(STEPS)
    covariance = weight @ weight.mT + torch.diag(noise.square())
    found = importance_sampling(
        vae.model, vae.guide, x.masked_fill(~seen, math.nan), 100, "laplace", num_checked=0, compiled=False
    )
    for row, known, log_p in zip(x, seen, found.log_px, strict=True):
        exact = stats.multivariate_normal(loc[known].numpy(), covariance[known][:, known].numpy())
        assert log_p.item() == pytest.approx(exact.logpdf(row[known].numpy()), abs=1e-5)


def test_new_sequences_have_lengths(tmp_path):
    schema = Schema((STEPS, FEATURES), "sequence", missing=True, entries="real")
    np.savez(tmp_path / "new.npz", **arrays(1e6))
    found = observations(read_new(tmp_path / "new.npz", schema).x, schema)
    assert torch.equal(found.isnan().sum(1), FEATURES * (STEPS - torch.from_numpy(LENGTHS["test_lengths"])))
    assert found[~found.isnan()].max() < 100
    np.savez(tmp_path / "one.npz", x=arrays()["test"], lengths=LENGTHS["test_lengths"])
    with pytest.raises(DataError, match="in 'x' are read from 'x_lengths', not 'lengths'"):
        read_new(tmp_path / "one.npz", schema)
    np.savez(tmp_path / "flat.npz", x=arrays()["test"].reshape(8, -1))
    assert observations(read_new(tmp_path / "flat.npz", schema).x, schema).shape == (8, STEPS * FEATURES)


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences")
    np.savez(folder / "sequences.npz", **arrays())
    return runs.train(settings_of(folder))


def settings_of(folder, *more):
    few = ["--epochs=1", "--latent_dim=2", "--evidence.num_samples=20", "--evidence.annealed_images=0"]
    return runs.parse(
        runs.Settings,
        [
            *("--dataset=Sequences", f"--dataset.path={folder / 'sequences.npz'}", f"--run_dir={folder / 'run'}"),
            *("--encoder=RecurrentEncoder", "--encoder.hidden=8", "--decoder=ConvDecoder", "--decoder.channels=[4]"),
            *(*few, *more),
        ],
    )[0]


@pytest.mark.slow
def test_sequences_are_drawn(finished, tmp_path):
    figures.pictures(finished.model.model, finished.model.guide, finished.data, tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"latent_space.png", "reconstructions.png", "samples.png"}


def test_a_run_of_sequences(finished):
    assert finished.result["unit"] == "nats per sequence, density"
    assert math.isfinite(finished.result["test_log_likelihood"])
    scored = runs.score(finished, estimator="importance", num_samples=20)
    assert scored.evidence["importance"].log_px.shape == (8,)
    (finished.path.parent / "sequences.npz").rename(finished.path.parent / "elsewhere.npz")
    vae = runs.load(finished.path).model  # no data are needed
    assert vae.posterior.network.features == FEATURES
    assert vae.likelihood.head.head.raw_scale.shape == (FEATURES,)
    x = torch.from_numpy(arrays(math.nan)["test"]).float().flatten(1)
    assert importance_sampling(vae.model, vae.guide, x, 20, num_checked=0).log_px.isfinite().all()


def test_mistakes_are_told_in_one_line(tmp_path):
    np.savez(tmp_path / "sequences.npz", **REAL, train_lengths=np.full(40, 9))
    with pytest.raises(RunError, match=r"train_lengths\[0\] is 9, it must be in 1\.\.6"):
        runs.train(settings_of(tmp_path))
    assert not (tmp_path / "run").exists()
    np.savez(tmp_path / "sequences.npz", **REAL)
    with pytest.raises(RunError, match="--likelihood Poisson is a mass, and these are sequences of real numbers"):
        runs.train(settings_of(tmp_path, "--likelihood=Poisson"))
