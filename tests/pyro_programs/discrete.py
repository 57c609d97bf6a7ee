"""Discrete sites that are enumerated, and sequences."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyro_programs import Program, call, same


def nothing(*args, **kwargs):
    """A guide of models without latent sites that stay."""


def gaussian_mixture():
    """Assignments enumerated in the model, weights and locations points of an automatic guide."""

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(3)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoDelta(poutine.block(model, expose=["weights", "locs", "scale"]))
    return Program(model, guide, partial(TraceEnum_ELBO, max_plate_nesting=1), same(torch.randn(8) * 3))


def mixture_in_the_guide():
    """Assignments enumerated in model and guide, each datum with its own probabilities."""

    def model(data):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.5, 2.0]))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(locs[k], 1.0))
            pyro.sample("obs", dist.Normal(z, 0.5), obs=data)

    @config_enumerate
    def guide(data):
        with pyro.plate("data", len(data)):
            probs = pyro.param("probs", torch.ones(len(data), 3) / 3, constraint=constraints.simplex)
            k = pyro.sample("k", dist.Categorical(probs))
            loc = pyro.param("loc", torch.zeros(3))
            pyro.sample("z", dist.Normal(loc[k] + data, 1.0))

    return Program(model, guide, partial(TraceEnum_ELBO, max_plate_nesting=1), same(torch.randn(5)))


def sequential_enumeration():
    """A guide whose branches are run one after another."""

    def model(x):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    @partial(config_enumerate, default="sequential")
    def guide(x):
        a = pyro.sample("a", dist.Bernoulli(pyro.param("pa", torch.tensor(0.5), constraints.unit_interval)))
        probs = pyro.param("pb", torch.ones(2, 3) / 3, constraint=constraints.simplex)
        pyro.sample("b", dist.Categorical(probs[a.long()]))

    return Program(model, guide, partial(TraceEnum_ELBO, max_plate_nesting=0), same(torch.tensor(1.7)))


def hidden_markov():
    """Sequences of several lengths, masked, with a Markov chain enumerated along them."""

    @config_enumerate
    def model(sequences, lengths):
        num_sequences, longest, dim = sequences.shape
        with poutine.mask(mask=True):
            px = pyro.sample("px", dist.Dirichlet(0.9 * torch.eye(3) + 0.1).to_event(1))
            py = pyro.sample("py", dist.Beta(1.0, 1.5).expand([3, dim]).to_event(2))
        tones = pyro.plate("tones", dim, dim=-1)
        with pyro.plate("sequences", num_sequences, dim=-2):
            x = torch.tensor(0)
            for t in pyro.markov(range(longest)):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(px[x]))
                    with tones as tone:
                        pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(py)[x, tone]), obs=sequences[:, t])

    guide = AutoDelta(poutine.block(model, expose=["px", "py"]))
    sequences = torch.bernoulli(torch.full((3, 4, 2), 0.5))
    loss = partial(TraceEnum_ELBO, max_plate_nesting=2, strict_enumeration_warning=False)
    return Program(model, guide, loss, same(sequences, torch.tensor([4, 2, 3])))


def second_order_markov():
    """A chain with two steps of memory and parameters rather than priors; other sequences at each step."""

    @config_enumerate
    def model(ys):
        trans = pyro.param("trans", lambda: torch.rand(2, 2, 2).softmax(-1), constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        before, x = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(len(ys)), history=2):
            before, x = x, pyro.sample(f"x_{t}", dist.Categorical(Vindex(trans)[before, x]))
            pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=ys[t])

    loss = partial(TraceEnum_ELBO, max_plate_nesting=0)
    return Program(model, nothing, loss, [call(torch.randn(4)), call(torch.randn(4))])


def capture_recapture():
    """Who was seen must be alive: an enumerated chain, masked by what the data say, with rates that have priors."""

    def model(history):
        num_animals, num_years = history.shape
        survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
        capture = pyro.sample("capture", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", num_animals, dim=-1):
            alive = torch.ones(num_animals)
            marked = torch.zeros(num_animals).bool()
            for t in pyro.markov(range(num_years)):
                with poutine.mask(mask=marked):
                    alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survival * alive), infer={"enumerate": "parallel"})
                    pyro.sample(f"seen_{t}", dist.Bernoulli(capture * alive), obs=history[:, t])
                marked |= history[:, t].bool()

    guide = AutoDelta(poutine.block(model, expose=["survival", "capture"]))
    history = torch.bernoulli(torch.full((5, 4), 0.6))
    return Program(model, guide, partial(TraceEnum_ELBO, max_plate_nesting=1), same(history))


def annotators():
    """Annotators who err: a class per item, enumerated and found by Vindex, and a simplex with a normal guide."""
    positions, answers = torch.tensor([0, 0, 1, 1, 2]), torch.randint(3, (4, 5))

    def model(positions, answers):
        with pyro.plate("annotator", 3, dim=-2), pyro.plate("class", 3):
            beta = pyro.sample("beta", dist.Dirichlet(torch.ones(3) + torch.eye(3)))
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("item", len(answers), dim=-2):
            c = pyro.sample("c", dist.Categorical(pi), infer={"enumerate": "parallel"})
            with pyro.plate("position", len(positions)):
                pyro.sample("y", dist.Categorical(Vindex(beta)[positions, c, :]), obs=answers)

    guide = AutoNormal(poutine.block(model, hide=["c"]))
    return Program(model, guide, partial(TraceEnum_ELBO, max_plate_nesting=2), same(positions, answers))


def latent_dirichlet():
    """Topics of words in nested plates, the local weights amortized by a network, documents in random subsamples."""
    words = torch.randint(6, (4, 5))
    network = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.Softmax(dim=-1))

    def model(words, size):
        with pyro.plate("topics", 2):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(6) / 6))
        with pyro.plate("documents", words.shape[1], size) as ind:
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", words.shape[0]):
                topic = pyro.sample("topic", dist.Categorical(weights), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(topic_words[topic]), obs=words[:, ind])

    def guide(words, size):
        posterior = pyro.param("posterior", lambda: torch.rand(2, 6) + 1.0, constraint=constraints.positive)
        with pyro.plate("topics", 2):
            pyro.sample("topic_words", dist.Dirichlet(posterior))
        pyro.module("network", network)
        with pyro.plate("documents", words.shape[1], size) as ind:
            counts = torch.zeros(6, len(ind)).scatter_add(0, words[:, ind], torch.ones(len(words), len(ind)))
            weights = network(counts.transpose(0, 1))
            pyro.sample("weights", dist.Delta(weights, event_dim=1))

    loss = partial(TraceEnum_ELBO, max_plate_nesting=2)
    return Program(model, guide, loss, same(words, 3), predict=False)


def outliers():
    """Points that may be outliers, vectorized particles, a plate with an enumerated site in the guide alone summed."""

    @config_enumerate
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        rate = pyro.sample("rate", dist.Beta(1.0, 4.0))
        with pyro.plate("data", len(x)):
            out = pyro.sample("out", dist.Bernoulli(rate))
            pyro.sample("y", dist.Normal(slope * x, torch.where(out == 1, 5.0, 0.5).to(x.dtype)), obs=y)

    guide = AutoNormal(poutine.block(model, hide=["out"]))
    loss = partial(TraceEnum_ELBO, max_plate_nesting=1, num_particles=3, vectorize_particles=True)
    return Program(model, guide, loss, same(torch.randn(6), torch.randn(6)))


class Markov(nn.Module):
    """A deep Markov model: gated transitions, an emitter, and a recurrent network that reads from the end."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
        self.proposed = nn.Linear(2, 2)
        self.scale = nn.Linear(2, 2)
        self.emit = nn.Linear(2, 3)
        self.combine = nn.Linear(2, 4)
        self.rnn = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(4, 4)
        self.start, self.guessed = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.hidden = nn.Parameter(torch.zeros(1, 1, 4))

    def transition(self, z):
        gate = self.gate(z)
        loc = (1 - gate) * z + gate * self.proposed(z)
        return loc, nn.functional.softplus(self.scale(self.proposed(z).relu()))

    def model(self, batch, reversed_batch, mask, lengths, annealing=1.0):
        pyro.module("dmm", self)
        z = self.start.expand(len(batch), 2)
        with pyro.plate("z_batch", len(batch)):
            for t in pyro.markov(range(int(lengths.max()))):
                loc, scale = self.transition(z)
                with poutine.scale(None, annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(mask[:, t : t + 1]).to_event(1))
                emission = dist.Bernoulli(logits=self.emit(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x_{t}", emission, obs=batch[:, t])

    def guide(self, batch, reversed_batch, mask, lengths, annealing=1.0):
        pyro.module("dmm", self)
        packed = pack_padded_sequence(reversed_batch, lengths, batch_first=True)
        output, _ = self.rnn(packed, self.hidden.expand(1, len(batch), 4).contiguous())
        output = reverse(pad_packed_sequence(output, batch_first=True)[0], lengths)
        z = self.guessed.expand(len(batch), 2)
        with pyro.plate("z_batch", len(batch)):
            for t in pyro.markov(range(int(lengths.max()))):
                loc, scale = self.head((self.combine(z).tanh() + output[:, t]) / 2).chunk(2, -1)
                with poutine.scale(None, annealing):
                    normal = dist.Normal(loc, nn.functional.softplus(scale))
                    z = pyro.sample(f"z_{t}", normal.mask(mask[:, t : t + 1]).to_event(1))


def reverse(batch, lengths):
    """Each sequence from its end, the padding left where it is."""
    turned = torch.zeros_like(batch)
    for i, length in enumerate(lengths.tolist()):
        turned[i, :length] = batch[i, :length].flip(0)
    return turned


def mini_batch(lengths):
    lengths = torch.tensor(lengths)
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).to(torch.get_default_dtype())
    batch = torch.bernoulli(torch.full((len(lengths), longest, 3), 0.5)) * mask[..., None]
    return batch, reverse(batch, lengths), mask, lengths


def deep_markov():
    """Packed sequences of two sets of lengths in turns."""
    made = Markov()
    calls = [call(*mini_batch([3, 2])), call(*mini_batch([4, 2]))]
    return Program(made.model, made.guide, Trace_ELBO, calls, predict=False)


def annealed_deep_markov():
    """The same lengths with a weight that rises from step to step and is a Python number."""
    made = Markov()
    batch = mini_batch([3, 2])
    calls = [call(*batch, annealing=min(1.0, 0.1 + 0.045 * i)) for i in range(30)]
    return Program(made.model, made.guide, Trace_ELBO, calls, told=r"annealing|number", predict=False)


def local_level():
    """A random walk in a Python loop, with an automatic guide of one site a step."""

    def model(ys):
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
        z = torch.zeros(())
        for t in pyro.markov(range(len(ys))):
            z = pyro.sample(f"z_{t}", dist.Normal(z, drift))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=ys[t])

    return Program(model, AutoNormal(model), Trace_ELBO, same(torch.randn(4).cumsum(0)))


def gaussian_markov():
    """A linear-Gaussian chain, integrated out by the distribution itself; its matrices are learned."""

    def model(ys):
        decay = pyro.param("decay", torch.tensor([0.9, 0.5]), constraint=constraints.unit_interval)
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        chain = dist.GaussianHMM(
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            decay.diag_embed(),
            dist.Normal(torch.zeros(2), 0.3).to_event(1),
            torch.ones(2, 1),
            dist.Normal(torch.zeros(1), noise).to_event(1),
            duration=len(ys),
        )
        pyro.sample("ys", chain, obs=ys)

    return Program(model, AutoNormal(model), Trace_ELBO, same(torch.randn(5, 1)))


PROGRAMS = (
    gaussian_mixture,
    mixture_in_the_guide,
    sequential_enumeration,
    hidden_markov,
    second_order_markov,
    capture_recapture,
    annotators,
    latent_dirichlet,
    outliers,
    deep_markov,
    annealed_deep_markov,
    local_level,
    gaussian_markov,
)
