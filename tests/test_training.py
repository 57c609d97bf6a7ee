import itertools
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.testing.fakes
import pytest
import schedulefree
import torch
from oracles import binary, small_vae
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import (
    ELBO,
    IWAE,
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    ContractError,
    MeanField,
    NonFiniteError,
    PyroSVI,
    StandardNormal,
    importance_sampling,
    likelihoods,
    log_weights,
    objectives,
)
from pyro_vae import fit as plain_fit
from pyro_vae.errors import CheckpointError
from pyro_vae.infer.checks import check_program
from pyro_vae.infer.diagnostics import mean_log_weights
from pyro_vae.infer.retreat import Retreat
from pyro_vae.optimizers import Muon, Together, Trapezoid
from pyro_vae.training import (
    AverageWeights,
    BestWeights,
    Callback,
    Checkpoint,
    EarlyStopping,
    FlatBatches,
    OnEpoch,
    Training,
)


class Fixed:
    """The same mini-batches each epoch."""

    def __init__(self, x, batch_size=20):
        self.parts = x.split(batch_size)

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        return iter(self.parts)


class Shuffled(Fixed):
    def __init__(self, x, batch_size=20):
        super().__init__(x, batch_size)
        self.x, self.batch_size = x, batch_size

    def __iter__(self):
        return iter(self.x[torch.randperm(len(self.x))].split(self.batch_size))


class BreaksDown(nn.Module):
    """A part that works for so many calls and gives NaN from then on."""

    def __init__(self, part, calls):
        super().__init__()
        self.part, self.calls = part, calls
        self.sizes, self.event_size = getattr(part, "sizes", ()), getattr(part, "event_size", 0)
        self.in_features, self.out_features = getattr(part, "in_features", 0), getattr(part, "out_features", 0)

    def forward(self, *inputs):
        self.calls -= 1
        return self.part(*(x if self.calls >= 0 else x * math.nan for x in inputs))


def cosine(optimizer, *, steps_per_epoch, epochs):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "muon": Muon,
    "schedule_free": schedulefree.AdamWScheduleFree,
}
WEIGHTS = {"last": [], "best": [BestWeights()], "average": [AverageWeights(0.7)]}


def fit(*args, **kwargs):
    return plain_fit(*args, progress=False, **kwargs)


