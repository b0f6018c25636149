"""Laws of training: what a step changes, how a run is resumed, and that recomputation changes no gradient."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from minilora.testing.compare import Array, Bounded, as_array
from minilora.testing.laws import CheckFailure, Comparison, Law, Report, claim
from minilora.testing.sequence_laws import near

__tracebackhide__ = True  # pytest shows the line that calls this module
STATEMENT = "a step changes every parameter that is meant to be trained, and nothing else"
HAD_GRADIENT = (
    "its gradient was not 0: the optimizer does not have it, its learning rate is 0, the gradient was cleared before "
    "the step, the step was skipped, or the change is rounded away"
)
Read = Callable[[], Mapping[str, Any]]
Arrays = Mapping[str, Bounded]


def check_trains_everything(
    model: nn.Module | Read,
    step: Callable[[], Any],
    trained: Iterable[str] | None = None,
    steps: int = 2,
    loss: Callable[[], Any] | None = None,
) -> Report:
    """Check that training steps change every parameter that is meant to be trained, and nothing else.

    Two steps, because LoRA's A has no gradient in the first one, where B = 0. In each step a parameter that gets a
    gradient has to change, in each number that gets one, and first against the gradient, which starts from zero.
    Dtypes, frozen weights and buffers stay as they were, except the statistics of batch norms that are trained.
    Arrays of other libraries have no gradients here: one that is updated in part, or along its gradient, is not seen,
    except by the loss. Clipping, schedules and the optimizer's rule have no check.

    Args:
        model: any module; or, for other libraries, a function that returns its arrays by name.
        step: one step on a batch: forward, backward and an optimizer step whose learning rate is not 0.
        trained: names of what is meant to be trained, as `named_parameters` has them; by default what requires a
            gradient. For arrays it must be given.
        steps: how many steps are made.
        loss: returns the loss of the batch, a number; if given, it has to be lower after the steps than before.

    Raises:
        CheckFailure: something kept its value, changed without being meant to, or is not finite; each with its cause
            as far as it shows.
        ValueError: `trained` is missing, empty, or has a name that the model does not have.
    """
    parameters = named(model)
    if trained is None:
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    meant = set(trained or ())
    before = start = snapshot(model, meant)
    if unknown := sorted(meant - set(before)):
        raise ValueError(f"trained: the model has no {unknown[0]!r}; it has {', '.join(before)}")
    if not meant:
        raise ValueError("trained: found no name; accepted are one or more")
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    traces = {name: Trace(torch.finfo(dtypes.get(name, torch.float32)).eps) for name in sorted(meant)}
    first = float(loss()) if loss else 0.0
    for number in range(1, steps + 1):
        with ExitStack() as hooks:
            for name, own in named(model).items():
                if name in traces and own.requires_grad and own.is_leaf:
                    hooks.enter_context(own.register_hook(partial(traces[name].note, own)))
            step()
        after = snapshot(model, meant)
        noise = 1e-5 * max(np.max(abs(trace.sum), initial=0.0) for trace in traces.values())
        for name, trace in traces.items():
            if name in after and after[name].shape == before[name].shape:
                trace.add(number, before[name], after[name], noise)
        before = after
    reasons = {name: change_of(name, old, after.get(name), traces.get(name), parameters) for name, old in start.items()}
    for name, own in named(model).items():
        if own.dtype != dtypes.get(name, own.dtype):
            reasons[name] = f"its dtype was {dtypes[name]}, and is {own.dtype}"
    if loss and not (last := float(loss())) < first:
        hint = ": is it ascended?" if last > first else ""
        reasons["the loss"] = f"it was {first:.6g} before the steps, and is {last:.6g}{hint}"
    if problems := [f"  {name}: {reason}" for name, reason in reasons.items() if reason]:
        title = f"trains-everything: {len(problems)} of {len(start)} tensors are wrong"
        raise CheckFailure("\n".join([title, f"  law: {STATEMENT}", *problems]), "trains-everything", None)
    return Report("trains-everything", STATEMENT, 0.0, len(start))


def change_of(
    name: str, old: Array, new: Array | None, trace: "Trace | None", parameters: Mapping[str, nn.Parameter]
) -> str:
    """Say what is wrong with the change of a tensor, which has a trace if it is meant to be trained; or ""."""
    if new is None:
        return "gone after the step"
    if not np.isfinite(new).all() and np.isfinite(old).all():
        return "not finite after the step"
    if trace is None:
        return "" if np.array_equal(old, new, equal_nan=True) else f"changed; {why_changed(parameters, name)}"
    if np.array_equal(old, new):
        return f"unchanged; {why_unchanged(parameters.get(name), trace.has_gradient)}"
    if trace.has_gradient is False:
        return f"changed only by weight decay or momentum; {why_unchanged(parameters.get(name), False)}"
    return trace.wrong_at_last(old)


def named(model: nn.Module | Read) -> dict[str, nn.Parameter]:
    """Return the parameters of a module, a shared one under each of its names; none of arrays."""
    return dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}


def snapshot(model: nn.Module | Read, meant: set[str]) -> dict[str, Any]:
    """Return copies of all parameters and buffers, except the statistics of batch norms that are trained."""
    if not isinstance(model, nn.Module):
        return {name: np.array(array) for name, array in model().items()}
    norms = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and (not module.affine or {f"{path}.{name}" for name in ("weight", "bias")} & meant)
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[0] not in norms}
    copies = {name: tensor.detach().cpu().clone() for name, tensor in {**named(model), **buffers}.items()}
    return {name: (own.double() if own.is_floating_point() else own).numpy() for name, own in copies.items()}


@dataclass
class Trace:
    """What the steps so far did to a parameter."""

    unit: float = 0.0  # rounding of its dtype
    sum: Any = 0.0  # of the gradients that came in this step
    came: bool = False  # whether any did
    was_there: bool = False  # a gradient before them
    problem: str = ""  # the first that a step shows
    idle: int = 0  # a step that left it as it was, in spite of a gradient
    has_gradient: bool | None = None  # other than 0; None if none came
    gradient: Any = 0.0  # the largest |gradient| of each number
    moved: Any = False  # each number, in a step
    units: float = 0.0  # by how many units the numbers of a step moved
    slope: float = np.inf  # by how many times its gradient each number moved at least

    def note(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Take a gradient of this step into account."""
        if not self.came:
            self.was_there = parameter.grad is not None and bool(parameter.grad.any())
        self.sum, self.came = self.sum + as_array(gradient.to_dense() if gradient.is_sparse else gradient), True

    def add(self, number: int, old: Array, new: Array, noise: float) -> None:
        """Take the end of a step into account; a gradient below the noise is one of 0 that is rounded."""
        moves = old != new
        self.moved = self.moved | moves
        if not self.came:
            return
        self.has_gradient = bool(self.has_gradient or self.sum.any())
        own = np.where(abs(self.sum) > noise, self.sum, 0.0)
        self.sum, self.came = 0.0, False
        is_first, self.gradient = not np.any(self.gradient), np.fmax(self.gradient, abs(own))
        if moves.any():
            with np.errstate(divide="ignore"):
                moved_by = abs(new - old)[moves] / (self.unit * abs(old)[moves])
            self.units = max(self.units, float(np.median(moved_by)))
            if (led := moves & (own != 0) & np.isfinite(new)).any():
                self.slope = min(self.slope, float(np.min(abs(new - old)[led] / abs(own)[led])))
            if own.any() and is_first:
                self.problem = self.problem or contradiction(old, new, own)
        elif own.any():
            self.idle = number
        if own.any() and number > 1 and self.was_there:
            self.problem = f"in step {number} its gradient was added to that of the step before: zero it"

    def wrong_at_last(self, old: Array) -> str:
        """Say what is wrong after all steps; or "". What moves by a few units only may stay because of rounding."""
        has_gradient = self.moved & (self.gradient > 0)
        if self.problem or self.units < 8 or not has_gradient.any():
            return self.problem
        if self.idle:
            return f"unchanged in step {self.idle}; {HAD_GRADIENT}"
        stays = ~self.moved & (self.slope * self.gradient > 64 * self.unit * abs(old))
        found = f"unchanged in {stays.sum()} of {old.size} numbers, whose gradients would move them"
        return found if 1000 * stays.sum() > old.size else ""  # a few may stay by chance


