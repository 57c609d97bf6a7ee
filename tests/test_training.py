import itertools
import math
from functools import partial

import pyro
import pytest
import torch
from oracles import binary, small_vae
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    MeanField,
    NonFiniteError,
    StandardNormal,
    log_weights,
)
from pyro_vae import fit as plain_fit
from pyro_vae.errors import CheckpointError


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
    history = fit(small_vae(), Fixed(binary(20)), binary(4), epochs=6, patience=3)
    # the equal value of epoch 5 is no rise
    assert [row.validation_elbo for row in history] == [-5, -3, -4, -3.5, -3]


def test_patience_does_not_stop_while_the_bound_rises(scripted):
    scripted(-5.0, -4.0, -3.0, -2.0)
    assert len(fit(small_vae(), Fixed(binary(20)), binary(4), epochs=4, patience=1)) == 4


@pytest.mark.parametrize(("weights", "epoch"), [("best", 2), ("last", 4)])
def test_weights_left_in_the_module(scripted, weights, epoch):
    scripted(-5.0, -3.0, -4.0, -3.5)
    vae, states = small_vae(), []
    fit(
        vae,
        Fixed(binary(20)),
        binary(4),
        epochs=4,
        schedule="constant",
        weights=weights,
        on_epoch=lambda _: states.append(state(vae)),
    )
    assert not torch.equal(
        states[1]["likelihood.network.layers.0.weight"], states[3]["likelihood.network.layers.0.weight"]
    )
    assert_same(state(vae), states[epoch - 1])


@pytest.mark.parametrize("schedule", ["one_cycle", "constant"])
@pytest.mark.parametrize("weights", ["last", "best"])
def test_resuming_gives_the_uninterrupted_run(tmp_path, schedule, weights):
    x, validation = binary(50), binary(30)
    settings = {"epochs": 5, "lr": 0.05, "schedule": schedule, "weights": weights}

    def new():
        torch.manual_seed(3)
        return small_vae()

    whole = new()
    expected = fit(whole, Shuffled(x), validation, **settings)

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(new(), Shuffled(x), validation, checkpoint=path, on_epoch=interrupt_after(2), **settings)
    resumed, seen = new(), []
    torch.manual_seed(99)  # what happened before must not matter
    history = fit(
        resumed,
        Shuffled(x),
        validation,
        checkpoint=path,
        resume=True,
        on_epoch=lambda h: seen.append(len(h)),
        **settings,
    )
    assert without_time(history) == without_time(expected)
    assert_same(state(resumed), state(whole))
    assert seen == [2, 3, 4, 5]


def test_resuming_in_the_middle_of_patience(tmp_path, scripted):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    scripted(-3.0, -4.0, -5.0)
    vae, states = small_vae(), []
    with pytest.raises(KeyboardInterrupt):
        fit(
            vae,
            Fixed(x),
            x,
            epochs=9,
            patience=2,
            weights="best",
            checkpoint=path,
            on_epoch=lambda h: (states.append(state(vae)), interrupt_after(2)(h)),
        )
    other = small_vae()
    history = fit(other, Fixed(x), x, epochs=9, patience=2, weights="best", checkpoint=path, resume=True)
    assert [row.validation_elbo for row in history] == [-3, -4, -5]
    assert_same(state(other), states[0])


def test_resuming_a_finished_training_trains_nothing(tmp_path):
    path, vae, x = tmp_path / "checkpoint.pt", small_vae(), binary(20)
    history = fit(vae, Fixed(x), x, epochs=2, checkpoint=path)
    before = path.read_bytes()
    other = small_vae()
    assert fit(other, Fixed(x), x, epochs=2, checkpoint=path, resume=True) == history
    assert_same(state(other), state(vae))
    assert path.read_bytes() == before


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    history = fit(small_vae(), Fixed(binary(20)), epochs=2, checkpoint=tmp_path / "checkpoint.pt", resume=True)
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
    fit(small_vae(), Fixed(x), epochs=1, checkpoint=path)
    spoil(path)
    content = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        fit(small_vae(), Fixed(x), epochs=1, checkpoint=path, resume=True)
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
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, first, second, words):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    for changes, resume in ((first, False), (second, True)):
        settings = {"epochs": 2, "lr": 0.001, "latent_dim": 3} | changes
        vae = small_vae(latent_dim=settings.pop("latent_dim"))
        if resume:
            with pytest.raises(CheckpointError, match=words) as caught:
                fit(vae, Fixed(x), checkpoint=path, resume=True, **settings)
            assert "\n" not in str(caught.value)
        else:
            fit(vae, Fixed(x), checkpoint=path, **settings)