def state(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def without_time(history):
    return [row[:-1] for row in history]


@pytest.fixture
def scripted(monkeypatch):
    """Replace the validation ELBO of successive epochs by given values."""

    def script(*values):
        iterator = iter(values)
        monkeypatch.setattr("pyro_vae.training._validation_elbo", lambda vae, x: next(iterator))

    return script


def interrupt_after(epoch):
    def hook(history):
        if len(history) == epoch:
            raise KeyboardInterrupt

    return hook


@pytest.mark.slow
def test_learns_and_reports_bounds_per_datum():
    vae, x = small_vae(), binary(100)
    history = fit(vae, Fixed(x), x, epochs=30, lr=0.01, schedule="constant")
    assert [row.epoch for row in history] == list(range(1, 31))
    assert history[-1].validation_elbo > history[0].validation_elbo + 1
    # log p(x) of the best model is near -12 H(0.4) = -8.1; the sum over a batch would be 20 times that
    assert -9 < history[-1].train_elbo < -7
    assert history[-1].train_elbo == pytest.approx(history[-1].validation_elbo, abs=0.5)
    assert all(row.seconds > 0 for row in history)


def test_history_without_validation_has_nan():
    history = fit(small_vae(), Fixed(binary(20)), epochs=1)
    assert math.isnan(history[0].validation_elbo)


@pytest.mark.parametrize("sizes", [(60,), (25, 35), (1, 59)], ids=str)
def test_elbo_and_trace_elbo_have_the_same_scale_per_datum(sizes):
    x, histories = binary(60), []
    for loss in (ELBO(), Trace_ELBO()):
        torch.manual_seed(0)
        batches = Fixed(x)
        batches.parts = x.split(sizes)
        histories.append(fit(small_vae(), batches, epochs=2, lr=1e-12, loss=loss))  # so that only the scale differs
    for ours, pyros in zip(*histories, strict=True):
        assert ours.objective == pytest.approx(pyros.objective, rel=1e-9)
        assert ours.train_elbo == pytest.approx(pyros.train_elbo, rel=1e-9)


def test_constant_schedule_keeps_the_rate():
    history = fit(small_vae(), Fixed(binary(40)), epochs=8, lr=0.02, schedule="constant")
    assert {row.learning_rate for row in history} == {0.02}


def test_one_cycle_rises_to_lr_and_falls():
    rates = [row.learning_rate for row in fit(small_vae(), Fixed(binary(20)), epochs=20, lr=0.02)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.02)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-4


def test_patience_counts_epochs_since_the_best(scripted):
    scripted(-5.0, -3.0, -4.0, -3.5, -3.0, -1.0)
    history = fit(small_vae(), Fixed(binary(20)), binary(4), epochs=6, callbacks=[EarlyStopping(3)])
    # the equal value of epoch 5 is no rise
    assert [row.validation_elbo for row in history] == [-5, -3, -4, -3.5, -3]


def test_patience_does_not_stop_while_the_bound_rises(scripted):
    scripted(-5.0, -4.0, -3.0, -2.0)
    assert len(fit(small_vae(), Fixed(binary(20)), binary(4), epochs=4, callbacks=[EarlyStopping(1)])) == 4


@pytest.mark.parametrize(("callbacks", "epoch"), [([BestWeights()], 2), ([], 4)], ids=["best", "last"])
def test_weights_left_in_the_module(scripted, callbacks, epoch):
    scripted(-5.0, -3.0, -4.0, -3.5)
    vae, states = small_vae(), []
    fit(
        vae,
        Fixed(binary(20)),
        binary(4),
        epochs=4,
        schedule="constant",
        callbacks=[OnEpoch(lambda _: states.append(state(vae))), *callbacks],
    )
    assert not torch.equal(
        states[1]["likelihood.network.layers.0.weight"], states[3]["likelihood.network.layers.0.weight"]
    )
    assert_same(state(vae), states[epoch - 1])


RESUMED = [("one_cycle", "adam"), ("constant", "adam"), ("stages", "adam"), ("one_cycle", "SGD"), (cosine, "AdamW")]
RESUMED += [("trapezoid", "muon"), ("constant", "schedule_free")]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("schedule", "optimizer", "weights"),
    [(*each, weights) for each in RESUMED for weights in WEIGHTS if weights != "average" or each in RESUMED[-2:]],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_resuming_gives_the_uninterrupted_run(tmp_path, schedule, optimizer, weights):
    x, validation = binary(50), binary(30)
    settings = {"epochs": 5, "schedule": schedule, "optimizer": OPTIMIZERS.get(optimizer, "adam")}
    settings["lr"] = 0.002 if optimizer == "SGD" else 0.05  # Pyro's losses are sums over the batch
    chosen = WEIGHTS[weights]

    def new():
        torch.manual_seed(3)
        return small_vae()

    whole = new()
    expected = fit(whole, Shuffled(x), validation, callbacks=chosen, **settings)

    path = tmp_path / "checkpoint.pt"
    callbacks = [*chosen, Checkpoint(path), OnEpoch(interrupt_after(2))]
    with pytest.raises(KeyboardInterrupt):
        fit(new(), Shuffled(x), validation, callbacks=callbacks, **settings)
    resumed, seen = new(), []
    torch.manual_seed(99)  # what happened before must not matter
    callbacks = [OnEpoch(lambda h: seen.append(len(h))), Checkpoint(path, resume=True), *chosen]  # in any order
    history = fit(resumed, Shuffled(x), validation, callbacks=callbacks, **settings)
    assert without_time(history) == without_time(expected)
    assert_same(state(resumed), state(whole))
    assert seen == [2, 3, 4, 5]


def test_resuming_in_the_middle_of_patience(tmp_path, scripted):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    scripted(-3.0, -4.0, -5.0)
    vae, states = small_vae(), []
    note = OnEpoch(lambda h: (states.append(state(vae)), interrupt_after(2)(h)))
    with pytest.raises(KeyboardInterrupt):
        fit(vae, Fixed(x), x, epochs=9, callbacks=[EarlyStopping(2), Checkpoint(path), BestWeights(), note])
    other = small_vae()
    callbacks = [EarlyStopping(2), BestWeights(), Checkpoint(path, resume=True)]
    history = fit(other, Fixed(x), x, epochs=9, callbacks=callbacks)
    assert [row.validation_elbo for row in history] == [-3, -4, -5]
    assert_same(state(other), states[0])


def test_resuming_a_finished_training_trains_nothing(tmp_path):
    path, vae, x = tmp_path / "checkpoint.pt", small_vae(), binary(20)
    history = fit(vae, Fixed(x), x, epochs=2, callbacks=[Checkpoint(path)])
    before = path.read_bytes()
    other = small_vae()
    assert fit(other, Fixed(x), x, epochs=2, callbacks=[Checkpoint(path, resume=True)]) == history
    assert_same(state(other), state(vae))
    assert path.read_bytes() == before


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    history = fit(small_vae(), Fixed(binary(20)), epochs=2, callbacks=[Checkpoint(path, resume=True)])
    assert len(history) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def damaged(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not a checkpoint\n")


def tensors(path):
    torch.save({"weight": torch.zeros(3)}, path)


def tensor(path):
    torch.save(torch.zeros(3), path)


def module(path):
    torch.save(nn.Linear(2, 2), path)


@pytest.mark.parametrize("spoil", [damaged, empty, text, tensors, tensor, module], ids=lambda f: f.__name__)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, spoil):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    fit(small_vae(), Fixed(x), epochs=1, callbacks=[Checkpoint(path)])
    spoil(path)
    content = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        fit(small_vae(), Fixed(x), epochs=1, callbacks=[Checkpoint(path, resume=True)])
    assert str(path) in str(caught.value)
    assert "checkpoint of this program" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"latent_dim": 2}, "another model"),
        ({}, {"epochs": 3}, "steps 2, not 3"),
        ({}, {"lr": 0.5}, "lr 0.001, not 0.5"),
        ({"schedule": "constant"}, {}, "schedule constant, not one_cycle"),
        ({}, {"schedule": "constant"}, "schedule one_cycle, not constant"),
        ({"schedule": cosine}, {}, "schedule cosine, not one_cycle"),
        ({"schedule": cosine}, {"schedule": cosine, "epochs": 3}, "steps 2, not 3"),
        ({"optimizer": torch.optim.SGD}, {}, "optimizer SGD, not adam"),
        ({"optimizer": Muon}, {"optimizer": partial(torch.optim.SGD, momentum=0.9)}, "optimizer Muon, not SGD"),
    ],
    ids=lambda given: re.sub(" at 0x[0-9a-f]+", "", str(given)),  # the same in every process
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, first, second, words):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    for changes, resume in ((first, False), (second, True)):
        settings = {"epochs": 2, "lr": 0.001, "latent_dim": 3} | changes
        vae = small_vae(latent_dim=settings.pop("latent_dim"))
        if resume:
            with pytest.raises(CheckpointError, match=words) as caught:
                fit(vae, Fixed(x), callbacks=[Checkpoint(path, resume=True)], **settings)
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)
        else:
            fit(vae, Fixed(x), callbacks=[Checkpoint(path)], **settings)


@pytest.mark.slow
def test_a_flipped_bit_is_found(tmp_path):
    path, x, vae = tmp_path / "checkpoint.pt", binary(20), small_vae()
    fit(vae, Fixed(x), epochs=1, callbacks=[Checkpoint(path)])
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    training = SimpleNamespace(module=vae, load_state_dict=lambda content: None)
    for place in [*range(len(whole) - 70, len(whole)), *generator.integers(len(whole), size=60)]:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << generator.integers(8)
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="is damaged"):
            Checkpoint(path, resume=True).load(training)
    path.write_bytes(whole)
    Checkpoint(path, resume=True).load(training)


def test_a_checkpoint_about_something_else_is_refused(tmp_path):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    fit(small_vae(), Fixed(x), epochs=1, callbacks=[Checkpoint(path, about={"data": "these"})])
    with pytest.raises(CheckpointError, match="belongs to a training with data these, not those"):
        fit(small_vae(), Fixed(x), epochs=1, callbacks=[Checkpoint(path, resume=True, about={"data": "those"})])


def test_a_constant_schedule_can_be_prolonged(tmp_path):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    for epochs in (2, 3):
        callbacks = [Checkpoint(path, resume=True)]
        history = fit(small_vae(), Fixed(x), epochs=epochs, schedule="constant", callbacks=callbacks)
        assert len(history) == epochs