def contradiction(old: Array, new: Array, gradient: Array) -> str:
    """Say how a first change contradicts the gradient, except that weight decay moves numbers towards 0; or ""."""
    change, weight = new - old, abs(gradient)
    grows = (change != 0) & (change * old >= 0)
    if weight[grows & (change * gradient > 0)].sum() > 0.75 * weight[grows].sum():
        return "it moved along its gradient, and not against it: the loss is ascended"
    shrinks = old * gradient < 0  # and should grow
    if not grows.any() and weight[shrinks].sum() > weight.sum() / 8 and np.ptp(abs(old)) > 0:
        ratios, slopes = (own[old != 0] / old[old != 0] for own in (new, gradient))
        if np.ptp(ratios) < 1e-6 < abs(1 - ratios.mean()) * np.ptp(slopes):  # that of a decay below 1 would show
            return "changed only by weight decay; its gradient was not 0, but was lost before the optimizer's step"
    return ""


def why_unchanged(parameter: nn.Parameter | None, has_gradient: bool | None) -> str:
    """Say what is known of a tensor that was not trained."""
    if parameter is None:
        return "no step wrote to it"
    if not parameter.requires_grad:
        return "it is frozen: requires_grad is False"
    if has_gradient is None:
        return (
            "no gradient came to it: the forward pass does not use it, or uses a copy, or the graph is cut "
            "(no_grad, detach, checkpointing of inputs that require no gradient)"
        )
    if not has_gradient:
        return "its gradient was exactly 0: what multiplies it is 0, as by one that is stuck, or no token reached it"
    return f"{HAD_GRADIENT} in {parameter.dtype}"


