"""CompiledSVI: stochastic variational inference whose step is one compiled graph."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_vae.errors import ContractError, check_choice
from pyro_vae.infer.objectives import Objective, uncounted
from pyro_vae.infer.programs import added, check_pathwise
from pyro_vae.infer.tracing import (
    PLAIN,
    Attributes,
    RoundedProducts,
    compile_graph,
    first_line,
    likeness,
    trace_graph,
    undone,
)
from pyro_vae.infer.trees import as_data

MOST_GRAPHS = 16
"""So many graphs of one engine: more shapes or settings than that mean that something changes at every step."""


class CompiledSVI:
    """Stochastic variational inference whose step is one compiled graph; a drop-in for ``pyro.infer.SVI``.

    At the first step, and again for every new shape of the data, loss and gradients are traced together into one graph
    of tensor operations: Pyro's handlers, the programs' Python and the backward pass run then, and never again.
    torch's inductor compiles the graph; each step runs it, clips if asked, and lets the optimizer step. Nothing waits
    for the device: ``step`` returns a tensor, which is read when you need it. Random numbers are those that eager
    torch would draw, so that a seed gives the trajectory of :class:`PyroSVI`, up to rounding.

    On a GPU, the third step of a shape is recorded as a CUDA graph, and those after it replay the record. It holds the
    optimizer's step too if the optimizer is ``capturable``; a learning rate that changes must then be a tensor.

    The programs must have static structure: the same sites and shapes at every step, no Python that depends on the
    values of tensors, and latent sites whose draws are reparametrized. Python numbers are frozen into the graph, and
    tensors are the ones it met. Those that modules and the loss have as attributes are watched, and a change traces
    anew. What changes often, such as the weight of a warm-up, must be a tensor that is changed in place.

    It does not look for NaN; :func:`pyro_vae.fit` does, once per epoch.

    Args:
        model, guide: Pyro programs with the same arguments; see above.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules and automatic
            guides, or the unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: ``Trace_ELBO`` or ``TraceMeanField_ELBO``, whose value and gradient are sums over the batch, or an
            objective of this library, whose are means, over the data given. Default: ``Trace_ELBO()``.
        max_norm: the norm of all gradients together is clipped to this, positive; None: not.
        precision: ``bfloat16`` rounds what matrix products and convolutions of float32 take and give to 8 significant
            bits, in forward and backward pass; all else, such as log-probabilities, parameters and the optimizer,
            keeps its type. ``float32`` leaves the programs as they are.
        compiler: ``inductor``; ``none`` runs the traced graph as it is, which is slower.
        cuda_graph: whether steps on a GPU are recorded and replayed.

    Raises:
        TypeError: if the loss is another of Pyro's, or no loss, or the optimizer is not one of torch that steps by
            itself, or an argument is neither a tensor nor hashable.
        ContractError: by the first step, if the programs have no static structure or a site cannot be reparametrized.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on, or others than at first.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        optim: torch.optim.Optimizer,
        loss: PyroELBO | Objective | None = None,
        max_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiler: Literal["inductor", "none"] = "inductor",
        cuda_graph: bool = True,
    ):
        loss = Trace_ELBO() if loss is None else loss
        if not isinstance(optim, torch.optim.Optimizer) or isinstance(optim, torch.optim.LBFGS):
            raise TypeError(
                f"optim must be an optimizer of torch that needs no closure, such as torch.optim.Adam(parameters), got "
                f"{type(optim).__name__}"
            )
        if isinstance(loss, type) or not (callable(loss) or isinstance(loss, PyroELBO)):
            raise TypeError(f"loss must be an instance, such as Trace_ELBO(), got {loss}")
        if isinstance(loss, PyroELBO) and type(loss) not in _BOUNDS:
            names = " and ".join(each.__name__ for each in _BOUNDS)
            raise TypeError(
                f"{type(loss).__name__} cannot be compiled, of Pyro's losses only {names} can: choose one of them, an "
                "objective of pyro_vae, or PyroSVI"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        check_choice("precision", precision, ("float32", "bfloat16"))
        check_choice("compiler", compiler, ("inductor", "none"))
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.max_norm, self.precision, self.compiler, self.cuda_graph = max_norm, precision, compiler, cuda_graph
        self._store = pyro.get_param_store().get_state()
        self._params = _parameters(optim)
        self._graphs: dict[tuple, _Graph] = {}
        roots = [getattr(root, "__self__", root) for root in (model, guide, loss)]
        self._modules = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        self._watched = Attributes((*roots, *self._modules.values()))

    def step(self, *args: object, **kwargs: object) -> Tensor:
        """Take one gradient step; return the loss in its own scale, a tensor without a graph."""
        if [id(p) for p in _parameters(self.optim)] != [id(p) for p in self._params]:
            raise ValueError(
                "the optimizer holds other tensors than when CompiledSVI was made, or one of them has been frozen or "
                "freed since: make another"
            )
        graph, tensors = self._graph(args, kwargs, train=True)
        loss = graph.step(*tensors)
        if isinstance(self.loss, Objective):
            self.loss.stepped()
        return loss

    def evaluate_loss(self, *args: object, **kwargs: object) -> Tensor:
        """The loss in its own scale, without a step; a tensor without a graph."""
        graph, tensors = self._graph(args, kwargs, train=False)
        return graph.run(*tensors)[0]

    def _graph(self, args: tuple, kwargs: dict, train: bool) -> tuple["_Graph", list[Tensor]]:
        leaves, spec = tree_flatten((args, kwargs))
        like = tuple(likeness(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        given = train, spec, like, self._recorded(train)
        try:
            graph = self._graphs.get((*given, self._watched.values()))
        except TypeError as error:
            raise TypeError(f"arguments must be tensors or hashable Python values: {error}") from error
        if graph is None:
            if len(self._graphs) >= MOST_GRAPHS:
                changed = self._watched.changed(key[-1] for key in self._graphs)
                raise ContractError(
                    f"{MOST_GRAPHS} graphs have been compiled, for other shapes of the data or other Python numbers"
                    f"{f', of which {changed} changed' if changed else ''}: give data of few shapes, and make what "
                    "changes between steps a tensor"
                )
            graph = _Graph(self, leaves, spec, train)
            self._watched.add(self._modules.values())  # those met on the way
            self._graphs[(*given, self._watched.values())] = graph
        return graph, [x for x in leaves if isinstance(x, Tensor)]

    def _recorded(self, train: bool) -> tuple:
        """What a CUDA graph holds besides the programs: where tensors lie, and the optimizer's numbers."""
        if not (train and self.cuda_graph and self._params and self._params[0].is_cuda):
            return ()
        groups = self.optim.param_groups if _is_capturable(self.optim) else []
        numbers = (value for group in groups for value in group.values() if isinstance(value, PLAIN))
        return id(self.optim.state), *(p.data_ptr() for p in self._params), *numbers


class _Graph:
    """Loss and gradients for arguments of one shape, traced together and compiled; and the step that they make."""

    def __init__(self, svi: CompiledSVI, leaves: list[object], spec: TreeSpec, train: bool):
        self.svi = svi
        self.trained: list[Tensor] = []
        params = svi._params if train else []

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            args, kwargs = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
            loss = _loss(svi, args, kwargs)
            if not train:
                return (loss,)
            depends = bool(params) and isinstance(loss, Tensor) and loss.requires_grad  # no particles: the number 0
            gradients = torch.autograd.grad(loss, params, allow_unused=True) if depends else [None] * len(params)
            self.trained = [p for p, gradient in zip(params, gradients, strict=True) if gradient is not None]
            if not self.trained:
                raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
            return loss, *(gradient for gradient in gradients if gradient is not None)

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            if svi.precision == "float32":
                return run(*tensors)
            with RoundedProducts():
                return run(*tensors)

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        store = pyro.get_param_store()
        undo = undone((*tensors, *svi._params), svi._modules)
        with store.scope(svi._store), undo, uncounted(svi.loss), torch.enable_grad():
            self._try(svi, run, tensors)
            graph = trace_graph(traced, tensors)
        self._run = compile_graph(graph, tensors) if svi.compiler == "inductor" else graph
        self._recording = _Recording(self) if train and svi.cuda_graph and svi._params[0].is_cuda else None
        self._optimizer = svi.optim.state  # kept, so that its id stays its own

    def _try(self, svi: CompiledSVI, run: Callable, tensors: list[Tensor]) -> None:
        """An ordinary run first: its errors are easier to read than those of a trace."""
        store = pyro.get_param_store()
        known = set(store.keys())
        run(*tensors)
        held = {id(p) for p in svi._params}
        for name in set(store.keys()) - known:
            value = store._params[name]
            if not isinstance(value, nn.Parameter) and id(value) not in held:
                raise ValueError(
                    f"pyro.param '{name}' came into being at the first step, so that the optimizer does not hold it: "
                    "run the programs once, and then make optimizer and CompiledSVI"
                )

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Loss and gradients."""
        with torch.no_grad():
            return self._run(*tensors)

    def step(self, *tensors: Tensor) -> Tensor:
        if self._recording is not None:
            return self._recording.step(*tensors)
        loss = self.differentiate(*tensors)
        self.svi.optim.step()
        return loss

    def differentiate(self, *tensors: Tensor) -> Tensor:
        """Set the parameters' gradients, clipped; return the loss."""
        loss, *gradients = self.run(*tensors)
        for p, gradient in zip(self.trained, gradients, strict=True):
            if gradient.stride() != p.stride():  # inductor pads matrix products on a GPU; fused optimizers refuse that
                gradient = torch.empty_like(p).copy_(gradient)
            p.grad = gradient
        trained = {id(p) for p in self.trained}
        for p in self.svi._params:
            if p.grad is not None and id(p) not in trained:  # this loss does not depend on it, one before it did
                p.grad = torch.zeros_like(p.grad)
        if self.svi.max_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.svi.max_norm)
        return loss


class _Recording:
    """Steps of one graph on a GPU: the first two run as they are, the third is recorded, it and all others replayed."""

    def __init__(self, graph: _Graph):
        self.graph, self.svi = graph, graph.svi
        self.whole = _is_capturable(graph.svi.optim)
        self.steps_before = 2  # kernels are compiled then, and the optimizer makes its state
        self.record: torch.cuda.CUDAGraph | None = None

    def step(self, *tensors: Tensor) -> Tensor:
        if self.steps_before == 0:
            self._record(tensors)
        self.steps_before -= 1
        if self.record is None:
            loss = self.graph.differentiate(*tensors)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it will be
                self.svi.optim.step()
            return loss
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given)
        self.record.replay()
        if not self.whole:
            for p, gradient in zip(self.graph.trained, self.gradients, strict=True):
                p.grad = gradient
            self.svi.optim.step()
        return self.loss.clone()  # the next replay overwrites it

    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in tensors]
        record = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(record):
                self.loss = self.graph.differentiate(*self.inputs)
                self.gradients = [p.grad for p in self.graph.trained]
                if self.whole:
                    self.svi.optim.step()
        except RuntimeError as error:
            reason = first_line(error)
            warnings.warn(f"a step cannot be recorded as a CUDA graph, and runs unrecorded: {reason}", stacklevel=5)
        else:
            self.record = record


