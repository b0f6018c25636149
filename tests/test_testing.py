"""The public checks: right implementations pass them, and wrong ones are refused with their mistake."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats
from torch import nn

from minilora.cli.selftest import implementations
from minilora.testing import (
    AdaptedLinear,
    Bounded,
    CheckFailure,
    assert_maths,
    cases,
    check,
    check_accumulation,
    check_lora_linear,
    check_merge,
    laws,
    on_numpy,
    parametrize_laws,
    reference,
)
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.compare import UNITS, as_array, worst
from minilora.testing.implementations import Linear4bit, LoRALayer, accumulated_gradient, merge
from minilora.testing.layer_mistakes import lora, with_formula
from minilora.testing.lora_laws import linear_cases
from minilora.testing.strategies import WEIGHT_KINDS, adapted_linears
from tests.adapters import dora_stretched
from tests.models import long, randn
from tests.right_layers import DoraOfDifferences, closure

DTYPES = tuple(UNITS)
METHODS = ("lora", "dora")
LORA = CATALOGUE["lora"]


def causes_of(law, implementation):
    with pytest.raises(CheckFailure) as caught:
        law.check(implementation)
    return caught.value.causes


def test_a_merge_with_a_magnitude_passes():
    assert check_merge(merge, use_dora=True)[0].law == "merge_dora-weight"


def plain(W, b, A, B, alpha):
    return lambda x: x @ W.T + alpha / len(A) * (x @ A.T) @ B.T + (0 if b is None else b)


def test_numpy_layers_are_checked_too():
    reports = {report.law: report for report in check_lora_linear(on_numpy(plain))}
    assert reports["lora-forward"].checked
    assert not reports["lora-dropout"].checked
    assert str(reports["lora-dropout"]).split()[1] == "–"
    with pytest.raises(CheckFailure, match="likely cause: the scale is α·r\n"):
        check_lora_linear(on_numpy(lambda W, b, A, B, alpha: plain(W, b, A, B, alpha * len(A) ** 2)))


def test_what_is_wrong_of_many_ranks_alone_is_refused():
    with pytest.raises(CheckFailure, match="lora-forward"):
        laws("lora")["forward"].check(lambda W, b, A, B, alpha: plain(W, b, A[:32], B[:, :32], alpha))


def test_sizes_of_ones_own_are_tried_as_well_and_only_of_layers():
    def wrong_from_700_features_on(W, A, B, scale):
        return merge(W, A, B, scale if W.size(1) < 700 else 0 * scale)

    check(wrong_from_700_features_on, "merge")
    with pytest.raises(CheckFailure, match=r"W \(8, 800\)"):
        check(wrong_from_700_features_on, "merge", sizes=[(800, 8, 2)])
    with pytest.raises(ValueError, match="sizes: laws of 'nf4' have no sizes"):
        check(merge, "nf4", sizes=[(800, 8, 2)])


class Holder(nn.Module):
    """A layer that keeps what it is given, as attributes that are no parameters."""

    def __init__(self, *given):
        super().__init__()
        self.given = given

    def forward(self, x):
        return plain(*self.given)(x)


def test_a_layer_that_hides_a_copy_of_the_weight_is_refused():
    class Transposed(Holder):
        def __init__(self, W, *rest):
            super().__init__(W, *rest)
            self.weight = nn.Parameter(W.T.contiguous(), requires_grad=False)
            self.given = (self.weight.T, *rest)

    class Stale(Holder):
        def __init__(self, W, *rest):
            super().__init__(W.clone(), *rest)
            self.weight = nn.Parameter(W, requires_grad=False)

    updates = laws("lora")["updates"]
    updates.check(Transposed)
    updates.check(lambda W, *rest: Holder(W.clone(), *rest))  # W is no registered tensor, so it cannot be changed
    with pytest.raises(CheckFailure, match="y after W was doubled in place as well: wrong"):
        updates.check(Stale)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("shapes", lambda layer, x: layer(x.view(-1, x.size(-1))).view(*x.shape[:-1], layer(x).size(-1))),
        ("16-bit", lambda layer, x: layer(x).float()),
    ],
)
def test_a_layer_that_takes_no_view_or_returns_another_dtype_is_refused(law, wrong):
    for kind, right in (("lora", LoRALayer), ("linear4bit", Linear4bit)):
        with pytest.raises(CheckFailure, match=r"view size is not compatible|the dtype of y: wrong"):
            laws(kind)[law].check(with_formula(right, wrong))


def test_a_failure_names_place_bound_smallest_case_cause_and_repetition():
    broken = LORA["the scale is α·r"]
    with pytest.raises(CheckFailure) as caught:
        check_lora_linear(broken)
    failure = caught.value
    assert failure.law == "lora-forward"
    assert failure.causes == ("the scale is α·r",)
    assert failure.case.r == 2  # with a rank of 1 there is no difference
    message = str(failure)
    for part in ("at [", "expected", "allowed error", "error/bound", "smallest failing case: x (2, 2), W (2, 2)"):
        assert part in message
    lines = message.partition("to repeat:\n")[2].splitlines()
    assert len(lines) == 3
    case = AdaptedLinear(inner=2, outer=2, scale=0.625, seed=4, mode="eval")
    assert repr(case) == repr(failure.case)
    with pytest.raises(CheckFailure, match="in 1 of 1 cases"):
        laws("lora")["forward"].check(broken, case)


def test_an_exception_and_a_wrong_shape_are_failures_like_others():
    with pytest.raises(CheckFailure, match="KeyError: 'missing'") as caught:
        check_lora_linear(lambda W, b, A, B, alpha: {}["missing"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(CheckFailure, match="the shape is"):
        check_lora_linear(lora(lambda self, x: self(x)[..., :0]))


def test_a_known_deviation_must_be_there_still():
    wrong = parametrize_laws("lora", known={"lora-forward": "the bias is added twice"})
    right = next(law for law in wrong.args[1] if law.name == "forward")
    assert right.check(LORA["the bias is added twice"]).ratio == float("inf")
    with pytest.raises(CheckFailure, match="no longer there"):
        right.check(LoRALayer)
    with pytest.raises(CheckFailure, match="the update is missing"):  # another mistake than the known one
        right.check(LORA["the update is missing"])
    with pytest.raises(ValueError, match="no law 'lora-forwards'"):
        parametrize_laws("lora", known={"lora-forwards": ""})
    with pytest.raises(ValueError, match="no laws of 'lorra'"):
        laws("lorra")


def test_the_product_of_the_base_may_be_what_it_gives_less_its_bias():
    case = AdaptedLinear("dora", (1,), inner=1, outer=6, r=6, seed=1, dtype="bfloat16", weight="huge_ratio")
    laws("dora")["gradients"].check(DoraOfDifferences, case)


def test_the_update_may_be_added_to_the_base_product_by_product():
    case = AdaptedLinear(
        lead=(1,), inner=8, r=8, outer=1, has_bias=False, seed=1723, dtype="float32", weight="huge_ratio"
    )
    laws("lora")["gradients"].check(implementations(torch.device("cpu"))["lora"], case)


@given(adapted_linears(methods=METHODS, weights=WEIGHT_KINDS))
def test_right_results_are_those_of_loops(case):
    tensors, rows = (case.W, case.A, case.B, case.scale), (case.rows, case.dy_rows)
    merged = reference.lora_merged_weight(*tensors)
    if case.method == "dora":
        merged = dora_stretched(merged, merged, case.magnitude)
        gradients = reference.dora_gradients(*rows, *tensors, case.magnitude)
        y = case.rows @ merged.T + (0 if case.b is None else case.b)
    else:
        gradients = reference.lora_gradients(*rows, case.A, case.B, case.scale)
        y = reference.lora_forward(case.rows, case.W, case.b, *tensors[1:])
    results = merged, y.reshape(case.y.value.shape), (case.dy_rows @ merged).reshape(case.x.shape), *gradients
    for result, right in zip(results, (case.merged, case.y, *case.gradients.values()), strict=True):
        assert_maths(result, right)


@given(adapted_linears(dtypes=DTYPES))
def test_a_bound_is_a_few_units_of_what_is_summed(case):
    magnitude = abs(case.rows) @ abs(case.W.T) + abs(case.rows) @ abs(case.A.T) @ abs(case.B.T) * case.scale
    magnitude += 0 if case.b is None else abs(case.b)
    units = 40 * (case.inner + case.r) * UNITS[case.dtype]
    assert (case.y.error.reshape(magnitude.shape) <= units * magnitude + 1e-40).all()


@pytest.mark.parametrize("is_flushed", [False, True])
def test_denormal_numbers_may_be_replaced_by_zero(is_flushed):
    x, W = randn(1, 3, 33, dtype=torch.float32), 1e-40 * randn(2, 33, 4, dtype=torch.float32)
    expected = Bounded.exact(as_array(x), "float32") @ Bounded.exact(as_array(W), "float32")
    assert worst(0 * (x @ W) if is_flushed else x @ W, expected)[0] <= 1
    assert worst(as_array(1e6 * x @ W), expected)[0] > 1


@given(floats(-80, 0))
def test_an_exponential_may_be_a_power_of_two(v):
    v = np.float32(v)
    power = torch.exp2(torch.tensor(v) * torch.tensor(np.log2(np.e), dtype=torch.float32))
    assert worst(power, Bounded.exact(v, "float32").exp())[0] <= 1


@pytest.mark.parametrize("make", [Holder, closure])
def test_trained_tensors_are_found_wherever_a_layer_keeps_them(make):
    for name in ("gradients", "frozen", "updates"):
        assert laws("lora")[name].check(make).checked


@pytest.mark.parametrize("result", [None, "abc", {}, iter([])])
def test_what_is_no_array_is_a_failure_and_no_accident(result):
    with pytest.raises(CheckFailure, match=f"found {type(result).__name__}, expected an array"):
        check_lora_linear(lambda W, b, A, B, alpha: lambda x: result)
    with pytest.raises(CheckFailure, match="found tuple, expected an array"):
        check_lora_linear(lora(lambda self, x: (self(x), None)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", *long("float32", "float16")])
def test_every_number_of_the_laws_cases_has_a_bound_that_it_can_exceed(method, dtype):
    for case in linear_cases(method, dtype):
        for expected in (case.y, case.merged, *case.gradients.values()):
            assert np.isfinite(expected.error).all()


def test_a_divisor_that_may_be_0_leaves_no_bound_and_no_warning():
    nothing_known = Bounded.exact([1.0]) / Bounded(np.array([0.5]), np.array([1.0]))
    assert np.isposinf((nothing_known * 0).error)
    assert np.isposinf((Bounded.exact([0.0]) @ nothing_known).error)
    assert_maths([float("nan")], nothing_known)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda alpha, A: alpha / (len(A) + 1),
        lambda alpha, A: alpha / A.shape[1],
        lambda alpha, A: min(alpha / len(A), 1),
    ],
    ids=["r + 1", "in", "at most 1"],
)
def test_a_mistake_that_explains_some_cases_is_not_named(wrong):
    causes = causes_of(
        laws("lora")["forward"], lambda W, b, A, B, alpha: LoRALayer(W, b, A, B, wrong(alpha, A) * len(A))
    )
    assert causes == ()


def test_a_weight_that_changes_is_not_taken_for_dropout():
    def drifting(self, x):
        self.W = self.W + 0.01
        return self(x)

    assert causes_of(laws("lora")["dropout"], lora(drifting)) == ()


def test_right_results_are_computed_once_whatever_mistakes_are_tried(monkeypatch):
    check_lora_linear(LoRALayer)
    monkeypatch.setattr(cases, "scaled", None)  # nothing calls it any more
    check_lora_linear(LoRALayer)
    few = lora(lambda self, x: self(x) if len(x) <= 64 else nn.functional.linear(x, self.W, self.b))
    assert causes_of(laws("lora")["merge"], few) == ()  # a missing update is missed in small inputs, too


def test_results_of_numpy_are_refused_with_what_adapts_them():
    def make_layer(W, b, A, B, alpha):
        merged = (W + alpha / len(A) * B @ A).detach().numpy()
        return lambda x: x.detach().numpy() @ merged.T + (0 if b is None else b.numpy())

    with pytest.raises(CheckFailure, match="has no attribute 'requires_grad'; `on_numpy` adapts"):
        check_lora_linear(make_layer)


def test_misuse_is_told():
    with pytest.raises(TypeError, match="adapt each of a pair"):
        on_numpy((max, min))
    with pytest.raises(ValueError, match="name the kinds"):
        check(LoRALayer)
    for kind in {law.kind for law in laws().values()}:
        assert kind in laws.__doc__


def test_a_failure_that_earlier_calls_cause_says_so():
    counts = []

    def step(W, batches):
        counts.append(sum((labels[:, 1:] != -100).sum() for _, labels in batches))
        return accumulated_gradient(W, batches) * counts[-1] / sum(counts)

    with pytest.raises(CheckFailure, match="it depends on earlier calls"):
        check_accumulation(step)
    with pytest.raises(CheckFailure) as caught:
        check_accumulation(lambda W, batches: 2 * accumulated_gradient(W, batches))
    assert "earlier calls" not in str(caught.value)
