"""What the engine keeps for one model: its guard, its plans, its packed weights.

The state lives in `model.__dict__["_fb_engine"]`. Copies and pickles of a model get an empty one.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import _ext
from . import launches, rules
from .batches import Family
from .candidates import Choices, Refusal
from .convert import convert
from .fuse import fuse
from .graph import Graph, Node
from .guard import ATTRIBUTE, Guard
from .locks import ForkSafeLock
from .lower import lower
from .optimize import has_dynamic_batch
from .plan import Plan
from .program import Program, Uncapturable
from .recipes import Tensors, filter_names
from .run_cpu import STALE, ArenaPool, Runner
from .run_cuda import CudaRunner
from .select import make_plan
from .shortcut import Shortcut, make_shortcut
from .strides import follows_input, true_strides
from .train_program import Program as TrainProgram
from .train_program import Unprogrammed, containers, hooked_among, make_program, results_among
from .weights import WeightStore

MAX_PLANS = 32  # a plan is less than 1 MB: plans of a model share its packed weights and arenas
MAX_FAMILIES = 32  # kinds of images, each in batches of any size
MAX_PROGRAMS = 64  # of train(): a model that changes more often runs its modules
KEPT_PROGRAMS = 4  # for structures that take turns, as of a stage that is in eval() now and then
MAX_FAILURES = 4  # shapes that cannot be captured before the model is taken for one that cannot
FREE_CAPTURES = 64  # from then on one in CALLS_PER_CAPTURE calls may capture, which costs many forwards;
# plans for another batch of what is captured already are not counted
CALLS_PER_CAPTURE = 16

_build_lock = ForkSafeLock()  # one plan at a time, in the whole process

Key = tuple[Any, ...]
AnyRunner = Runner | CudaRunner


def key_of(plain: MethodType, x: Tensor) -> Key:
    """What a plan is made for, besides the model. The precision comes last."""
    kind = x.dtype if x.is_cpu else (x.dtype, x.device)
    return tuple(x.shape), x.stride(), kind, plain.__func__, allowed_precision(x)


def family_of(key: Key) -> Key:
    """What plans for different batches have in common."""
    shape, stride, kind, function, _ = key
    return shape[1:], stride[1:], kind, function


def allowed_precision(x: Tensor) -> str | launches.Arithmetic:
    """As torch.set_float32_matmul_precision understands it; bfloat16 allows what "medium" does."""
    if x.is_cuda:
        return allowed_on_gpu()
    if x.dtype is torch.bfloat16:
        return "medium"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch's newer interface, which this one cannot express
        return "highest"


def allowed_on_gpu() -> launches.Arithmetic:
    """As PyTorch's switches stand."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    tf32 = (switch.fp32_precision == "tf32" for switch in switches)
    return launches.Arithmetic(*tf32, same_bits=torch.are_deterministic_algorithms_enabled())


class Runners(OrderedDict[Key, AnyRunner]):
    """Of one model, the least recently used first; and the shortcut of the last call.

    Both in one object: a thread that comes back from an old plan cannot put its shortcut beside new ones.
    """

    shortcut: Shortcut | None = None