def _is_capturable(optim: torch.optim.Optimizer) -> bool:
    return all(group.get("capturable") for group in optim.param_groups)


def _parameters(optim: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optim.param_groups for p in group["params"] if p.requires_grad]


def _loss(svi: CompiledSVI, args: tuple, kwargs: dict) -> Tensor:
    if not isinstance(svi.loss, PyroELBO):
        return svi.loss(svi.model, svi.guide, as_data(args, kwargs))
    bound: Any = _BOUNDS[type(svi.loss)]
    total: Any = 0.0
    for model_trace, guide_trace in svi.loss._get_traces(svi.model, svi.guide, args, kwargs):
        check_pathwise(guide_trace)
        total = total - bound(model_trace, guide_trace) / svi.loss.num_particles
    return total


def _sampled_bound(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """What ``Trace_ELBO`` differentiates if every site is reparametrized, without its waiting for the device."""
    log_p = added(site["log_prob_sum"] for site in model_trace.nodes.values() if site["type"] == "sample")
    return log_p - added(site["log_prob_sum"] for site in guide_trace.nodes.values() if site["type"] == "sample")


def _closed_form_bound(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """What ``TraceMeanField_ELBO`` differentiates: KL in closed form where it is known, else sampled."""
    bound: Any = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        guide_site: Any = guide_trace.nodes.get(name)
        if site["is_observed"] or guide_site is None:
            bound = bound + site["log_prob_sum"]
            continue
        try:
            kl = kl_divergence(guide_site["fn"], cast(Any, site["fn"]))
        except NotImplementedError:
            bound = bound + site["log_prob_sum"] - guide_site["log_prob_sum"]
        else:
            kl = torch.as_tensor(kl)  # the number 0 for a distribution that is masked altogether
            bound = bound - scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()
    auxiliary = (s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and n not in model_trace.nodes)
    return bound - sum(site["log_prob_sum"] for site in auxiliary)


_BOUNDS = {Trace_ELBO: _sampled_bound, TraceMeanField_ELBO: _closed_form_bound}