def why_changed(parameters: Mapping[str, nn.Parameter], name: str) -> str:
    """Say what is known of a tensor that changed though it is not meant to."""
    parameter = parameters.get(name)
    if parameter is None:
        return "it is not meant to be trained"
    if not parameter.requires_grad:
        return "it is frozen, and something wrote to it in place: a merge, or an optimizer that decays weights"
    if others := [other for other, tensor in parameters.items() if tensor is parameter and other != name]:
        return f"it is tied: one tensor with {others[0]}"
    return "it requires a gradient, though it is not named as trained"


# --- stopped and resumed, recomputed ---


@dataclass(frozen=True)
class Stops:
    """A run of `total` steps that stops after each of `stops`, and is resumed from its files."""

    stops: tuple[int, ...] = (2,)
    total: int = 4


def resumed(run: Callable[[Path, int, int], Any], case: Stops) -> Iterator[Comparison]:
    steps = list[int]()
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    with hook, tempfile.TemporaryDirectory() as folder:

        def arrays(name: str, stop: int, seed: int = 0) -> dict[str, Bounded]:
            steps.clear()
            path = Path(folder, name)
            path.mkdir(exist_ok=True)
            return seeded(seed, run, path, stop, case.total)

        whole = arrays("whole", case.total)
        made = len(steps)  # 0 without an optimizer of PyTorch
        yield from equal("of a second run", arrays("again", case.total), whole)
        found = arrays("stopped", case.stops[0])
        if all(np.array_equal(found[name].value, own.value) for name, own in whole.items()):
            raise AssertionError(f"found the same after {case.stops[0]} and {case.total} steps: nothing is trained")
        for last, stop in pairwise((*case.stops, case.total)):
            found = arrays("stopped", stop, seed=stop)  # another process has other random numbers
            too_many = (len(steps) - 1) * case.total > made * (stop - last + 1)  # one may restore an optimizer's state
            problem = f"found {len(steps)} optimizer steps from {last} to {stop}, and {made} in a whole run"
            yield claim("the number of steps", problem if too_many else "")
        yield from equal("of a resumed run", found, whole)


def seeded(seed: int, function: Callable[..., Any], *arguments: Any) -> dict[str, Bounded]:
    """Return copies of the arrays of a mapping, a list or a single one, as what others have to be near."""
    torch.manual_seed(seed)
    result = function(*arguments)
    if not isinstance(result, Mapping):
        result = dict(enumerate(result if isinstance(result, list | tuple) else [result]))
    return {str(name): near(as_array(own).copy(), own) for name, own in result.items()}


def equal(when: str, found: Arrays, right: Arrays, is_exact: bool = True) -> Iterator[Comparison]:
    names = f"found {', '.join(found)}; accepted are {', '.join(right)}"
    yield claim(f"the names {when}", "" if found.keys() == right.keys() else names)
    for name, own in right.items():
        yield Comparison(f"{name} {when}", found[name].value, own.value if is_exact else own)


def recomputed(gradients: Callable[[bool, int], Any], case: None) -> Iterator[Comparison]:
    for seed in range(3):
        run = partial(seeded, seed, gradients)
        (plain, kept), (again, _) = (counted(run, False, seed) for _ in range(2))
        state = torch.get_rng_state()
        ours, less = counted(run, True, seed)
        if not any(own.value.any() for own in plain.values()):
            raise AssertionError("found 0 for all gradients")
        yield from equal("when computed twice", again, plain, is_exact=False)
        yield from equal("with recomputation", ours, plain, is_exact=False)
        yield Comparison("PyTorch's random state after recomputation", torch.get_rng_state(), as_array(state))
        found = f"found {less} numbers, and {kept} without recomputation: it saves nothing"
        yield claim("what is kept for the backward pass", found if 0 < kept <= less else "")


def counted(run: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """Return a result, and how many numbers autograd has kept when a backward pass begins, 0 without autograd."""
    kept, at_begin = list[int](), list[int]()

    def pack(own: Tensor) -> Tensor:
        kept.append(own.numel())
        return own

    def unpack(own: Tensor) -> Tensor:
        at_begin.append(sum(kept))
        return own

    with saved_tensors_hooks(pack, unpack):
        result = run(*arguments)
    return result, at_begin[0] if at_begin else sum(kept)


_STOPS = [Stops(), Stops((1,)), Stops((3,), 5), Stops((1, 2, 4), 6), Stops((9, 12), 13)]
LAWS = (
    Law("resume", "exact", "k steps, saved, loaded, and k more are 2k steps, bit for bit", _STOPS, resumed),
    Law("recompute", "gradients", "it changes no gradient, dropout included, and keeps less", [None], recomputed),
)
