"""CompiledSVI: Pyro's stochastic variational inference, whose steps are compiled graphs."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK, effectful
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map_only, tree_unflatten

from pyro_vae.errors import ContractError, check_choice
from pyro_vae.infer.compiling import RoundedProducts, likeness
from pyro_vae.infer.graphs import Graph, Outline, Record, Result
from pyro_vae.infer.objectives import Objective, uncounted
from pyro_vae.infer.tracing import ONE_AT_A_TIME, Collected, InvalidData, first_line, trace
from pyro_vae.infer.trees import as_data
from pyro_vae.infer.updates import update
from pyro_vae.infer.watching import PLAIN, Randomness, Snapshot

MOST_STATES = 8
"""So many states of the programs' Python are kept with their graphs, such as those of training and evaluation."""
MOST_KINDS = 256
"""So many kinds of calls of one state are remembered."""
PATIENCE = 16
"""After so many calls in a row of a kind never seen before, Pyro runs a while without asking."""
_NOISE = 1e-5, 1e-3
"""Relative differences of a loss, and of a gradient, that rounding makes in float32."""
_PLAIN_FORM: dict[type, type] = {
    JitTrace_ELBO: Trace_ELBO,
    JitTraceEnum_ELBO: TraceEnum_ELBO,
    JitTraceGraph_ELBO: TraceGraph_ELBO,
    JitTraceMeanField_ELBO: TraceMeanField_ELBO,
}


