"""Several processes that train one model take the steps that one would take."""

import multiprocessing

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO

from pyro_vae import ELBO
from pyro_vae.errors import ContractError
from pyro_vae.infer import parallel
from pyro_vae.infer.steps import Steps
from tests.infer import parallel_checks as checks


def in_processes(size, folder, function):
    """What a function gives in each process of a group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([checks.__name__])  # imported once
    started = [context.Process(target=checks.entry, args=(rank, size, folder, function)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(2, folder := tmp_path_factory.mktemp("two"), checks.quick), folder


def test_steps_are_those_of_one_process(two):
    for case in checks.CASES[:3]:
        weights, losses = checks.trained(*case)
        for found in two[0]:
            torch.testing.assert_close(found[case][0], weights, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[case][1], losses, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_losses_and_engines_in_three_processes(tmp_path):
    every = in_processes(3, tmp_path, checks.gradients)
    for case in checks.CASES:
        weights, losses = checks.trained(*case)
        for found in every:
            torch.testing.assert_close(found[case][0], weights, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found[case][1], losses, rtol=1e-6, atol=0)


def test_parameters_that_come_into_being_and_a_plate_that_is_a_part(two):
    theirs = checks.made_lazily(SVI)
    for found in two[0]:
        assert found["lazy"].keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(found["lazy"][name], value, rtol=1e-9, atol=1e-12)


def test_a_training_is_one_in_all_processes(two):
    (first, second), folder = two
    torch.testing.assert_close(first["fit"][0], second["fit"][0], rtol=0, atol=0)
    assert first["fit"][1] == second["fit"][1]
    assert (first["logged"], second["logged"]) == (3, 0)
    torch.testing.assert_close(first["resumed"][0], first["fit"][0], rtol=0, atol=0)
    with pytest.warns(UserWarning, match="goes on in 1 process, after 2: it is the same but for its random numbers"):
        _, history = checks.fitted(folder / "checkpoint.pt", 4, resume=True)
    assert history[:3] == first["fit"][1]


def test_noise_is_of_each_process_and_step(two):
    (first, after), (second, after_second) = (found["noise"] for found in two[0])
    assert len({*first, *second, after}) == 7
    assert after == after_second


def test_what_differs_is_refused_in_every_process(two):
    start = "ContractError: process 1 has another"
    expected = {
        "rows": "ContractError: a batch size of 1 is too small for 2 processes",
        "batch": f"{start} mini-batch than process 0",
        "rate": f"{start} lr than process 0: 0.02, not 0.01",
        "weights": f"{start} weights than process 0",
        "drift": "ContractError: the processes do not have the same weights any more",
        "first": "IndexError: list index out of range",
    }
    for found in two[0]:
        for name, reason in expected.items():
            assert found["refused"][name].startswith(reason)
    failures = ["ProcessLost: another process of this training failed, and says why", "KeyError: 'mine'"]
    assert [found["refused"]["failed"] for found in two[0]] == failures
    assert all(found["kept"] for found in two[0])
    assert [found["refused"]["here"] for found in two[0]] == ["ValueError: process 1: no file", "ValueError: no file"]


def reduction(model, guide, loss):
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)
    with pyro.get_param_store().scope():
        return parallel._reduction_of(Steps(model, guide, optimizer, loss), checks.data(7))


def test_whether_a_loss_is_a_sum_over_rows():
    vae = checks.small()
    assert reduction(vae.model, vae.guide, Trace_ELBO()) == "sum"
    assert reduction(vae.model, vae.guide, RenyiELBO(vectorize_particles=False)) == "sum"
    assert reduction(vae.model, vae.guide, ELBO()) == "mean"
    halved = [poutine.scale(each, scale=0.5) for each in (vae.model, vae.guide)]
    assert reduction(*halved, Trace_ELBO()) == "sum"
    shared = [lambda x, each=each: poutine.scale(each, scale=100 / len(x))(x) for each in (vae.model, vae.guide)]
    assert reduction(*shared, Trace_ELBO()) == "mean"
    assert reduction(checks.regression, checks.regression_guide, Trace_ELBO()) == "mean"


def a_weight_without_a_size(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0).expand([len(x)]), obs=x[:, 0])


def test_losses_that_cannot_be_shared_are_refused():
    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ContractError, match=r"sites of rows \(x\) are summed and others \(w\) are of no row"):
        reduction(a_weight_without_a_size, guide, Trace_ELBO())
    with pytest.raises(ContractError, match="RenyiELBO of a plate that is subsampled or scaled is no bound"):
        reduction(checks.regression, checks.regression_guide, RenyiELBO())
    with pytest.raises(ContractError, match="cannot tell whether this loss is a sum over rows: give reduction"):
        reduction(guide, guide, lambda model, guide, x: 0.0)


def test_errors_reach_other_processes_as_they_are():
    class Strange(Exception):
        def __init__(self, a, b):
            super().__init__(a, b)

    for error in (ContractError("no"), FileNotFoundError(2, "No such file", "x"), KeyError("k")):
        found = parallel._changed(error, str(error))
        assert (type(found), str(found)) == (type(error), str(error))
    assert str(parallel._changed(ValueError("a"), "process 1: a")) == "process 1: a"
    assert str(parallel._changed(Strange(1, 2), "(1, 2)")) == "Strange: (1, 2)"