class EngineState:
    """Plans of one model, the least recently used first. `of(model)` finds or makes it."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.owner = weakref.ref(model) if model is not None else None
        self.guard: Guard | None = None
        self.refusal: str | None = None  # about the whole model, as long as the guard holds
        self.store: WeightStore | None = None
        self.runners = Runners()
        self.arenas = ArenaPool()
        self.families: OrderedDict[Key, Family] = OrderedDict()  # the least recently used first
        self.failures: dict[Key, str] = {}
        self.choices: Choices = {}  # what fb.tune has measured
        self.warned = False
        self.captures = 0
        self.trained: tuple[TrainProgram | Unprogrammed, ...] = ()  # for train(), the last one first
        self.programs = 0  # made so far
        self.calls = 0  # roughly: threads may overwrite each other's count

    def __deepcopy__(self, memo: Any) -> EngineState:
        return EngineState()

    def __reduce__(self) -> Any:
        return EngineState, ()

    @staticmethod
    def of(model: nn.Module) -> EngineState:
        """The model's state. A shallow copy of a module shares what its __dict__ holds; it gets its own."""
        state = model.__dict__.get(ATTRIBUTE)
        if state is None or state.owner is None or state.owner() is not model:
            with _build_lock:
                state = model.__dict__.get(ATTRIBUTE)
                if state is None or state.owner is None or state.owner() is not model:
                    state = model.__dict__[ATTRIBUTE] = EngineState(model)
        return state

    def forward(self, model: nn.Module, plain: MethodType, x: Tensor) -> Any:
        """plan(x) where there is a plan, else plain(x).

        A plan at hand is started before it is known to be up to date: the guard reads cold memory for half a
        millisecond, and the other threads can compute meanwhile. A plan has its own copies of the weights and
        its own memory, so a wrong start costs time and nothing else.
        """
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # its replays outlive the plan's weights
                return plain(x)
            found = self.runner(model, plain, x)
            return plain(x) if isinstance(found, str) else found(x)
        key = key_of(plain, x)
        runner, result = self.runners.get(key), STALE
        if runner is not None and self.refusal is None and not runner.guard.wants_grad():
            guard = runner.guard
            result = runner(x, lambda: guard.same_structure(model) and guard.same_weights())
        if runner is None or result is STALE:
            found = self.runner(model, plain, x)
            if isinstance(found, str):
                return plain(x)
            runner, result = found, found(x)
        else:
            self.calls += 1
            self._touch(key)
        if runner.shortcut is None:
            runner.shortcut = make_shortcut(runner, plain, x, key[-1])
        runners = self.runners
        if runners.get(key) is runner:
            runners.shortcut = runner.shortcut
        return result

    def training(self, model: nn.Module, plain: MethodType) -> TrainProgram | str:
        """The steps of the model in train(), made if need be; or why its modules run."""
        known = self.trained
        program = next((one for one in known if one.guard.same_structure(model)), None)
        if program is None:
            if (reason := hooked_among(containers(model))) is not None:  # tracing would call them
                return reason
            if (reason := results_among(model)) is not None:
                return reason
            if self.programs >= MAX_PROGRAMS:
                return f"{MAX_PROGRAMS} programs were made: the model changes too often"
            with _build_lock:
                if self.trained is known:  # else another thread has just made one
                    self.programs += 1
                    made = make_program(model, plain)
                    held = {id(tensor) for tensor in made.guard.every}  # others keep replaced layers alive
                    older = [one for one in known if {id(t) for t in one.guard.every} == held]
                    self.trained = (made, *older[: KEPT_PROGRAMS - 1])
                program = self.trained[0]
        return program.ready()

    def runner(self, model: nn.Module, plain: MethodType, x: Tensor) -> AnyRunner | str:
        """The plan for this call, made if need be; or the sentence why there is none."""
        key = key_of(plain, x)
        self.calls += 1
        guard = self.guard
        if guard is not None and guard.same_structure(model):
            if self.refusal is not None:
                if guard.same_kinds():
                    return self.refusal
            elif not guard.wants_grad() and guard.same_weights():
                runner = self.runners.get(key)
                if runner is not None:
                    self._touch(key)
                    return runner
        with _build_lock:
            return self._find_or_make(model, plain, x, key)

    def _touch(self, key: Key) -> None:
        try:
            self.runners.move_to_end(key)
        except KeyError:  # another thread has just evicted it
            return

    def _find_or_make(self, model: nn.Module, plain: MethodType, x: Tensor, key: Key) -> AnyRunner | str:
        self._renew(model)
        if self.refusal is not None:
            return self.refusal
        assert self.guard is not None and self.store is not None
        if self.guard.device not in (None, x.device):
            return f"the input is on {x.device}, the model on {self.guard.device}"
        if self.guard.wants_grad():
            return rules.GRAD
        if key in self.runners:
            return self.runners[key]
        family = self.family(model, key)
        known = family.knows(x.shape[0])
        hesitation = self._hesitation(key, known)
        if hesitation is not None:
            return hesitation
        self.captures += not known
        try:
            return self._add(key, trace(model, plain, x, launches.refusal if x.is_cuda else None, family))
        except Uncapturable as error:
            return self._failed(model, key, str(error))

    def family(self, model: nn.Module, key: Key) -> Family:
        """Of the plan for `key` and those for other batches."""
        with _build_lock:
            name = family_of(key)
            family = self.families.setdefault(name, Family(has_dynamic_batch(model)))
            self.families.move_to_end(name)
            while len(self.families) > MAX_FAMILIES:
                self.families.popitem(last=False)
            return family

    def _add(self, key: Key, traced: Traced) -> AnyRunner:
        """The plan for this key. Raises Uncapturable."""
        assert self.store is not None and self.guard is not None
        plan = make_for_gpu(traced) if traced.x.is_cuda else make(traced, key[-1], self.choices)
        start = perf_counter()
        runner = self._bound(plan, key, self.guard, self.store)
        plan.seconds["pack"] = perf_counter() - start
        self.runners[key] = runner
        while len(self.runners) > MAX_PLANS:
            self.runners.popitem(last=False)
        return runner

    def _bound(self, plan: Plan, key: Key, guard: Guard, store: WeightStore) -> AnyRunner:
        if plan.on_gpu:
            _, _, (dtype, device), _, allowed = key
            return CudaRunner(plan, guard, store, dtype, device, allowed)
        return Runner(plan, guard, store, self.arenas)

    def choose(self, choices: Choices, key: Key, traced: Traced) -> None:
        """From now on plans compute each layer by the algorithm that is named here, if any is. The plan for
        `key` is made of what is traced already."""
        with _build_lock:
            self.choices = {**self.choices, **choices}
            self.runners = Runners()
            if self.guard is not None and self.store is not None:  # what no plan will use any more goes
                self.store = WeightStore(self.guard.native, Tensors(self.guard.aliases))
                self._add(key, traced)

    def _hesitation(self, key: Key, known: bool) -> str | None:
        """Why this call gets no plan now. known: whether it is captured already, for another batch."""
        if key in self.failures:
            return self.failures[key]
        if len(self.failures) >= MAX_FAILURES and not self.runners:
            return next(iter(self.failures.values()))
        if known or self.captures < max(FREE_CAPTURES, self.calls // CALLS_PER_CAPTURE):
            return None
        return (
            f"{self.captures} plans in {self.calls} calls: shapes or attributes of the model change too often"
        )

    def _failed(self, model: nn.Module, key: Key, reason: str) -> str:
        if not self.warned:
            self.warned = True
            warnings.warn(f"{type(model).__name__} runs its modules, without a plan: {reason}", stacklevel=6)
        self.failures[key] = reason
        return reason

    def _renew(self, model: nn.Module) -> None:
        """Bring guard, refusal and weights up to date; plans survive when only values have changed."""
        old, runners = self.guard, self.runners
        structure = old is not None and old.same_structure(model)
        if old is not None and structure and self._same_tensors(old):
            return
        guard = Guard(model, _ext.require())
        refusal = rules.structure_refusal(model)
        store, same = None, False
        if refusal is None:
            guard.take_weights()
            store = WeightStore(guard.native, Tensors(guard.aliases))
            same = (
                structure and self.refusal is None and old is not None and old.geometry() == guard.geometry()
            )
        kept = Runners()
        if same and store is not None:
            for key, runner in runners.items():
                kept[key] = self._bound(runner.plan, key, guard, store)
        else:
            self.failures, self.families = {}, OrderedDict()
        # Who still finds an old plan asks the guard that it was made under, which says no.
        self.refusal, self.store, self.runners, self.guard = refusal, store, kept, guard

    def _same_tensors(self, guard: Guard) -> bool:
        """As far as it matters: a refused model may have tensors whose values the guard cannot read."""
        return guard.same_kinds() if self.refusal is not None else guard.same_weights()


@dataclass
class Traced:
    """A model on one input, captured and fused: what plans are made from, whatever kernels they choose."""

    graph: Graph
    rewrites: dict[str, int]
    x: Tensor
    tensors: Mapping[str, Tensor]
    follows_input: bool
    seconds: dict[str, float]


def trace(
    model: nn.Module,
    plain: MethodType,
    x: Tensor,
    refusal: Refusal | None = None,
    family: Family | None = None,
) -> Traced:
    """Capture and fuse. Raises Uncapturable.

    refusal: of the kernels that will run it, the native library's if None. family: knows what was captured
    of this forward with other batches.
    """
    with _build_lock:
        start = perf_counter()
        program = (family or Family()).program(model, plain, x)
        captured = perf_counter() - start

        def see_strides(graph: Graph) -> None:
            true_strides(graph, plain, x)

        found = fused(program, x, dict(rules.named_tensors(model)), see_strides, refusal)
    found.seconds["capture"] = captured
    return found


def fused(
    program: Program,
    x: Tensor,
    tensors: Mapping[str, Tensor],
    see_strides: Callable[[Graph], None],
    refusal: Refusal | None = None,
) -> Traced:
    """A captured program for inputs like x, fused. see_strides gives what the graph returns the strides that
    it has in eager. Raises Uncapturable."""
    start = perf_counter()
    graph = convert(program)
    if x.dtype is not torch.float32:
        check_results(graph)
    if x.is_cuda:
        check_inside(graph, x.dtype)
    see_strides(graph)
    follows = follows_input(graph)
    rewrites = fuse(graph, refusal or _ext.require().refusal)
    return Traced(graph, rewrites, x, tensors, follows, {"capture": 0.0, "fuse": perf_counter() - start})


def make(traced: Traced, precision: str = "highest", choices: Choices | None = None) -> Plan:
    """Choose and place. Raises Uncapturable. The plan's `seconds` tells what each part took.

    A model in bfloat16 gets a plan in float32 with products of bfloat16; what it returns is rounded.
    """
    start = perf_counter()
    x, graph = traced.x, traced.graph
    plan = make_plan(graph, x.is_contiguous(), _ext.require().refusal, precision, choices)
    plan.narrow = x.dtype is torch.bfloat16
    check_types(plan, x.dtype, traced.tensors)
    if plan.narrow:
        check_kernels(plan)
    plan.shows_input, plan.follows_input = graph.shows_input, traced.follows_input
    lower(plan)
    plan.rewrites = traced.rewrites
    plan.seconds = {**traced.seconds, "place": perf_counter() - start}
    return plan


def make_for_gpu(traced: Traced) -> Plan:
    """The same for kernels of a GPU: maps in the model's own type, the whole batch at once."""
    start = perf_counter()
    plan = make_plan(traced.graph, traced.x.is_contiguous(), launches.refusal)
    check_types(plan, traced.x.dtype, traced.tensors)
    plan.on_gpu = True
    plan.shows_input, plan.follows_input = traced.graph.shows_input, traced.follows_input
    launches.lower_whole(plan)
    plan.rewrites = traced.rewrites
    plan.seconds = {**traced.seconds, "place": perf_counter() - start}
    return plan


def check_types(plan: Plan, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> None:
    """Convolutions and linear layers of mixed types raise in eager PyTorch; norms may be float32."""
    if dtype is torch.float32:
        used = set(tensors)
    else:
        recipes = [recipe for step in plan.steps for recipe in step.recipes.values()]
        used = set().union(*(filter_names(recipe, plan.computed) for recipe in recipes))
    for name in sorted(used):
        if tensors[name].is_floating_point() and tensors[name].dtype is not dtype:
            raise Uncapturable(f"{name} is {tensors[name].dtype}, and the input {dtype}")


def check_results(graph: Graph) -> None:
    """What a plan for a model in 16 bits returns is rounded to its type."""
    name = str(graph.input.narrow).removeprefix("torch.")
    if graph.shows_input:
        raise Uncapturable(f"the result shows the memory of the input, and the model is in {name}")
    for output in graph.outputs:
        if isinstance(output, Node) and output.narrow is None:
            raise Uncapturable(f"{output.label} is not {name}, and the model is")


def check_inside(graph: Graph, dtype: torch.dtype) -> None:
    """On a GPU all maps have the model's own type."""
    for node in graph.nodes:
        if (
            node.dtype is not None
            and node.dtype.is_floating_point
            and (node.narrow or node.dtype) is not dtype
        ):
            raise Uncapturable(f"{node.label} is {node.dtype}, and the model {dtype}")


def check_kernels(plan: Plan) -> None:
    """PyTorch calls expect the types that the model has."""
    for step in plan.steps:
        if not step.native:
            raise Uncapturable(f"{step.name or step.op} has no kernel, and the model is in bfloat16")
