"""Linear-Gaussian state-space models as programs over sequences of several lengths; a Kalman filter is the oracle."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae import Annealing, annealed_importance_sampling, importance_sampling, log_weights

F64 = torch.float64
STEPS, LENGTHS = 5, [5, 3, 1, 4]


class StateSpace:
    """z_0 ~ N(0, I), z_t ~ N(A z_(t-1), q^2 I), x_t ~ N(C z_t, r^2 I), with numbers of x that nobody saw."""

    def __init__(self):
        turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=F64)
        self.move, self.show, self.step, self.noise = 0.95 * turn, torch.randn(3, 2, dtype=F64), 0.3, 0.5

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = x.new_zeros(len(x), 2)
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z @ self.move.mT, self.step if t else 1.0).to_event(1))
                shown = dist.Normal(z @ self.show.mT, self.noise).mask(seen[:, t])
                pyro.sample(f"x_{t}", shown.to_event(1), obs=x[:, t])

    def guide(self, x, seen):
        """One that reads no x at all."""
        with pyro.plate("data", len(x), dim=-1):
            for t in range(x.shape[1]):
                pyro.sample(f"z_{t}", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))

    def filter(self, x, seen):
        """Means and covariances of p(z_t | x_0 .. x_t), and log p(x) of one sequence (Kalman 1960)."""
        mean, covariance, log_p, found = x.new_zeros(2), torch.eye(2, dtype=F64), 0.0, []
        for t in range(len(x)):
            if t:
                mean = self.move @ mean
                covariance = self.move @ covariance @ self.move.mT + self.step**2 * torch.eye(2, dtype=F64)
            show = self.show[seen[t]]
            predicted = show @ covariance @ show.mT + self.noise**2 * torch.eye(len(show), dtype=F64)
            off = x[t][seen[t]] - show @ mean
            if len(show):
                log_p += stats.multivariate_normal(cov=predicted.numpy()).logpdf(off.numpy())
                gain = covariance @ show.mT @ predicted.inverse()
                mean, covariance = mean + gain @ off, covariance - gain @ show @ covariance
            found.append((mean, covariance))
        return found, log_p

    def log_px(self, x, seen):
        return torch.tensor([float(self.filter(*row)[1]) for row in zip(x, seen, strict=True)], dtype=F64)

    def posterior(self, x, seen):
        """p(z | x), drawn from the last step to the first."""
        filtered = [self.filter(*row)[0] for row in zip(x, seen, strict=True)]
        with pyro.plate("data", len(x), dim=-1):
            z = x.new_zeros(2)
            for t in reversed(range(x.shape[1])):
                mean, covariance = (torch.stack([row[t][part] for row in filtered]) for part in (0, 1))
                if t < x.shape[1] - 1:
                    ahead = self.move @ covariance @ self.move.mT + self.step**2 * torch.eye(2, dtype=F64)
                    back = covariance @ self.move.mT @ ahead.inverse()
                    off = z - mean @ self.move.mT
                    mean = mean + (back @ off.unsqueeze(-1)).squeeze(-1)
                    covariance = covariance - back @ ahead @ back.mT
                z = pyro.sample(f"z_{t}", dist.MultivariateNormal(mean, covariance))


@pytest.fixture(scope="module")
def process():
    """A process, sequences of it, and what was seen: up to the length of each, and not even all of that."""
    torch.manual_seed(3)
    seen = (torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]).unsqueeze(-1).repeat(1, 1, 3)
    seen[0, 2, 1] = seen[3, 0] = False
    return StateSpace(), torch.randn(len(LENGTHS), STEPS, 3, dtype=F64), seen


def test_the_filter_has_the_density_of_all_steps_together(process):
    space, x, seen = process
    powers = [torch.linalg.matrix_power(space.move, t) for t in range(STEPS)]
    steps = [[powers[t - s] * (space.step if s else 1) if s <= t else torch.zeros(2, 2) for s in range(STEPS)]
             for t in range(STEPS)]  # fmt: skip
    shown = torch.block_diag(*[space.show] * STEPS) @ torch.cat([torch.cat(row, 1) for row in steps])
    covariance = shown @ shown.mT + space.noise**2 * torch.eye(3 * STEPS)
    for row, known, log_p in zip(x.flatten(1), seen.flatten(1), space.log_px(x, seen), strict=True):
        density = stats.multivariate_normal(cov=covariance[known][:, known].numpy()).logpdf(row[known].numpy())
        assert log_p.item() == pytest.approx(density, abs=1e-10)


@pytest.mark.usefixtures("doubles")
def test_annealed_log_p_of_sequences_is_that_of_a_kalman_filter(process):
    space, x, seen = process
    settings = Annealing(num_chains=4, num_temperatures=2, num_checked=0)
    found = annealed_importance_sampling(space.model, space.guide, (x, seen), settings, compiled=False)
    torch.testing.assert_close(found.log_px, space.log_px(x, seen), rtol=0, atol=1e-5)
    assert found.mc_se.max() < 1e-5


@pytest.mark.usefixtures("doubles")
def test_the_exact_posterior_of_sequences_as_guide_leaves_no_error(process):
    space, x, seen = process
    found = importance_sampling(space.model, space.posterior, (x, seen), 20, num_checked=0, compiled=False)
    torch.testing.assert_close(found.log_px, space.log_px(x, seen), rtol=0, atol=1e-8)
    assert found.mc_se.max() < 1e-6


@pytest.mark.usefixtures("doubles")
def test_what_stands_behind_the_end_of_a_sequence_changes_nothing(process):
    space, x, seen = process
    exact, weights = space.log_px(x, seen), []
    for padding in (0.0, -1e6):
        torch.manual_seed(0)
        weights.append(log_weights(space.model, space.guide, (x.masked_fill(~seen, padding), seen), 3))
    assert weights[0].isfinite().all()
    assert torch.equal(*weights)
    longer, known = (torch.nn.functional.pad(each, (0, 0, 0, 2)) for each in (x, seen))  # two steps that are not there
    found = importance_sampling(space.model, space.posterior, (longer, known), 20, num_checked=0, compiled=False)
    torch.testing.assert_close(found.log_px, exact, rtol=0, atol=1e-8)