def test_a_checkpoint_that_cannot_be_written_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        fit(small_vae(), Fixed(binary(20)), epochs=1, callbacks=[Checkpoint(tmp_path / "missing" / "checkpoint.pt")])


def broken(part, calls):
    vae = small_vae()
    if part == "decoder":
        vae.likelihood.network = BreaksDown(vae.likelihood.network, calls)
    elif part == "likelihood":
        vae.likelihood.head = BreaksDown(vae.likelihood.head, calls)
    else:
        vae.posterior.network = BreaksDown(vae.posterior.network, calls)
    return vae


def calls_of_check(part):
    vae = broken(part, calls=10**6)
    check_program(vae.model, vae.guide, binary(20))
    return next(10**6 - module.calls for module in vae.modules() if isinstance(module, BreaksDown))


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize(
    ("part", "site"),
    [("encoder", "guide site 'z'"), ("decoder", "model site 'x'"), ("likelihood", "model site 'x'")],
)
def test_nan_stops_training_and_names_the_site(tmp_path, part, site, validated):
    path, x = tmp_path / "checkpoint.pt", binary(60)
    # check_program takes the first calls, each of the three steps of an epoch one, and so does its training ELBO
    vae, states = broken(part, calls=calls_of_check(part) + 4 + 4 + 1), []
    callbacks = [Checkpoint(path), OnEpoch(lambda _: states.append(state(vae)))]
    with pyro.validation_enabled(validated), pytest.raises(NonFiniteError, match=site) as caught:
        fit(vae, Fixed(x), epochs=5, schedule="constant", callbacks=callbacks)
    assert "\n" not in str(caught.value)
    assert len(states) == 2
    assert all(value.isfinite().all() for value in vae.state_dict().values())
    healthy = broken(part, calls=10**6)
    history = fit(healthy, Fixed(x), epochs=2, schedule="constant", callbacks=[Checkpoint(path, resume=True)])
    assert [row.epoch for row in history] == [1, 2]
    assert all(math.isfinite(row.train_elbo) for row in history)
    assert_same(state(healthy), states[-1])


def test_nan_of_validation_stops_training_too(scripted, tmp_path):
    scripted(-3.0, math.nan)
    with pytest.raises(NonFiniteError, match="validation ELBO is nan"):
        fit(small_vae(), Fixed(binary(20)), binary(4), epochs=5, callbacks=[Checkpoint(tmp_path / "checkpoint.pt")])
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 1