def test_a_constant_schedule_can_be_prolonged(tmp_path):
    path, x = tmp_path / "checkpoint.pt", binary(20)
    fit(small_vae(), Fixed(x), epochs=2, schedule="constant", checkpoint=path)
    assert len(fit(small_vae(), Fixed(x), epochs=3, schedule="constant", checkpoint=path, resume=True)) == 3


def test_a_checkpoint_that_cannot_be_written_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        fit(small_vae(), Fixed(binary(20)), epochs=1, checkpoint=tmp_path / "missing" / "checkpoint.pt")


def broken(part, calls):
    vae = small_vae()
    if part == "decoder":
        vae.likelihood.network = BreaksDown(vae.likelihood.network, calls)
    elif part == "likelihood":
        vae.likelihood.head = BreaksDown(vae.likelihood.head, calls)
    else:
        vae.posterior.network = BreaksDown(vae.posterior.network, calls)
    return vae


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize(
    ("part", "site"),
    [("encoder", "guide site 'z'"), ("decoder", "model site 'x'"), ("likelihood", "model site 'x'")],
)
def test_nan_stops_training_and_names_the_site(tmp_path, part, site, validated):
    path, x = tmp_path / "checkpoint.pt", binary(60)
    # check_program takes the first call, each of the three steps of an epoch another one, and so does its training ELBO
    vae, states = broken(part, calls=1 + 4 + 4 + 1), []
    with pyro.validation_enabled(validated), pytest.raises(NonFiniteError, match=site) as caught:
        fit(vae, Fixed(x), epochs=5, schedule="constant", checkpoint=path, on_epoch=lambda _: states.append(state(vae)))
    assert "\n" not in str(caught.value)
    assert len(states) == 2
    assert all(value.isfinite().all() for value in vae.state_dict().values())
    healthy = broken(part, calls=10**6)
    history = fit(healthy, Fixed(x), epochs=2, schedule="constant", checkpoint=path, resume=True)
    assert [row.epoch for row in history] == [1, 2]
    assert all(math.isfinite(row.train_elbo) for row in history)
    assert_same(state(healthy), states[-1])


def test_nan_of_validation_stops_training_too(scripted, tmp_path):
    scripted(-3.0, math.nan)
    with pytest.raises(NonFiniteError, match="validation ELBO is nan"):
        fit(small_vae(), Fixed(binary(20)), binary(4), epochs=5, checkpoint=tmp_path / "checkpoint.pt")
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


def test_a_compiled_gradient_that_is_not_finite_is_undone():
    encoder, decoder = MLP(12, 6, hidden=[4]), Corner(3, 12, hidden=[4])
    vae = VAE(StandardNormal(3), Conditional(decoder, Bernoulli(12)), Conditional(encoder, MeanField(3)))
    before = state(vae)
    with pytest.raises(NonFiniteError, match="NaN or infinite in epoch 1; the weights are those of the epoch before"):
        fit(vae, Fixed(binary(20, dtype=torch.float32)), epochs=1, engine=partial(CompiledSVI, compiler="none"))
    assert_same(state(vae), before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"patience": 1, "validation": None}, "need validation data"),
        ({"weights": "best", "validation": None}, "need validation data"),
        ({"weights": "first"}, "weights must be last or best, got first"),
        ({"schedule": "cosine"}, "schedule must be one_cycle, constant or stages, got cosine"),
    ],
    ids=str,
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
    with pytest.raises(NonFiniteError, match="NaN or infinite in epoch 3; the weights are those of the epoch before"):
        fit(
            vae,
            Batches(),
            epochs=5,
            engine=engine,
            on_epoch=lambda history: states.append({k: v.clone() for k, v in vae.state_dict().items()}),
        )
    assert len(states) == 2
    for name, value in vae.state_dict().items():
        assert torch.equal(value, states[-1][name])


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
