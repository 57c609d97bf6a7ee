"""CompiledSVI: Pyro's stochastic variational inference, whose steps are compiled graphs."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, cast

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from pyro.ops.provenance import detach_provenance
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vae.errors import ContractError, check_choice
from pyro_vae.infer.graphs import Graph, Input, Outline, Record, Result, difference
from pyro_vae.infer.kinds import Call, Calls, Kind
from pyro_vae.infer.objectives import Objective, uncounted
from pyro_vae.infer.randomness import Randomness
from pyro_vae.infer.steps import Derivatives, Loss, Steps
from pyro_vae.infer.tracing import ONE_AT_A_TIME, InvalidData, in_words, put_back, trace

MOST_KINDS = 256
"""So many kinds of calls of one state of the programs' Python are remembered."""
PATIENCE = 16
"""After so many calls in a row of a kind never seen before, Pyro runs a while without asking."""

NODES_PER_CALL = 2000
"""A kind of call is traced once it has come up again so often, for each so many nodes that graphs have had before."""

_SEVERAL_PASSES = "a parameter has hooks on its gradient, and the loss has several backward passes"


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

    What no graph can hold (a handler around ``step``, random numbers that are not torch's, Python that changes at every
    step) runs through Pyro, with one warning, or is refused if ``fallback`` is off.

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
        compiler: ``inductor`` compiles a graph before its first use; ``auto`` after so many uses that compiling has
            been worth its seconds, some 4,000 to 10,000, and on a GPU at once; ``none`` runs traced graphs as they are.
        cuda_graph: whether steps on a GPU are recorded and replayed.
        fallback: whether what cannot be compiled runs through Pyro; else it is refused.
        loss_and_grads: for a loss that is a function: a function like it that adds to the gradients as well. Default:
            one that calls the loss, and ``backward``.
        num_samples, num_steps: what ``SVI.run`` takes, which Pyro will remove and which is none here: ignored.

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
        loss: Loss | None = None,
        max_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiler: Literal["auto", "inductor", "none"] = "auto",
        cuda_graph: bool = True,
        fallback: bool = True,
        *,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
    ):
        check_choice("precision", precision, ("float32", "bfloat16"))
        check_choice("compiler", compiler, ("auto", "inductor", "none"))
        self._steps = Steps(model, guide, optim, loss, max_norm, precision, loss_and_grads)
        self.precision, self.cuda_graph, self.fallback = precision, cuda_graph, fallback
        self.compiler: Literal["auto", "inductor", "none"] = compiler
        self._forget()

    model = property(lambda self: self._steps.model, lambda self, it: self._change(model=it), doc="The model.")
    guide = property(lambda self: self._steps.guide, lambda self, it: self._change(guide=it), doc="The guide.")
    optim = property(lambda self: self._steps.optim, lambda self, it: self._change(optim=it), doc="The optimizer.")
    steps = property(lambda self: self._steps, doc="The two halves of a step.")

    @property
    def loss(self) -> Callable[..., Any]:
        """The loss as a function of model, guide and their arguments, as ``SVI`` has it."""
        loss: Any = self._steps.loss
        return loss.loss if isinstance(self._steps.loss, PyroELBO) else loss

    @property
    def loss_and_grads(self) -> Callable[..., Any]:
        """The loss of an ELBO of Pyro as a function that also adds to the gradients, as ``SVI`` has it."""
        return cast(Any, self._steps.loss).loss_and_grads

    def _change(self, **parts: Any) -> None:
        self._steps = self._steps.with_other(**parts)
        self._forget()

    def _forget(self) -> None:
        self._calls = Calls((self.model, self.guide, self._steps.loss))
        self._number = self._strange = self._rest = self._nodes = 0
        self._pause = 4 * PATIENCE
        self._last: Call | None = None
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_steps", "precision", "compiler", "cuda_graph", "fallback")
        return {name: getattr(self, name) for name in own}  # graphs are made anew where a copy is used

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def step(self, *args: object, **kwargs: object) -> Any:
        """Take one gradient step; return the loss in its own scale: as Pyro a float, or a tensor without a graph."""
        with ONE_AT_A_TIME:
            self._number += 1
            return self._steps.given(self._serve(args, kwargs, train=True))

    def evaluate_loss(self, *args: object, **kwargs: object) -> Any:
        """The loss in its own scale, without a step: as Pyro a float, or a tensor without a graph."""
        with ONE_AT_A_TIME, torch.no_grad():
            return self._steps.given(self._serve(args, kwargs, train=False))

    def _serve(self, args: tuple, kwargs: dict, train: bool) -> Any:
        if self._rest > 0:
            self._rest -= 1
            return self._run_pyro(args, kwargs, train)
        held = self._steps.held
        call = self._calls.call(
            args, kwargs, train, held, () if isinstance(self.optim, PyroOptim) else tuple(map(id, held))
        )
        if isinstance(call, str):
            return self._refuse(call, args, kwargs, train)
        kind = call.state.kinds.get(call.key)
        if kind is None:
            return self._meet(call)
        self._last = call
        call.state.kinds.move_to_end(call.key)
        if kind.reason:
            return self._run_pyro(args, kwargs, train)
        graph = next((each for each in kind.graphs if each.holds(call.tensors)), None)
        if graph is None and kind.waited < self._nodes // NODES_PER_CALL:
            kind.waited += 1
            self._strange = 0
            return self._run_pyro(args, kwargs, train)
        if graph is None:
            return self._trace(kind, call)
        self._strange, self._pause = 0, 4 * PATIENCE
        return self._use(kind, graph, call)

    def _meet(self, call: Call) -> Any:
        """Pyro's own step, of a kind of call that is new."""
        last, self._last = self._last, call
        self._strange += 1
        if self._strange > PATIENCE:
            self._rest, self._pause = self._pause, min(2 * self._pause, 4096)
            self._strange = PATIENCE - 4
            reason = f"every step is of another kind: {call.difference(last)} changes"
            return self._refuse(reason, call.args, call.kwargs, call.train)
        call.state.kinds[call.key] = Kind()
        if len(call.state.kinds) > MOST_KINDS:
            call.state.kinds.popitem(last=False)
        return self._run_pyro(call.args, call.kwargs, call.train)

    def _use(self, kind: Kind, graph: Graph, call: Call) -> Any:
        hooked = call.train and self._steps.hooked
        if hooked and graph.passes > 1:
            return self._refuse(_SEVERAL_PASSES, call.args, call.kwargs, call.train)
        graph.compile(self.compiler, call.tensors)
        graph.uses += 1
        if (graph.uses & (graph.uses - 1) == 0 and graph.uses <= 512) or graph.uses % 1000 == 0:
            return self._check(kind, graph, call)
        held = self._recorded(kind.record) if kind.record is not None and not hooked else None
        if kind.record is not None and kind.record.graph is graph and held is not None:
            loss = kind.record.step(call.tensors, *held)
            self._stepped(call)
            return loss
        undoes = graph.speculates or (graph.judges and not call.devices)
        randomness = Randomness(call.devices, call.state.snapshot.generators, others=False) if undoes else None
        kept = [(x, x.clone()) for x in graph.written] if graph.judges else []
        try:
            result = graph.run(call.tensors)
        except RuntimeError:
            if not graph.speculates:
                raise
            result = None  # other draws make other shapes
        if result is not None and graph.valid(result) and graph.foreseen(result):
            if call.train:
                self._apply(graph, result)
                self._stepped(call)
            return result.loss
        graph.misses += 1
        put_back(kept)
        if randomness is not None:
            randomness.restore()
        if graph.speculates and graph.misses > 4 and 4 * graph.misses > graph.uses:
            kind.reason = graph.looked()
            return self._refuse(kind.reason, call.args, call.kwargs, call.train)
        return self._run_pyro(call.args, call.kwargs, call.train)  # which says what is wrong with data

    def _run_pyro(self, args: tuple, kwargs: dict, train: bool) -> Any:
        if not train:
            return self._steps.evaluate(args, kwargs)
        loss, params, gradients = self._steps.differentiate(args, kwargs)
        self._steps.update(params, gradients)
        return loss

    def _refuse(self, reason: str, args: tuple, kwargs: dict, train: bool) -> Any:
        self._say(f"goes on through Pyro at step {self._number}", reason)
        return self._run_pyro(args, kwargs, train)

    def _say(self, what: str, reason: str) -> None:
        """Warn, once of each reason; or refuse."""
        if not self.fallback:
            raise ContractError(f"this cannot be compiled: {reason}")
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"CompiledSVI {what}: {reason}", stacklevel=6)

    def _apply(self, graph: Graph, result: Result) -> None:
        """What follows a run: the optimizer's step, and the entries of the store that the programs set."""
        store, params = pyro.get_param_store(), graph.met()
        for name, value in zip(graph.replaced, result.replaced, strict=True):
            store._params[name] = value.detach().requires_grad_()
            store._param_to_name[store._params[name]] = name
        self._steps.update(params, self._steps.through_hooks(graph.pairs(result)))
        warns = isinstance(self.optim, PyroOptim) and isinstance(self._steps.loss, PyroELBO)
        if warns and isinstance(result.loss, Tensor) and (result.valid is None or result.valid.is_cuda):
            warn_if_nan(result.loss, "loss")  # else Pyro takes steps that give it

    def _stepped(self, call: Call) -> None:
        if call.train and isinstance(self._steps.loss, Objective):
            self._steps.loss.stepped()

    # Tracing

    def _trace(self, kind: Kind, call: Call) -> Any:
        """A step that is traced while it runs."""
        store = pyro.get_param_store()
        before = dict(store._params), dict(store._constraints), dict(store._param_to_name)
        randomness = Randomness(call.devices, call.state.snapshot.generators)

        def undo() -> None:
            randomness.restore()
            call.state.snapshot.restore()
            store._params, store._constraints, store._param_to_name = before

        try:
            traced, outline, gradients = self._traced(call, before[0])
        except BaseException as error:
            undo()
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, InvalidData):
                return self._untraceable(kind, call, error)
            return self._run_pyro(call.args, call.kwargs, call.train)
        if call.train and not call.lifted:
            self._steps.update(outline.params, self._steps.through_hooks(gradients))
            self._stepped(call)
        traces = kind.traces
        self._nodes = max(self._nodes, len(traced.graph.graph.nodes))
        if randomness.is_drawn_elsewhere():
            kind.reason = "the programs draw random numbers that are not torch's"
        elif changed := call.state.snapshot.changed(since=True):
            kind.mismatches += call.state.snapshot.holds()  # but for tensors exchanged by the programs themselves
            if kind.mismatches > 1:
                kind.reason = f"the programs change {changed}"
        elif store._params.keys() == before[0].keys():
            self._keep(kind, Graph(traced, outline, before[0], call.state.snapshot), call)
        # else: what came into being or changed belongs to the next kind
        if kind.reason:
            kind.graphs = []
            self._say(f"goes on through Pyro after step {self._number}", kind.reason)
        if not call.lifted:
            return tree_unflatten(outline.leaves, outline.spec)
        traced.undo()  # programs may treat tensors otherwise than the numbers that these are: a run of Pyro counts
        undo()
        if kind.graphs and kind.traces > traces:
            return self._check(kind, kind.graphs[0], call)
        return self._run_pyro(call.args, call.kwargs, call.train)

    def _keep(self, kind: Kind, graph: Graph, call: Call) -> None:
        kind.traces += 1
        if kind.traces > PATIENCE // 2 and sum(each.uses for each in kind.graphs) < 4 * kind.traces:
            kind.reason = graph.looked()
        kind.graphs = [graph, *kind.graphs[: PATIENCE - 1]]
        kind.record = self._recorder(graph, call)

    def _untraceable(self, kind: Kind, call: Call, error: Exception) -> Any:
        """Pyro's own step, which says itself what is wrong with programs that are."""
        self._strange = 0
        reason = f"the programs cannot be traced, {in_words(error)}"
        loss = self._run_pyro(call.args, call.kwargs, call.train) if self.fallback else self._pyros_own(call)
        kind.reason = reason
        if not self.fallback:
            raise ContractError(f"this cannot be compiled: {reason}") from error
        self._say(f"goes on through Pyro at step {self._number}", reason)
        return loss

    def _traced(self, call: Call, store: dict[str, Tensor]) -> tuple[Any, Outline, list[tuple[Tensor, Tensor]]]:
        met: list[tuple[Outline, list[tuple[Tensor, Tensor]]]] = []

        def run(*tensors: Tensor) -> list[Tensor]:
            args, kwargs = call.rebuilt(tensors)
            if call.train:
                loss, params, gradients = self._steps.differentiate(args, kwargs, collect=True)
            else:
                loss, params, gradients = Derivatives(self._steps.evaluate(args, kwargs), {}, [])
            leaves, spec = tree_flatten(loss)
            now = pyro.get_param_store()._params
            replaced = [name for name, value in store.items() if now.get(name) is not value]
            if any(name not in now for name in replaced):
                raise ContractError("they take parameters out of the store")
            if self._steps.hooked and self._steps.passes > 1:
                raise ContractError(_SEVERAL_PASSES)
            outline = Outline(leaves, spec, params, [p for p, _ in gradients], replaced, self._steps.passes)
            met.append((outline, gradients))
            values = [now[name].detach() for name in replaced]
            found = [*(x for x in leaves if isinstance(x, Tensor)), *(gradient for _, gradient in gradients), *values]
            return [detach_provenance(x) for x in found]  # wrapped in what says which sites they come from

        with uncounted(self._steps.loss), torch.enable_grad() if call.train else nullcontext():
            traced = trace(run, call.tensors)
        return traced, *met[0]

    # Spot checks

    def _check(self, kind: Kind, graph: Graph, call: Call) -> Any:
        """A step of Pyro's own, with which the graph is compared."""
        randomness = Randomness(call.devices, call.state.snapshot.generators)
        kept = [(x, x.clone()) for x in graph.written]
        mine = graph.attempt(call.tensors)
        put_back(kept)
        randomness.restore()
        theirs = self._pyros_own(call)
        rounded = self.precision == "bfloat16"
        # not for other draws than those that the graph is for
        foreseen = not graph.speculates if isinstance(mine, str) else graph.foreseen(mine)
        graph.misses += not foreseen
        found = difference(graph, mine, theirs, rounded) if foreseen else ""
        if found and graph.compiled:
            after = Randomness(call.devices, call.state.snapshot.generators)
            changed = [(x, x.clone()) for x in graph.written]
            put_back(kept)
            randomness.restore()
            if not difference(graph, graph.attempt(call.tensors, compiled=False), theirs, rounded):
                graph.uncompile()
                warnings.warn(
                    f"inductor's code gives something else than the graph it was made of ({found}), which runs on "
                    "uncompiled, and slower: it is wrong, or draws random numbers in another order",
                    stacklevel=5,
                )
                found = ""
            put_back(changed)
            after.restore()
        if call.train:
            self._steps.update(theirs.params, theirs.gradients)
        if not found and (changed := call.state.snapshot.changed(since=True)):
            found = f"the programs change {changed}"
        if found:
            self._judge(kind, graph, found)
        else:
            graph.checked = self._number
        return theirs.loss

    def _pyros_own(self, call: Call) -> Derivatives:
        """Loss and gradients as Pyro has them, whatever gradients there were."""
        if not call.train:
            return Derivatives(self._steps.evaluate(call.args, call.kwargs), {}, [])
        params = list(pyro.get_param_store()._params.values())
        before = [(p, p.grad) for p in params]
        for p in params:
            p.grad = None
        try:
            loss, params, gradients = self._steps.differentiate(call.args, call.kwargs)
            met = {id(p): p for p in params.values()}  # one tensor may have several names
            met |= {id(p): p for p, _ in before}  # and a backward pass may reach what programs did not meet
            gradients = gradients or [(p, p.grad) for p in met.values() if p.grad is not None]
            for p, _ in gradients:
                p.grad = None
        finally:
            for p, gradient in before:
                p.grad = gradient
        return Derivatives(loss, params, gradients)

    def _judge(self, kind: Kind, graph: Graph, found: str) -> None:
        """A graph is wrong."""
        kind.graphs = [each for each in kind.graphs if each is not graph]
        kind.record = None
        kind.mismatches += 1
        since = f"after step {graph.checked}" if graph.checked else "from its first use on"
        reason = f"its graph gave something else than Pyro {since}, found at step {self._number}: {found}"
        if kind.mismatches > 1:
            kind.reason = reason
        self._say("goes on through Pyro" if kind.reason else "traces anew", reason)

    # Records

    def _recorder(self, graph: Graph, call: Call) -> Record | None:
        tensors = (*graph.trained, *call.tensors, *graph.constants)
        possible = (
            self.cuda_graph
            and call.train
            and not (graph.speculates or graph.replaced or graph.written or graph.exchanges)
            and all(map(Input.is_small, call.tensors))
        )
        if not (possible and graph.trained and all(x.is_cuda for x in tensors)):
            return None
        return Record(graph, lambda result: self._apply(graph, result), self._steps.is_recordable)

    def _recorded(self, record: Record) -> tuple[list[Tensor], tuple] | None:
        """What a record depends on besides the arguments: tensors, and numbers; None if a step differs from it."""
        held = [*record.graph.trained, *record.graph.constants]
        if not record.whole:
            return held, ()
        if not self._steps.is_recordable or any(p.grad is not None for p in self._steps.held):
            return None
        tensors, numbers = self._steps.state_of(record.graph.trained)
        return held + tensors, numbers