class Corner(MLP):
    """Finite everywhere, but its gradient is not: the square root of a parameter at zero."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.corner = nn.Parameter(torch.zeros(()))

    def forward(self, features):
        return super().forward(features) + self.corner.sqrt()


def test_a_gradient_that_is_not_finite_changes_nothing():
    encoder, decoder = MLP(12, 6, hidden=[4]), Corner(3, 12, hidden=[4])
    vae = VAE(StandardNormal(3), Conditional(decoder, Bernoulli(12)), Conditional(encoder, MeanField(3)))
    before = state(vae)
    with pytest.raises(NonFiniteError, match="a gradient is NaN or infinite, with every site finite"):
        fit(vae, Fixed(binary(20, dtype=torch.float32)), epochs=1)
    assert_same(state(vae), before)


class Trips(MLP):
    """An encoder that breaks down on rows of ones: by its output, its gradient, the step, or what Adam remembers."""

    def __init__(self, kind):
        super().__init__(12, 6, hidden=[4])
        self.kind, self.norm = kind, nn.BatchNorm1d(6)
        self.corner = nn.Parameter(torch.zeros(()))

    def forward(self, features):
        trips = features.amin(-1, keepdim=True)
        outputs = super().forward(features)
        outputs = self.norm(outputs.reshape(-1, 6)).reshape(outputs.shape)
        if self.kind == "output":
            return outputs + 1 / (1 - trips) - 1
        if self.kind == "gradient":
            return outputs + (trips * self.corner + 1 - trips).sqrt()
        return outputs + trips * {"step": 1e305, "moment": 1e200}[self.kind] * self.corner


@pytest.mark.one_in(2)
@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["pyro", "compiled"])
@pytest.mark.parametrize("kind", ["output", "gradient", "step", "moment"])
@pytest.mark.parametrize("interval", [128, 3])
def test_failure_leaves_the_state_of_the_last_good_step(kind, engine, interval, monkeypatch):
    """Weights, running means, moments and schedule are those of a training with the steps before the failing one."""
    monkeypatch.setattr(Retreat, "INTERVAL", interval)
    monkeypatch.setattr(Retreat, "LEAST", 1)
    batches = list(binary(80).split(8))
    for batch in batches:
        batch[:, 0] = 0
    batches[7][5] = 1

    def trained(batches):
        torch.manual_seed(0)
        encoder, decoder = Trips(kind), MLP(3, 12, hidden=[4])
        vae = VAE(StandardNormal(3), Conditional(decoder, Bernoulli(12)), Conditional(encoder, MeanField(3))).double()
        adam = []

        def optimizer(parameters, lr):
            corner = {"params": [p for p in parameters if not p.ndim], "lr": 1e9 if kind == "step" else lr}
            groups = [corner, {"params": [p for p in parameters if p.ndim]}]
            adam.append((torch.optim.SGD if kind == "step" else torch.optim.Adam)(groups, lr=lr))
            return adam[-1]

        told = ""
        try:
            fit(vae, batches, epochs=1, optimizer=optimizer, engine=engine,
                schedule=lambda made, **_: torch.optim.lr_scheduler.ExponentialLR(made, 0.9))  # fmt: skip
        except NonFiniteError as error:
            told = str(error)
        return vae, adam[-1].state_dict(), told

    vae, moments, told = trained(batches)
    expected, expected_moments, fine = trained(batches[:7])
    assert not fine
    assert "step 8, mini-batch 8 of epoch 1; the weights are those after step 7" in told
    assert ("guide site 'z' is NaN or infinite in row 5" if kind == "output" else "with every site finite") in told
    torch.testing.assert_close(vae.state_dict(), expected.state_dict())
    torch.testing.assert_close(moments, expected_moments)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["pyro", "compiled"])
@pytest.mark.parametrize("lr", [1e2, 1e10, 1e30, 1e308])
def test_a_large_learning_rate_leaves_a_model_that_can_be_scored(engine, lr):
    vae, x = small_vae(), binary(40)
    with pytest.raises(NonFiniteError, match=r"a smaller lr may help; step \d+, mini-batch .*; the weights are those"):
        fit(vae, x.split(10), x[:5], epochs=20, lr=lr, schedule="constant", engine=engine)
    assert log_weights(vae.model, vae.guide, x, 3).isfinite().all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["pyro", "compiled"])
@pytest.mark.parametrize(
    ("head", "value"),
    [(Bernoulli, 2.0), (Bernoulli, 0.5), (likelihoods.Poisson, 1.5), (likelihoods.Gaussian, math.inf),
     (likelihoods.ContinuousBernoulli, 1.5), (likelihoods.Categorical, 300.0), (likelihoods.DiscretizedLogistic, -1.0)],
)  # fmt: skip
def test_data_outside_the_support_are_refused_in_every_mini_batch(head, value, engine):
    """The last mini-batch but one, when the engine has long traced its step."""
    decoder, encoder = MLP(3, sum(head(12).sizes), hidden=[4]), MLP(12, 6, hidden=[4])
    vae = VAE(StandardNormal(3), Conditional(decoder, head(12)), Conditional(encoder, MeanField(3)))
    parts = list(binary(48, dtype=torch.float32).split(8))
    parts[4] = parts[4].clone()
    parts[4][6, 2] = value
    with pytest.raises(ContractError, match="mini-batch 5 of epoch 1: "):
        fit(vae, parts, epochs=2, engine=engine)


@pytest.mark.parametrize("kind", ["scale", "sample"])
def test_a_scale_that_is_nan_is_told_and_not_raised_by_torch(kind):
    """Pyro checks it where validation is on; where it is off, ``torch.normal`` raises a RuntimeError."""

    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

        def guide(self, x):
            scale = self.log_scale.exp() * torch.where(x[:, 0] > 9, math.nan, 1.0)
            normal = dist.Normal if kind == "scale" else dist.testing.fakes.NonreparameterizedNormal
            with pyro.plate("data", len(x)):
                pyro.sample("z", normal(x[:, 0], scale))

    module, x = Breaks(), torch.zeros(12, 1)
    x[9] = 10.0
    with pyro.validation_enabled(kind == "scale"), pytest.raises((NonFiniteError, ContractError)) as caught:
        fit(module, x.split(4), epochs=1)
    assert "\n" not in str(caught.value)
    assert module.log_scale.isfinite()


def test_a_large_gradient_is_finite():
    """The squares of its entries are not."""
    p = nn.Parameter(torch.zeros(2))
    loss = lambda model, guide, x: (p * 1e30).sum()  # noqa: E731
    PyroSVI(lambda x: None, lambda x: None, torch.optim.SGD([p], lr=1e-30), loss).step(torch.ones(1))
    torch.testing.assert_close(p.detach(), -torch.ones(2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive"),
        ({"callbacks": [EarlyStopping(1)], "validation": None}, "EarlyStopping needs validation data"),
        ({"callbacks": [BestWeights()], "validation": None}, "BestWeights needs validation data"),
        ({"schedule": "cosine"}, "schedule must be one of one_cycle, constant, stages, trapezoid, got cosine"),
    ],
    ids=lambda given: re.sub(" at 0x[0-9a-f]+", "", str(given)),
)
def test_settings_out_of_range(settings, words):
    vae = small_vae()
    before = state(vae)
    with pytest.raises(ValueError, match=words):
        fit(vae, Fixed(binary(20)), **{"validation": binary(4), "epochs": 1} | settings)
    assert_same(state(vae), before)


def test_no_batches():
    empty = Fixed(binary(20))
    empty.parts = ()
    with pytest.raises(ValueError, match="no mini-batch"):
        fit(small_vae(), empty, epochs=1)


def test_observations_outside_the_support_are_refused():
    vae = small_vae()
    before = state(vae)
    with pytest.raises(ValueError, match="outside the support"):
        fit(vae, Fixed(binary(20) / 2), epochs=1)
    assert_same(state(vae), before)


def test_a_loss_of_several_values_is_refused():
    loss = pyro.infer.ReweightedWakeSleep(num_particles=2)
    with pytest.raises(ValueError, match="ReweightedWakeSleep has several values"):
        fit(small_vae(), Fixed(binary(20)), epochs=1, loss=loss)


def test_engine_is_made_of_model_guide_optimizer_and_loss():
    steps = itertools.count()

    class Engine:
        def __init__(self, model, guide, optim, loss):
            assert isinstance(optim, torch.optim.Adam)
            assert isinstance(loss, ELBO)
            self.optim = optim

        def step(self, x):
            next(steps)
            self.optim.step()
            return torch.tensor(2.0)  # as a compiled engine, which leaves its loss on the device

    history = fit(small_vae(), Fixed(binary(50)), epochs=2, loss=ELBO(), engine=Engine)
    assert [row.objective for row in history] == [-2, -2]
    assert next(steps) == 2 * 3


def test_a_compiled_step_that_meets_a_nan_is_found_at_the_end_of_the_epoch(tmp_path):
    """A compiled step does not wait for the device, so that nothing is known before; the epoch is undone."""
    vae = small_vae(dtype=torch.float32)
    x = binary(40, dtype=torch.float32)
    poisoned = [x[:20], x[20:].clone()]
    calls = []

    class Batches:
        def __len__(self):
            return 2

        def __iter__(self):
            calls.append(None)
            if len(calls) == 3:
                with torch.no_grad():
                    vae.likelihood.network.layers[0].weight[0, 0] = math.nan
            return iter(poisoned)

    engine = partial(CompiledSVI, compiler="none")
    states = []
    with pytest.raises(NonFiniteError, match="the weights are those after step 4"):
        fit(
            vae,
            Batches(),
            epochs=5,
            engine=engine,
            callbacks=[OnEpoch(lambda _: states.append(state(vae)))],
        )
    assert len(states) == 2
    for name, value in vae.state_dict().items():
        assert torch.equal(value, states[-1][name])


@pytest.mark.slow
def test_the_training_elbo_is_plain_whatever_the_objective():
    """Of a bound far above the ELBO, and on the most recent observations only."""
    torch.manual_seed(0)
    vae, batches = small_vae(), [binary(4000), binary(3000), binary(2000)]
    (row,) = fit(vae, batches, epochs=1, lr=1e-12, loss=IWAE(200))
    recent = torch.cat(batches[1:])
    log_w = log_weights(vae.model, vae.guide, recent, 200)
    assert row.train_elbo == pytest.approx(log_w.mean().item(), abs=0.1)
    iwae = (log_w.logsumexp(0) - math.log(200)).mean().item()
    assert row.objective == pytest.approx(iwae, abs=0.1)
    assert iwae > log_w.mean().item() + 0.3


def test_stages_of_the_learning_rate():
    """Stage i: 3^i epochs at lr 10^(-i / 7) (Burda et al. 2016)."""
    history = fit(small_vae(), Fixed(binary(40)), epochs=14, lr=0.01, schedule="stages")
    stages = [0] + [1] * 3 + [2] * 9 + [3]
    assert [row.learning_rate for row in history] == pytest.approx([0.01 * 10 ** (-i / 7) for i in stages])


# Trajectories, to the last bit


class Plain:
    """What ``fit`` of version 0.1.0 did, written down: it draws the same random numbers, in the same order."""

    def __init__(self, vae, schedule, total, steps, lr, engine=PyroSVI, loss=None):
        self.vae, self.loss = vae, loss or Trace_ELBO()
        self.optim = torch.optim.Adam(vae.parameters(), lr=lr, fused=True)
        lr_scheduler = torch.optim.lr_scheduler
        if schedule == "one_cycle":
            self.scheduler = lr_scheduler.OneCycleLR(self.optim, max_lr=lr, total_steps=total, cycle_momentum=False)
        elif schedule == "stages":
            stages = [0] + [1] * 3 + [2] * 9
            self.scheduler = lr_scheduler.LambdaLR(self.optim, lambda step: 10 ** (-stages[step // steps] / 7))
        else:
            self.scheduler = lr_scheduler.ConstantLR(self.optim, factor=1.0)
        self.svi = engine(vae.model, vae.guide, self.optim, self.loss)
        self.rows, self.best = [], (-math.inf, 0, {})

    def epoch(self, batches, validation):
        total, size, seen = 0.0, 0, []
        for batch in batches:
            if not self.rows and not seen:
                check_program(self.vae.model, self.vae.guide, batch)
            value = self.svi.step(batch)
            total += value if isinstance(self.loss, Trace_ELBO) else value * len(batch)
            size += len(batch)
            seen.append(batch)
            rate = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
        validated = mean_log_weights(self.vae.model, self.vae.guide, validation).mean().item()
        trained = mean_log_weights(self.vae.model, self.vae.guide, torch.cat(seen)).mean().item()
        self.rows.append((len(self.rows) + 1, -float(total) / size, trained, validated, rate, 1.0))
        if validated > self.best[0]:
            self.best = validated, len(self.rows), state(self.vae)

    def checkpoint(self, **settings):
        """In the layout of version 0.1.0."""
        return {
            "format": "pyro_vae.training/2",
            "settings": settings,
            "weights": self.vae.state_dict(),
            "optimizer": self.optim.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.rows,
            "best_epoch": self.best[1],
            "best_elbo": self.best[0],
            "best_weights": self.best[2],
            "rng": torch.get_rng_state(),
            "cuda_rng": [],
        }


def fresh(seed=3):
    torch.manual_seed(seed)
    return small_vae()


ENGINES = {"PyroSVI": PyroSVI, "CompiledSVI": partial(CompiledSVI, compiler="none")}
SCHEDULES, LOSSES = ("one_cycle", "constant", "stages"), {"Trace_ELBO": None, "IWAE": IWAE(3)}
TRAJECTORIES = [(schedule, "PyroSVI", loss) for schedule in SCHEDULES for loss in LOSSES]
TRAJECTORIES += [("one_cycle", "CompiledSVI", "Trace_ELBO"), ("stages", "CompiledSVI", "IWAE")]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "engine", "loss"), TRAJECTORIES)
def test_trajectories_are_those_of_version_0_1_0(tmp_path, schedule, engine, loss):
    x, validation, path, engine = binary(50), binary(30), tmp_path / "checkpoint.pt", ENGINES[engine]
    loss = LOSSES[loss]
    plain = Plain(fresh(), schedule, 5 * 3, 3, 0.05, engine, loss)
    for _ in range(5):
        plain.epoch(Shuffled(x), validation)
    settings = {"epochs": 5, "lr": 0.05, "schedule": schedule, "engine": engine, "loss": loss}
    whole = fresh()
    history = fit(whole, Shuffled(x), validation, **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(fresh(), Shuffled(x), validation, callbacks=[Checkpoint(path), OnEpoch(interrupt_after(2))], **settings)
    resumed = fresh(seed=4)
    parts = fit(resumed, Shuffled(x), validation, callbacks=[Checkpoint(path, resume=True)], **settings)
    expected = [row[:-1] for row in plain.rows]
    assert without_time(history) == expected
    assert without_time(parts) == expected
    assert_same(state(whole), state(plain.vae))
    assert_same(state(resumed), state(plain.vae))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("callbacks", [[], [BestWeights()]], ids=["last", "best"])
@pytest.mark.parametrize("schedule", ["one_cycle", "constant", "stages"])
def test_a_checkpoint_of_version_0_1_0_resumes(tmp_path, schedule, callbacks):
    x, validation, path = binary(50), binary(30), tmp_path / "checkpoint.pt"
    plain = Plain(fresh(), schedule, 5 * 3, 3, 0.4)  # a rate at which the last epoch is not the best
    for number in range(5):
        if number == 2:
            steps = {"steps": 15} if schedule == "one_cycle" else {}
            torch.save(plain.checkpoint(schedule=schedule, lr=0.4, **steps), path)
        plain.epoch(Shuffled(x), validation)
    vae = fresh(seed=4)
    settings = {"epochs": 5, "lr": 0.4, "schedule": schedule}
    history = fit(vae, Shuffled(x), validation, callbacks=[Checkpoint(path, resume=True), *callbacks], **settings)
    assert without_time(history) == [row[:-1] for row in plain.rows]
    assert_same(state(vae), plain.best[2] if callbacks else state(plain.vae))


# Optimizers and schedules


def by_hand(vae, batches, optim, epochs):
    """A loop without fit, its schedule or its evaluations."""
    svi, free = PyroSVI(vae.model, vae.guide, optim), hasattr(optim, "train")
    for _ in range(epochs):
        if free:
            optim.train()
        for batch in batches:
            svi.step(batch)
        if free:
            optim.eval()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(monkeypatch, name):
    monkeypatch.setattr("pyro_vae.training.mean_log_weights", lambda *args: torch.zeros(1))  # these draw random numbers
    monkeypatch.setattr("pyro_vae.training.check_program", lambda *args: None)
    x, (ours, theirs) = binary(50), (fresh(), fresh())
    before = state(ours)
    torch.manual_seed(5)
    fit(ours, Fixed(x), epochs=3, lr=0.01, optimizer=OPTIMIZERS[name], schedule="constant")
    torch.manual_seed(5)
    by_hand(theirs, Fixed(x), OPTIMIZERS[name](list(theirs.parameters()), lr=0.01), epochs=3)
    assert_same(state(ours), state(theirs))
    assert all(not torch.equal(value, before[key]) for key, value in ours.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["PyroSVI", "CompiledSVI"])
def test_any_optimizer_learns(name, engine):
    lr = {"SGD": 0.002, "RMSprop": 0.01}.get(name, 0.03)
    schedule = "constant" if name == "schedule_free" else "one_cycle"
    settings = {"optimizer": OPTIMIZERS[name], "schedule": schedule, "lr": lr, "engine": engine}
    history = fit(small_vae(), Fixed(binary(100)), epochs=20, **settings)
    assert history[-1].train_elbo > history[0].train_elbo + 0.3
    assert history[-1].train_elbo > -9


def test_together_steps_each_with_its_own_rate():
    p, q = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    optim = Together(torch.optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 0.5**step)
    for _ in range(2):
        (p + q).sum().backward()
        optim.step()
        scheduler.step()
        optim.zero_grad()
    assert p.item() == pytest.approx(1 - 0.1 - 0.05)
    assert q.item() == pytest.approx(1 - 0.01 - 0.005)
    with pytest.raises(ValueError, match="states of 1 optimizers, not of 2"):
        optim.load_state_dict({"optimizers": [torch.optim.SGD([p]).state_dict()]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        Together(torch.optim.SGD([p]), torch.optim.SGD([p]))


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adam():
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.zeros(30, 20)), nn.Parameter(torch.zeros(4))
    optim = Muon([weight, bias], lr=0.01, iterations=12)
    for p in (weight, bias):
        p.grad = torch.randn_like(p)
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    optim.step()
    step = left.mT @ -weight.detach() @ right.mT / (0.2 * 0.01 * math.sqrt(30))
    assert (step.diagonal() - 1).abs().max() < 0.35  # as near as these iterations come
    assert (step - step.diagonal().diag()).abs().max() < 0.05
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)
    torch.testing.assert_close(bias.detach(), -0.01 * bias.grad.sign(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", [{"momentum": 1.0}, {"iterations": 0}], ids=str)
def test_settings_of_muon_out_of_range(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Muon([nn.Parameter(torch.zeros(2, 2))], **given)


def test_shares_of_a_trapezoid_out_of_range():
    for warm_up, constant_until in ((-0.1, 0.5), (0.5, 0.4), (0.5, 1.1)):
        with pytest.raises(ValueError, match="warm_up and constant_until are shares of all steps"):
            Trapezoid(torch.optim.SGD([torch.zeros(1)]), 1, 10, warm_up, constant_until)


@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["PyroSVI", "CompiledSVI"])
def test_the_average_of_weights_is_left(engine):
    seen = []

    class Note(Callback):
        def step(self, training):
            seen.append(nn.utils.parameters_to_vector(training.module.parameters()).detach().clone())

    x, vae = binary(60), fresh()
    history = fit(vae, Fixed(x), epochs=3, lr=0.05, engine=engine, callbacks=[AverageWeights(0.8), Note()])
    shares = 0.8 ** torch.arange(8.0, -1, -1, dtype=torch.float64)
    expected = (shares / shares.sum()) @ torch.stack(seen)
    torch.testing.assert_close(nn.utils.parameters_to_vector(vae.parameters()).detach(), expected)
    assert (seen[-1] - expected).abs().max() > 0.01
    assert len(seen) == 9
    assert without_time(fit(fresh(), Fixed(x), epochs=3, lr=0.05, engine=engine)) == without_time(history)


def test_an_average_that_was_not_kept_is_not_gone_on_with(tmp_path):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    fit(small_vae(), Fixed(x), epochs=1, schedule="constant", callbacks=[Checkpoint(path)])
    callbacks = [Checkpoint(path, resume=True), AverageWeights()]
    with pytest.raises(CheckpointError, match="no average of weights"):
        fit(small_vae(), Fixed(x), epochs=2, schedule="constant", callbacks=callbacks)
    with pytest.raises(ValueError, match="decay must be above 0 and below 1, got 1"):
        AverageWeights(1.0)


@pytest.mark.parametrize("together", [False, True])
def test_schedule_free_optimizers_are_switched(together):
    """Evaluated, validated and kept are the averaged weights, which differ from those that are trained."""
    calls, seen = [], []

    class Switched(torch.optim.SGD):
        def train(self):
            calls.append("train")
            self.shift(1.0)

        def eval(self):
            calls.append("eval")
            self.shift(-1.0)

        def step(self, closure=None):
            calls.append("step")

        @torch.no_grad()
        def shift(self, by):
            for group in self.param_groups:
                for p in group["params"]:
                    p += by

    vae = small_vae()
    before = state(vae)
    callbacks = [OnEpoch(lambda _: seen.append(state(vae)))]

    def optimizer(parameters, lr):
        return Together(Switched(parameters, lr=lr)) if together else Switched(parameters, lr=lr)

    fit(vae, Fixed(binary(40)), binary(5), epochs=2, optimizer=optimizer, callbacks=callbacks, schedule="constant")
    assert calls == ["train", "step", "step", "eval"] * 2
    for weights in (*seen, state(vae)):
        for name, value in weights.items():
            torch.testing.assert_close(value, before[name])


def test_a_schedule_of_ones_own():
    history = fit(small_vae(), Fixed(binary(40)), epochs=4, lr=0.02, schedule=cosine)
    # of the last step of each epoch, of two; the schedule has 8
    expected = [0.01 * (1 + math.cos(math.pi * step / 8)) for step in (1, 3, 5, 7)]
    assert [row.learning_rate for row in history] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"optimizer": "sgd"}, ValueError, "optimizer must be adam or a factory, such as torch.optim.SGD, got sgd"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "called as optimizer(parameters, lr), got an ob"),
        ({"optimizer": lambda parameters, lr: None}, TypeError, "must return a torch Optimizer, it returned NoneType"),
        ({"optimizer": lambda parameters, lr: torch.optim.SGD}, TypeError, "it returned SGD"),
        ({"optimizer": lambda parameters: None}, TypeError, "unexpected keyword argument 'lr'"),
        (
            {"optimizer": partial(torch.optim.SGD, lr=1.0)},
            ValueError,
            "SGD: its lr is that of fit(..., lr=), give it th",
        ),
        ({"optimizer": torch.optim.Muon}, ValueError, "optimizer Muon: Muon only supports 2D parameters"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "optimizer LBFGS needs a closure"),
        ({"optimizer": torch.optim.SparseAdam}, ValueError, "optimizer SparseAdam takes sparse gradients alone"),
        ({"schedule": 3}, TypeError, "called as schedule(optimizer, steps_per_epoch, epochs), got an object: int"),
        ({"schedule": lambda *args, **kwargs: 0.1}, TypeError, "must return a torch LRScheduler, it returned float"),
        ({"schedule": torch.optim.lr_scheduler.LinearLR}, TypeError, "unexpected keyword argument 'steps_per_epoch'"),
        ({"schedule": lambda o, **_: torch.optim.lr_scheduler.ReduceLROnPlateau(o)}, TypeError, "stepped by a measure"),
        ({"callbacks": [EarlyStopping]}, TypeError, "callbacks must be Callback objects, got EarlyStopping"),
        ({"epoch": 3}, TypeError, "unexpected keyword argument: epoch"),
        ({"train": iter([binary(2)])}, ValueError, "there is no mini-batch to train on"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_is_refused(settings, kind, words):
    vae = small_vae()
    before = state(vae)
    with pytest.raises(kind) as caught:
        fit(vae, **{"train": Fixed(binary(20)), "epochs": 1} | settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same(state(vae), before)


def test_batches_that_are_used_up():
    class Once(Fixed):
        def __init__(self, x):
            super().__init__(x)
            self.left = iter(self.parts)

        def __iter__(self):
            return self.left

    with pytest.raises(ValueError, match="no mini-batch in epoch 2"):
        fit(small_vae(), Once(binary(40)), epochs=2, schedule="constant")


# Callbacks


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="patience must be a whole number of at least 1, got 0"):
        EarlyStopping(0)


def test_a_callback_of_ones_own(tmp_path):
    calls = []

    class Mine(Callback):
        def load(self, training):
            calls.append("load")

        def start(self, training):
            calls.append(("start", len(training.history), training.kept.get("sum", 0)))

        def epoch(self, training):
            training.kept["sum"] = training.kept.get("sum", 0) + training.history[-1].epoch
            calls.append(("epoch", len(training.history)))
            if training.kept["sum"] == 3:
                training.stop()

        def save(self, training):
            calls.append(("save", path.exists()))

        def end(self, training):
            calls.append(("end", training.kept["sum"], training.module is vae, training.epochs))

    path, vae, x = tmp_path / "checkpoint.pt", small_vae(), binary(40)
    history = fit(vae, Fixed(x), epochs=4, callbacks=[Mine(), Checkpoint(path)])
    assert len(history) == 2
    first = ["load", ("start", 0, 0), ("epoch", 1), ("save", False), ("epoch", 2), ("save", True), ("end", 3, True, 4)]
    assert calls == first
    calls.clear()
    history = fit(vae, Fixed(x), epochs=4, callbacks=[Checkpoint(path, resume=True), Mine()])
    assert len(history) == 4
    second = ["load", ("start", 2, 3), ("epoch", 3), ("save", True), ("epoch", 4), ("save", True), ("end", 10, True, 4)]
    assert calls == second


def test_best_weights_that_were_not_kept_are_not_made_up(tmp_path):
    path, x = tmp_path / "checkpoint.pt", binary(40)
    fit(small_vae(), Fixed(x), x, epochs=1, schedule="constant", callbacks=[Checkpoint(path)])
    callbacks = [Checkpoint(path, resume=True), BestWeights()]
    with pytest.raises(CheckpointError, match="has no best weights"):
        fit(small_vae(), Fixed(x), x, epochs=2, schedule="constant", callbacks=callbacks)


def test_old_keywords_still_work_and_say_the_new_spelling(tmp_path, scripted):
    x, path, seen = binary(40), tmp_path / "checkpoint.pt", []
    values = (-5.0, -3.0, -4.0, -3.5)
    scripted(*values, *values)
    old, new = fresh(), fresh()
    keywords = {"patience": 2, "weights": "best", "checkpoint": path, "on_epoch": lambda h: seen.append(len(h))}
    words = (
        r"patience, weights, checkpoint, on_epoch of fit: write callbacks=\[EarlyStopping\(patience\), "
        r"BestWeights\(\), Checkpoint\(path, resume\), OnEpoch\(function\)\], of pyro_vae.training"
    )
    with pytest.warns(DeprecationWarning, match=words) as caught:
        history = plain_fit(old, Fixed(x), x, epochs=9, progress=False, **keywords)
    assert caught[0].filename == __file__
    assert seen == [1, 2, 3, 4]
    callbacks = [EarlyStopping(2), BestWeights(), Checkpoint(tmp_path / "new.pt")]
    torch.manual_seed(3)
    small_vae()
    assert without_time(fit(new, Fixed(x), x, epochs=9, callbacks=callbacks)) == without_time(history)
    assert_same(state(old), state(new))
    with pytest.warns(DeprecationWarning, match="checkpoint, resume, patience of fit"):
        again = fit(small_vae(), Fixed(x), x, epochs=9, checkpoint=path, resume=True, patience=2)
    assert again == history
    with pytest.raises(ValueError, match="weights must be last or best, got first"):
        fit(small_vae(), Fixed(x), epochs=1, weights="first")


# Data


class Regression(nn.Module):
    """y ~ N(w x + z, 1) with a local z ~ N(0, 1): y given x is normal with variance 2."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.gain = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def model(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("y", pyro.distributions.Normal(self.slope * x + z, 1.0).to_event(1), obs=y)

    def guide(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            loc = self.gain * (y - self.slope * x)
            pyro.sample("z", pyro.distributions.Normal(loc, self.log_scale.exp()).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [ELBO(), Trace_ELBO()], ids=["ELBO", "Trace_ELBO"])
@pytest.mark.parametrize("engine", [PyroSVI, partial(CompiledSVI, compiler="none")], ids=["PyroSVI", "CompiledSVI"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "DataLoader"])
def test_batches_of_several_tensors(kind, engine, loss):
    x = torch.randn(200, 1, dtype=torch.float64)
    y = 2 * x + math.sqrt(2) * torch.randn_like(x)
    pairs = list(zip(x.split(25), y.split(25), strict=True))
    train = {
        "tuple": pairs,
        "dict": [{"y": y, "x": x} for x, y in pairs],
        "DataLoader": DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True),
    }[kind]
    validation = {"x": x, "y": y} if kind == "dict" else (x, y)
    module = Regression()
    history = fit(module, train, validation, epochs=40, lr=0.05, loss=loss, engine=engine)
    slope = (x * y).sum() / (x * x).sum()  # least squares is the best slope
    assert module.slope.item() == pytest.approx(slope.item(), abs=0.05)
    assert module.gain.item() == pytest.approx(0.5, abs=0.05)
    assert module.log_scale.exp().item() == pytest.approx(math.sqrt(0.5), abs=0.05)
    log_likelihood = torch.distributions.Normal(slope * x, math.sqrt(2)).log_prob(y).mean().item()
    for bound in (history[-1].validation_elbo, history[-1].train_elbo, history[-1].objective):
        assert bound == pytest.approx(log_likelihood, abs=0.03)