class CompiledSVI:
    """Pyro's stochastic variational inference, whose steps are compiled graphs; a drop-in for ``pyro.infer.SVI``.

    The first step of every kind of call is Pyro's own. The second is traced while it runs: what Pyro's handlers, its
    loss, the programs' Python and the backward pass do to tensors becomes one graph of tensor operations. Later steps
    run the graph alone, which torch's inductor compiles once that pays; on a GPU they are replayed as a CUDA graph.
    Random numbers are those that Pyro would draw, so that a seed gives Pyro's trajectory, up to rounding.

    **A graph is used only where it holds.** A kind of call is its shapes, strides and types, the Python values among
    its arguments, and all that programs and loss can reach in Python: attributes, closures, globals, containers,
    entries of the parameter store; a change makes another kind. What a program reads from tensors, in an ``if``, by
    ``.item()`` or NumPy, is read again at each step. At uses 1, 2, 4, ..., 512 of a graph, and at every thousandth,
    Pyro's own loss and gradients are computed for the same noise, taken, and compared with the graph's. Where they
    differ, a warning says so, the graph is made anew, and after a second time Pyro runs that kind of call for good.

    What no graph can hold (a handler around ``step``, hooks of parameters, random numbers that are not torch's, Python
    that changes at every step) runs through Pyro, with one warning, or is refused if ``fallback`` is off.

    Args:
        model, guide: Pyro programs with the same arguments.
        optim: an optimizer of ``pyro.optim``: then parameters are those that programs meet, in Pyro's global store,
            as they come into being, and ``step`` returns a float; all this is as with ``pyro.infer.SVI``. Or an
            optimizer of torch: its tensors are trained and no others, whether Pyro knows them or not, and ``step``
            returns a tensor, for which nothing waits until it is read.
        loss: any of Pyro's ELBOs or losses, whose value and gradient are sums over the batch, or an objective of this
            library, whose are means, or a function ``loss(model, guide, *args, **kwargs)``. Default: ``Trace_ELBO()``.
        max_norm: the norm of all gradients together is clipped to this, positive; None: not.
        precision: ``bfloat16`` rounds what matrix products and convolutions of float32 take and give to 8 significant
            bits, in forward and backward pass; all else, such as log-probabilities, parameters and the optimizer,
            keeps its type. ``float32`` leaves the programs as they are.
        compiler: ``inductor`` compiles a graph before its first use; ``auto`` after it has run as long uncompiled as
            compiling takes, and on a GPU at once; ``none`` runs traced graphs as they are.
        cuda_graph: whether steps on a GPU are recorded and replayed.
        fallback: whether what cannot be compiled runs through Pyro; else it is refused.

    Raises:
        TypeError: if optimizer or loss is none, or steps with a closure.
        ContractError: by ``step``, of what cannot be compiled, if ``fallback`` is off.
        ValueError: by ``step``, if a torch optimizer holds no tensor that the loss depends on, or lacks a
            ``pyro.param`` on which it does.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        optim: PyroOptim | torch.optim.Optimizer,
        loss: PyroELBO | Objective | Callable[..., Any] | None = None,
        max_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiler: Literal["auto", "inductor", "none"] = "auto",
        cuda_graph: bool = True,
        fallback: bool = True,
    ):
        loss = Trace_ELBO() if loss is None else loss
        if not isinstance(optim, (torch.optim.Optimizer, PyroOptim)) or isinstance(optim, torch.optim.LBFGS):
            raise TypeError(
                "optim must be an optimizer of pyro.optim, such as pyro.optim.Adam({'lr': 1e-3}), or one of torch that "
                f"needs no closure, such as torch.optim.Adam(parameters), got {type(optim).__name__}"
            )
        if isinstance(loss, type) or not (callable(loss) or isinstance(loss, PyroELBO)):
            raise TypeError(f"loss must be an instance, such as Trace_ELBO(), got {loss}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        check_choice("precision", precision, ("float32", "bfloat16"))
        check_choice("compiler", compiler, ("auto", "inductor", "none"))
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.max_norm, self.precision, self.compiler, self.cuda_graph = max_norm, precision, compiler, cuda_graph
        self.fallback = fallback
        self._forget()

    def _forget(self) -> None:
        self._states: list[_State] = []
        self._last: _Call | None = None
        self._lifted: set[int] = set()
        self._strange = self._rest = self._steps = 0
        self._pause = 4 * PATIENCE
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "guide", "optim", "loss", "max_norm", "precision", "compiler", "cuda_graph", "fallback")
        return {name: getattr(self, name) for name in own}  # graphs are made anew where a copy is used

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def step(self, *args: object, **kwargs: object) -> Any:
        """Take one gradient step; return the loss in its own scale: as Pyro a float, or a tensor without a graph."""
        with ONE_AT_A_TIME:
            self._steps += 1
            return self._given(self._serve(args, kwargs, train=True))

    def evaluate_loss(self, *args: object, **kwargs: object) -> Any:
        """The loss in its own scale, without a step: as Pyro a float, or a tensor without a graph."""
        with ONE_AT_A_TIME, torch.no_grad():
            return self._given(self._serve(args, kwargs, train=False))

    def _given(self, loss: Any) -> Any:
        if isinstance(self.optim, PyroOptim):
            return tree_map_only(Tensor, Tensor.item, loss)
        return tree_map_only((Tensor, int, float), lambda x: torch.as_tensor(x).detach(), loss)

    # How a call is served

    def _serve(self, args: tuple, kwargs: dict, train: bool) -> Any:
        if self._rest > 0:
            self._rest -= 1
            return self._run_pyro(args, kwargs, train)
        call = self._call(args, kwargs, train)
        if isinstance(call, str):
            return self._refuse(call, args, kwargs, train)
        if (changes := self._other_floats(call)) or self._last is None:
            call = self._call(args, kwargs, train) if changes else call
            assert isinstance(call, _Call)
        kind = call.state.kinds.get(call.key)
        if kind is None:
            return self._meet(call)
        self._last = call
        call.state.kinds.move_to_end(call.key)
        if kind.reason:
            return self._run_pyro(args, kwargs, train)
        graph = next((graph for graph in kind.graphs if graph.holds(call.tensors)), None)
        if graph is None:
            return self._trace(kind, call)
        self._strange, self._pause = 0, 4 * PATIENCE
        return self._use(kind, graph, call)

    def _meet(self, call: "_Call") -> Any:
        """Pyro's own step, of a kind of call that is new."""
        self._strange += 1
        if self._strange > PATIENCE:
            reason = f"every step is of another kind: {self._difference(call)} changes"
            self._rest, self._pause = self._pause, min(2 * self._pause, 4096)
            self._strange = PATIENCE - 4
            self._last = call
            return self._refuse(reason, call.args, call.kwargs, call.train)
        self._last = call
        call.state.kinds[call.key] = _Kind()
        if len(call.state.kinds) > MOST_KINDS:
            call.state.kinds.popitem(last=False)
        return self._run_pyro(call.args, call.kwargs, call.train)

    def _use(self, kind: "_Kind", graph: Graph, call: "_Call") -> Any:
        graph.compile(self.compiler, call.tensors)
        graph.uses += 1
        if (graph.uses & (graph.uses - 1) == 0 and graph.uses <= 512) or graph.uses % 1000 == 0:
            return self._check(kind, graph, call)
        on_gpu = any(x.is_cuda for x in graph.trained)
        if on_gpu and kind.record is not None and kind.record.graph is graph:
            loss = kind.record.step(call.tensors, self._recorded(graph))
            self._stepped(call)
            return loss
        randomness = Randomness(call.devices) if graph.speculates else None
        kept = [(x, x.clone()) for x in graph.written] if randomness else []
        result = graph.timed(call.tensors)
        valid = result.valid is None or result.valid.is_cuda or bool(result.valid)
        if valid and (randomness is None or graph.foreseen(result)):
            if call.train:
                self._apply(graph, result)
                self._stepped(call)
            return result.loss
        graph.misses += 1
        if randomness is not None:
            _put_back(kept)
            randomness.restore()
        if randomness is not None and graph.misses > 4 and 4 * graph.misses > graph.uses:
            kind.reason = graph.looked() + ", which depend on what is drawn"
            return self._refuse(kind.reason, call.args, call.kwargs, call.train)
        return self._run_pyro(call.args, call.kwargs, call.train)  # which says what is wrong with the data

    def _refuse(self, reason: str, args: tuple, kwargs: dict, train: bool) -> Any:
        if not self.fallback:
            raise ContractError(f"this cannot be compiled: {reason}")
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"CompiledSVI goes on through Pyro at step {self._steps}: {reason}", stacklevel=4)
        return self._run_pyro(args, kwargs, train)

    # Pyro's own way

    def _run_pyro(self, args: tuple, kwargs: dict, train: bool) -> Any:
        loss, params, gradients = self._differentiate(args, kwargs, train)
        if train:
            self._update(params, gradients)
        return loss

    def _differentiate(
        self, args: tuple, kwargs: dict, train: bool, collect: bool = False
    ) -> tuple[Any, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Loss, the tensors of ``param`` sites by name, and gradients where no optimizer of Pyro finds them."""
        with RoundedProducts() if self.precision == "bfloat16" else nullcontext():
            if not train:
                return self._evaluated(args, kwargs), {}, []
            collected = Collected(self.loss)
            ours = collect or not isinstance(self.optim, PyroOptim)
            with poutine.trace(param_only=True) as capture, collected if ours else nullcontext():
                loss = self._loss_and_grads(args, kwargs)
            sites = {name: site["value"] for name, site in capture.trace.nodes.items() if name != _HELD}
            params = {name: value.unconstrained() for name, value in sites.items()}
            if not ours:
                return loss, params, []
            return _detached(loss), params, self._gradients(collected.losses, params)

    def _loss_and_grads(self, args: tuple, kwargs: dict) -> Any:
        if isinstance(self.loss, PyroELBO):
            plain = self.loss
            if type(plain) in _PLAIN_FORM:
                plain = object.__new__(_PLAIN_FORM[type(plain)])
                plain.__dict__ = vars(self.loss)
            model = self.model if isinstance(self.optim, PyroOptim) else _with_a_param(self.model)
            return plain.loss_and_grads(model, self.guide, *args, **kwargs)
        loss = self._called(args, kwargs)
        if getattr(loss, "requires_grad", False):
            loss.backward(retain_graph=True)
        return loss

    def _called(self, args: tuple, kwargs: dict) -> Any:
        if isinstance(self.loss, Objective):
            return self.loss(self.model, self.guide, as_data(args, kwargs))
        call: Any = self.loss
        return call(self.model, self.guide, *args, **kwargs)

    def _evaluated(self, args: tuple, kwargs: dict) -> Any:
        with torch.no_grad(), Collected(self.loss):
            if isinstance(self.loss, PyroELBO):
                return _detached(self.loss.loss(self.model, self.guide, *args, **kwargs))
            return _detached(self._called(args, kwargs))

    def _gradients(self, losses: list[Tensor], params: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of collected losses: those of the optimizer's tensors, or of the parameters met."""
        pyros = isinstance(self.optim, PyroOptim)
        held = list(params.values()) if pyros else _parameters(self.optim)
        ids = {id(p) for p in held}
        beside = [(name, p) for name, p in params.items() if id(p) not in ids and p.requires_grad]
        losses = [loss for loss in losses if loss.requires_grad]
        if not losses:
            return []
        asked = [p for p in held if p.requires_grad] + [p for _, p in beside]
        unique = list({id(p): p for p in asked}.values())
        found = torch.autograd.grad(sum(losses), unique, allow_unused=True) if unique else ()  # type: ignore[arg-type]
        pairs = [(p, gradient) for p, gradient in zip(unique, found, strict=True) if gradient is not None]
        reached = {id(p) for p, _ in pairs}
        forgotten = [name for name, p in beside if id(p) in reached]
        if forgotten:
            raise ValueError(
                f"pyro.param '{forgotten[0]}' is not held by the optimizer, so that it would never be trained: make the "
                "optimizer of it too, freeze it with requires_grad_(False), or give an optimizer of pyro.optim"
            )
        if not pairs and not pyros:
            raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
        return pairs

    # What gradients are for

    def _update(self, params: dict[str, Tensor], gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One step of the optimizer, with the gradients given on top of those that the tensors have."""
        for p, gradient in gradients:
            p.grad = gradient if p.grad is None else p.grad + gradient
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_([p for p in self._held(params) if p.grad is not None], self.max_norm)
        if isinstance(self.optim, PyroOptim):
            met = list({id(p): p for p in params.values()}.values())
            update(self.optim, met)
            zero_grads(met)
        elif gradients:
            self.optim.step()
            for p in self._held(params):
                p.grad = None

    def _held(self, params: dict[str, Tensor]) -> list[Tensor]:
        return list(params.values()) if isinstance(self.optim, PyroOptim) else _parameters(self.optim)

    def _apply(self, graph: Graph, result: Result) -> None:
        """What follows a run: the optimizer's step, and the entries of the store that the programs set."""
        pairs = []
        for p, gradient in zip(graph.trained, result.gradients, strict=True):
            if gradient.stride() != p.stride():  # inductor pads matrix products on a GPU; fused optimizers refuse that
                gradient = torch.empty_like(p).copy_(gradient)
            pairs.append((p, gradient))
        store = pyro.get_param_store()
        for name, value in zip(graph.replaced, result.replaced, strict=True):
            store._params[name] = value.detach().requires_grad_()
            store._param_to_name[store._params[name]] = name
        self._update(graph.params, pairs)
        if isinstance(self.optim, PyroOptim) and isinstance(self.loss, PyroELBO) and isinstance(result.loss, Tensor):
            warn_if_nan(result.loss, "loss")

    def _stepped(self, call: "_Call") -> None:
        if call.train and isinstance(self.loss, Objective):
            self.loss.stepped()

    # Tracing, and judging what was traced

    def _trace(self, kind: "_Kind", call: "_Call") -> Any:
        """A step that is traced while it runs."""
        store = pyro.get_param_store()
        before = dict(store._params), dict(store._constraints), dict(store._param_to_name)
        randomness = Randomness(call.devices, call.state.snapshot.generators)
        try:
            traced, outline, gradients = self._traced(call, before[0])
        except BaseException as error:
            randomness.restore()
            call.state.snapshot.restore()
            store._params, store._constraints, store._param_to_name = before
            if isinstance(error, InvalidData):
                return self._run_pyro(call.args, call.kwargs, call.train)
            if not isinstance(error, Exception):
                raise
            self._strange = 0
            kind.reason = f"the programs cannot be traced: {_in_words(error)}"
            if not self.fallback:
                raise ContractError(f"this cannot be compiled: {kind.reason}") from error
            return self._refuse(kind.reason, call.args, call.kwargs, call.train)
        if call.train:
            self._update(outline.params, gradients)
            self._stepped(call)
        loss = tree_unflatten(outline.leaves, outline.spec)
        if randomness.is_drawn_elsewhere():
            kind.reason = "the programs draw random numbers that are not torch's"
            return self._said_after(kind, loss)
        if not call.state.snapshot.holds() or store._params.keys() != before[0].keys():
            return loss  # what came into being or changed belongs to the next kind
        kind.traces += 1
        graph = Graph(traced, outline, before[0])
        if kind.traces > PATIENCE and sum(each.uses for each in kind.graphs) < 4 * kind.traces:
            kind.reason = graph.looked()
            return self._said_after(kind, loss)
        kind.graphs = [graph, *kind.graphs[: PATIENCE - 1]]
        kind.record = self._recorder(graph, call)
        return loss

    def _said_after(self, kind: "_Kind", loss: Any) -> Any:
        """The step has been taken, and later ones go through Pyro."""
        kind.graphs = []
        if not self.fallback:
            raise ContractError(f"this cannot be compiled: {kind.reason}")
        if kind.reason not in self._said:
            self._said.add(kind.reason)
            warnings.warn(f"CompiledSVI goes on through Pyro after step {self._steps}: {kind.reason}", stacklevel=5)
        return loss

    def _traced(self, call: "_Call", store: dict[str, Tensor]) -> tuple[Any, Outline, list[tuple[Tensor, Tensor]]]:
        outlines: list[tuple[Outline, list[tuple[Tensor, Tensor]]]] = []

        def run(*tensors: Tensor) -> list[Tensor]:
            args, kwargs = call.rebuilt(tensors)
            loss, params, gradients = self._differentiate(args, kwargs, call.train, collect=True)
            leaves, spec = tree_flatten(loss)
            now = pyro.get_param_store()._params
            replaced = [name for name, value in store.items() if now.get(name) is not value]
            if any(name not in now for name in replaced):
                raise ContractError("the programs take parameters out of the store")
            trained = [p for p, _ in gradients]
            outlines.append((Outline(leaves, spec, params, trained, replaced), gradients))
            values = [now[name].detach() for name in replaced]
            return [*(x for x in leaves if isinstance(x, Tensor)), *(gradient for _, gradient in gradients), *values]

        with uncounted(self.loss), torch.enable_grad() if call.train else nullcontext():
            traced = trace(run, call.tensors)
        return traced, *outlines[0]

    def _check(self, kind: "_Kind", graph: Graph, call: "_Call") -> Any:
        """A spot check: the graph's loss and gradients are compared with Pyro's, which are those that count."""
        randomness = Randomness(call.devices, call.state.snapshot.generators)
        kept = [(x, x.clone()) for x in graph.written]
        mine = self._attempt(graph, call, True)
        _put_back(kept)
        randomness.restore()
        before = [(p, p.grad) for p in graph.params.values()]
        for p, _ in before:
            p.grad = None
        loss, params, gradients = self._differentiate(call.args, call.kwargs, call.train)
        theirs = loss, params, gradients or [(p, p.grad) for p in params.values() if p.grad is not None]
        difference = self._compare(graph, mine, theirs)
        if difference and graph.compiled:
            after = Randomness(call.devices), [(x, x.clone()) for x in graph.written]
            _put_back(kept)
            randomness.restore()
            if not self._compare(graph, self._attempt(graph, call, False), theirs):
                graph.uncompile()
                warnings.warn(
                    f"inductor's code gives something else than the graph it was made of ({difference}), which runs "
                    "uncompiled, and slower: it draws random numbers in another order, or is wrong",
                    stacklevel=5,
                )
                difference = ""
            _put_back(after[1])
            after[0].restore()
        for p, gradient in before:
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        if call.train:
            self._update(params, gradients)
        if not difference and not call.state.snapshot.holds():
            difference = f"the programs change {call.state.snapshot.changed()}, which their graph does not"
        if difference:
            self._judge(kind, graph, difference)
        else:
            graph.checked = self._steps
        return loss

    def _judge(self, kind: "_Kind", graph: Graph, difference: str) -> None:
        """A graph is wrong."""
        kind.graphs = [each for each in kind.graphs if each is not graph]
        kind.record = None
        kind.mismatches += 1
        since = f"after step {graph.checked}" if graph.checked else "from its first use"
        reason = f"the graph gave something else than Pyro {since}, found at step {self._steps}: {difference}"
        if kind.mismatches > 1 or not self.fallback:
            kind.reason = reason
        if not self.fallback:
            raise ContractError(reason)
        then = "Pyro runs on" if kind.reason else "it is made anew"
        warnings.warn(f"{reason}; {then}", stacklevel=6)

    def _attempt(self, graph: Graph, call: "_Call", compiled: bool) -> Result | str:
        try:
            return graph.run(call.tensors, compiled)
        except RuntimeError as error:
            return _in_words(error)

    def _compare(self, graph: Graph, mine: Result | str, theirs: tuple) -> str:
        """How the two differ, in words; empty if only by rounding."""
        if isinstance(mine, str):
            return f"it fails, {mine}"
        loss, params, gradients = theirs
        if params.keys() != graph.params.keys() or any(graph.params[name] is not p for name, p in params.items()):
            return "the parameters that the programs meet are others"
        for a, b in zip(tree_flatten(mine.loss)[0], tree_flatten(loss)[0], strict=True):
            if not _close(torch.as_tensor(a), torch.as_tensor(b), *self._rounding(graph, 0)):
                return f"a loss of {float(a):.6g}, Pyro's is {float(b):.6g}"
        found = {id(p): gradient for p, gradient in zip(graph.trained, mine.gradients, strict=True)}
        largest = max([float(gradient.norm()) for _, gradient in gradients], default=0.0)
        for p, gradient in gradients:
            ours = found.get(id(p), torch.zeros_like(gradient))
            if not _close(ours, gradient, *self._rounding(graph, 1), largest):
                name = next((name for name, each in params.items() if each is p), "a parameter")
                return f"another gradient of {name}"
        return ""

    def _rounding(self, graph: Graph, of: int) -> tuple[float, bool]:
        if self.precision == "bfloat16":
            return (0.01, 0.1)[of], True
        return _NOISE[of] * (10.0 if graph.compiled else 1.0), False

    # Kinds of calls

    def _call(self, args: tuple, kwargs: dict, train: bool) -> "_Call | str":
        """The call with its kind; or why it has none."""
        leaves, spec = tree_flatten((args, kwargs))
        ambient = _ambient()
        if isinstance(ambient, str):
            return ambient
        tensors: list[Tensor] = []
        places: dict[int, int] = {}
        parts: list[object] = []
        objects: list[object] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad or type(leaf) is not Tensor or leaf.layout is not torch.strided:
                    return "an argument is no plain tensor without a gradient"
                parts.append((likeness(leaf), places.setdefault(id(leaf), len(places))))
                tensors.append(leaf)
            elif type(leaf) is float and (spec, i) in self._lifted:
                parts.append(float)
                tensors.append(_as_tensor(leaf, leaves))
            elif isinstance(leaf, slice):
                parts.append((slice, leaf.start, leaf.stop, leaf.step))
            elif isinstance(leaf, PLAIN) or isinstance(leaf, np.generic):
                parts.append((type(leaf), leaf))
            elif isinstance(leaf, np.ndarray):
                parts.append((leaf.shape, leaf.dtype.str, leaf.tobytes()))
            else:
                parts.append((type(leaf), id(leaf)))
                objects.append(leaf)
        if self._has_hooks():
            return "a parameter has hooks on its gradient"
        key = train, spec, tuple(parts), ambient
        try:
            hash(key)
        except TypeError as error:
            return f"an argument cannot be compared, {error}"
        devices = tuple({x.device for x in tensors if x.is_cuda} or {p.device for p in self._known() if p.is_cuda})
        return _Call(args, kwargs, leaves, spec, tensors, self._lifted, key, self._state(objects), train, devices)

    def _known(self) -> list[Tensor]:
        return list(self.optim.optim_objs) if isinstance(self.optim, PyroOptim) else _parameters(self.optim)

    def _has_hooks(self) -> bool:
        return any([p._backward_hooks or p._post_accumulate_grad_hooks for p in self._known()])

    def _state(self, objects: list[object]) -> "_State":
        """The state of all that programs reach in Python: one known before, or a new one."""
        ids = tuple(map(id, objects))
        for i, state in enumerate(self._states):
            if state.ids == ids and state.snapshot.holds():
                if i:
                    self._states.insert(0, self._states.pop(i))
                return state
        state = _State(ids, Snapshot((self.model, self.guide, self.loss, *objects)))
        self._states = [state, *self._states[: MOST_STATES - 1]]
        return state

    def _other_floats(self, call: "_Call") -> bool:
        """Whether numbers among the arguments are others than in the last call: they are tensors from now on."""
        last = self._last
        if last is None or last.spec != call.spec:
            return False
        pairs = zip(last.leaves, call.leaves, strict=True)
        found = [i for i, (a, b) in enumerate(pairs) if type(a) is float and type(b) is float and a != b]
        new = [i for i in found if (call.spec, i) not in self._lifted]
        self._lifted.update((call.spec, i) for i in new)
        if new:
            named = tree_flatten_with_path((call.args, call.kwargs))[0]
            names = ", ".join(keystr(named[i][0][1:]) for i in new)
            warnings.warn(f"the number {names} changes, and is a tensor in compiled steps", stacklevel=5)
        return bool(new)

    def _difference(self, call: "_Call") -> str:
        """What is other in this call than in the last, in words."""
        last = self._last
        if last is None or last.spec != call.spec:
            return "the structure of the arguments"
        if last.state is not call.state and (changed := last.state.snapshot.changed()):
            return changed
        named = tree_flatten_with_path((call.args, call.kwargs))[0]
        for (path, _), a, b in zip(named, last.key[2], call.key[2], strict=True):
            if a != b:
                return f"argument {keystr(path[1:])}"
        return "something around the step"

    def _recorder(self, graph: Graph, call: "_Call") -> Record | None:
        tensors = (*graph.trained, *call.tensors, *graph.constants)
        possible = self.cuda_graph and call.train and not (graph.speculates or graph.replaced or graph.written)
        if not (possible and graph.trained and all(x.is_cuda for x in tensors)):
            return None
        whole = isinstance(self.optim, torch.optim.Optimizer) and _is_capturable(self.optim)
        return Record(graph, lambda result: self._apply(graph, result), whole)

    def _recorded(self, graph: Graph) -> tuple:
        """What a record holds besides the programs: where tensors lie, and the optimizer's numbers."""
        whole = isinstance(self.optim, torch.optim.Optimizer) and _is_capturable(self.optim)
        groups = self.optim.param_groups if whole and isinstance(self.optim, torch.optim.Optimizer) else []
        numbers = [value for group in groups for value in group.values() if isinstance(value, PLAIN)]
        state = id(self.optim.state) if whole and isinstance(self.optim, torch.optim.Optimizer) else 0
        return state, *(p.data_ptr() for p in (*graph.trained, *graph.constants)), *numbers


class _Call(NamedTuple):
    """Arguments of a call, and its kind."""

    args: tuple
    kwargs: dict
    leaves: list[Any]
    spec: TreeSpec
    tensors: list[Tensor]
    lifted: set[tuple[TreeSpec, int]]
    key: tuple
    state: "_State"
    train: bool
    devices: tuple[torch.device, ...]

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments with other tensors."""
        given = iter(tensors)
        leaves = [
            next(given) if isinstance(x, Tensor) or (type(x) is float and (self.spec, i) in self.lifted) else x
            for i, x in enumerate(self.leaves)
        ]
        return tree_unflatten(leaves, self.spec)


class _Kind:
    """What is known of one kind of call: its graphs, one for each that was read from tensors; or why it has none."""

    def __init__(self):
        self.graphs: list[Graph] = []
        self.record: Record | None = None
        self.reason = ""
        self.traces = self.mismatches = 0


class _State:
    """A state of the programs' Python, and the kinds of calls met in it."""

    def __init__(self, ids: tuple[int, ...], snapshot: Snapshot):
        self.ids, self.snapshot = ids, snapshot
        self.kinds: OrderedDict[tuple, _Kind] = OrderedDict()


_HELD = "_held_by_an_optimizer_of_torch"


@effectful(type="param")
def _meet_a_param(name: str) -> Tensor:
    return torch.zeros(())


def _with_a_param(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with a ``param`` site: Pyro's losses compute no gradients for programs that have none."""

    def registered(*args: Any, **kwargs: Any) -> Any:
        _meet_a_param(_HELD, name=_HELD)
        return model(*args, **kwargs)

    return registered


def _ambient() -> tuple | str:
    """What surrounds a step that programs run in; or why no graph holds there."""
    if _PYRO_STACK:
        return f"a handler around the step, {type(_PYRO_STACK[-1]).__name__}"
    if torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled():
        return "a mode of torch around the step"
    modes = [type(each).__name__ for each in torch.overrides._get_current_function_mode_stack()]
    if any(name != "DeviceContext" for name in modes):
        return "a mode of torch around the step"
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    types = (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")) if any(autocast) else ()
    return torch.is_grad_enabled(), autocast, types, torch.get_default_dtype(), str(torch.get_default_device())


def _as_tensor(number: float, leaves: list[Any]) -> Tensor:
    """A number that changes as a tensor, in the widest type among the data."""
    floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    double = any(x.dtype == torch.float64 for x in floats)
    device = next((x.device for x in leaves if isinstance(x, Tensor)), None)
    return torch.tensor(number, dtype=torch.float64 if double else None, device=device)


def _is_capturable(optim: torch.optim.Optimizer) -> bool:
    return all(group.get("capturable") for group in optim.param_groups)


def _parameters(optim: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optim.param_groups for p in group["params"] if p.requires_grad]


def _detached(loss: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, loss)


def _put_back(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for x, value in kept:
            x.copy_(value)


def _in_words(error: BaseException) -> str:
    """What an error says, in one line and without Pyro's table of shapes."""
    return first_line(error).removesuffix(":").removesuffix("Trace Shapes").strip() or type(error).__name__


def _close(a: Tensor, b: Tensor, tolerance: float, rounded: bool, largest: float = 0.0) -> bool:
    if a.dtype == torch.float64 and not rounded:
        tolerance = tolerance * 1e-4
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    odd = ~(a.isfinite() & b.isfinite())
    if odd.any():
        same = (a == b) | (a.isnan() & b.isnan())
        if not same[odd].all():
            return False
        a, b = a.masked_fill(odd, 0.0), b.masked_fill(odd, 0.0)
    scale = float(b.norm()) if b.dim() or largest else max(1.0, float(b.abs()))
    return float((a - b).norm()) <= tolerance * (scale + 0.01 * largest) + 1e-30