@pytest.mark.parametrize("training", [True, False])
def test_bounds_are_estimated_in_evaluation_mode(training):
    """Dropout is on in steps, off in the ELBOs; the mode is left as it was."""
    vae, modes = small_vae(), []
    vae.posterior.network.register_forward_hook(lambda module, *_: modes.append(module.training))
    vae.train(training)
    fit(vae, Fixed(binary(40)), binary(5), epochs=2)
    checks = len(modes) - 2 * 4
    assert checks > 0
    assert modes == [False] * checks + [training, training, False, False] * 2
    assert all(module.training == training for module in vae.modules())


def test_a_checkpoint_has_the_random_state_of_mps(monkeypatch):
    found, state = [], torch.arange(5, dtype=torch.uint8)
    vae = small_vae()
    training = Training(vae, Fixed(binary(20)), None, 1, 1e-3, "adam", "constant")
    assert training.state_dict()["mps_rng"] is None
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", found.append)
    content = training.state_dict()
    training.load_state_dict(content)
    training.load_state_dict({name: value for name, value in content.items() if name != "mps_rng"})
    assert len(found) == 1
    assert torch.equal(found[0], state)


class NoDouble(TorchDispatchMode):
    """A device without double precision, as mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(made)), func
        return made


@pytest.mark.parametrize("loss", [Trace_ELBO(), ELBO(), objectives.DReG(2)], ids=lambda loss: type(loss).__name__)
def test_training_takes_no_double_precision(loss):
    vae, x = small_vae().float(), binary(20).float()
    vae.initialize(x)
    with NoDouble():
        fit(vae, x.split(5), x[:7], epochs=1, engine=PyroSVI, loss=loss)
    with pytest.raises(AssertionError), NoDouble():
        importance_sampling(vae.model, vae.guide, x, 30, compiled=False)


def test_a_nan_among_several_tensors_names_its_site():
    module = Regression()

    def poison(history):
        with torch.no_grad():
            module.log_scale.fill_(math.nan)

    x = torch.randn(30, 1, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="guide site 'z'"):
        fit(module, [(x, x)], (x, x), epochs=3, callbacks=[OnEpoch(poison)])


@pytest.mark.parametrize(
    ("second", "validation", "words"),
    [
        ({"x": (4, 1)}, None, "data['y'] is missing: the data must have the structure of the first mini-batch"),
        ({"x": (4, 1), "y": (4, 1), "z": (4, 1)}, None, "data['z'] is new"),
        (
            {"x": (4, 1), "y": (4, 2)},
            None,
            "data['y'] has shape of one datum (2,), in the first mini-batch it",
        ),
        ({"x": (4, 1), "y": (4, 1)}, {"x": (4, 1)}, "data['y'] is missing"),
    ],
    ids=str,
)
def test_batches_of_another_structure_are_refused(second, validation, words):
    first = {"x": torch.zeros(5, 1).double(), "y": torch.zeros(5, 1).double()}
    second, validation = (
        each and {name: torch.zeros(shape).double() for name, shape in each.items()} for each in (second, validation)
    )
    with pytest.raises(ContractError) as caught:
        fit(Regression(), [first, second], validation, epochs=1)
    assert words in str(caught.value)


def test_the_order_of_a_dict_does_not_matter():
    x = torch.randn(40, 1, dtype=torch.float64)
    first, second = ({"x": x[i : i + 20], "y": 100 + x[i : i + 20]} for i in (0, 20))
    turned = {"y": second["y"], "x": second["x"]}
    bounds = []
    for batches in ([first, second], [first, turned]):
        torch.manual_seed(0)
        bounds.append(without_time(fit(Regression(), batches, epochs=1, lr=1e-9))[0][1:3])
    assert bounds[0] == bounds[1]


LOADED = torch.bernoulli(torch.full((6, 1, 2, 4), 0.5), generator=torch.Generator().manual_seed(0))


def loader(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=3)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("labels", [(), (torch.arange(6),)], ids=["x", "x and y"])
def test_flat_batches_are_those_of_the_loader(kind, labels):
    found = list(FlatBatches(loader(LOADED.to(kind), *labels)))
    assert len(FlatBatches(loader(LOADED))) == len(found) == 2
    assert torch.equal(torch.cat(found), LOADED.flatten(1))
    assert all(x.is_floating_point() for x in found)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((LOADED,), r"shape \(B, 8\), these are torch.float32 of shape \(3, 1, 2, 4\): x.flatten\(1\).float\(\) is"),
        ((LOADED.flatten(1).byte(),), r"these are torch.uint8 .*FlatBatches\(loader\)"),
        ((LOADED.flatten(1)[:, :5],), r"of shape \(3, 5\)"),
        ((LOADED.flatten(1), torch.arange(6)), r"labels of a loader are dropped by pyro_vae.training.FlatBatches"),
    ],
)
def test_batches_that_a_vae_does_not_take_are_told_what_would_do(tensors, message):
    vae = VAE(StandardNormal(2), Conditional(MLP(2, 8, [3]), Bernoulli(8)), Conditional(MLP(8, 4, [3]), MeanField(2)))
    with pytest.raises(ContractError, match=message):
        fit(vae, loader(*tensors), epochs=1)
    assert len(fit(vae, FlatBatches(loader(LOADED, torch.arange(6))), epochs=1)) == 1
