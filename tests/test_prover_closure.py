"""Intervals enter a proof only if they are closed: whatever is called closed is, and what is not is never used."""

from __future__ import annotations

import random
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from prover_specs import spec

from psmc.algebra import interval_math as im
from psmc.algebra import numbers as nu
from psmc.algebra.exact import Array, run
from psmc.algebra.intervals import closure
from psmc.algebra.parametrise import parametrised
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved, Refuted
from psmc.ir import Aggregator, Block, Interval, Ref

LONG = 60.0
FORMS = [
    "{a} + {b}",
    "{a} * {b}",
    "{a} - {b}",
    "max({a}, {b})",
    "min({a}, {b})",
    "sqrt({a}^2 + {b}^2)",
    "{a} / (1 + {b}^2)",
]
FORMS += [
    "where({a} > {b}, {a}, {b})",
    "sigmoid({a} + {b})",
    "({a} + {b}) / 2",
    "clamp({a} + {b}, 0, 1)",
    "{a} / (1 + {a} * {b})",
]
FORMS += [
    "exp({a} - max({a}, {b}))",
    "{a} + {b} - {a} * {b}",
    "abs({a}) - abs({b})",
    "tanh({a} * {b})",
    "log(1 + exp({a} + {b}))",
    "where({a} < 1, {a}, where({b} > {a}, {b} - {a}, 0))",
    "where(not ({a} <= {b}) and {a} + {b} < 2, {a} + {b}, {b})",
]
LEAVES = ["l.s", "r.s", "l.t", "r.t", "1", "0.5"]
LIFTS = ["x", "x * x", "exp(x)", "sigmoid(x)", "tanh(x)", "1", "-softplus(x)", "1 / (1 + x * x)"]


@st.composite
def intervals(draw: st.DrawFn) -> str:
    lo, hi = sorted(draw(st.lists(st.integers(-3, 3), min_size=2, max_size=2, unique=True)))
    left, right = draw(st.sampled_from("([")), draw(st.sampled_from(")]"))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return f"{left}{lo}, inf)"
    if kind == 1:
        return f"(-inf, {hi}{right}"
    return f"{left}{lo}, {hi}{right}"


@st.composite
def specs(draw: st.DrawFn) -> Aggregator:
    """Two components with intervals at random, lifted and combined at random."""

    def term() -> str:
        a, b = (draw(st.sampled_from(LEAVES)) for _ in "ab")
        inner = "(" + draw(st.sampled_from(FORMS)).format(a=a, b=b) + ")"
        return draw(st.sampled_from(FORMS)).format(a=inner, b=draw(st.sampled_from(LEAVES)))

    s, t = draw(intervals()), draw(intervals())
    lift = f"s = {draw(st.sampled_from(LIFTS))}; t = {draw(st.sampled_from(LIFTS))}"
    return spec(
        f"input x state s in {s} = 0, t in {t} = 0 lift {{ {lift} }} combine (l, r) {{ s = {term()}; t = {term()} }}"
    )


def inside(interval: Interval, rng: random.Random) -> Fraction:
    """A point of it, often at or near an end."""
    lo = interval.lo if interval.lo is not None else (interval.hi or Fraction(0)) - 9
    hi = interval.hi if interval.hi is not None else lo + 18
    near = Fraction(1, 10 ** rng.randint(1, 12))
    for point in rng.sample([lo, hi, lo + (hi - lo) * near, hi - (hi - lo) * near], 2):
        if im.holds(interval, point):
            return point
    return lo + (hi - lo) * Fraction(rng.randint(1, 99), 100)


def stays(value: nu.Number | None, interval: Interval) -> bool:
    """Nothing, infinite, or in the interval as far as the digits tell."""
    if value is None or nu.infinite(value):
        return True
    assert not isinstance(value, nu.Complex)
    if isinstance(value, Fraction):
        return im.holds(interval, value)
    slack = Fraction(1, 10**60)
    return (interval.lo is None or Fraction(value) > interval.lo - slack) and (
        interval.hi is None or Fraction(value) < interval.hi + slack
    )


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(specs(), st.integers(0, 10**6))
def test_what_is_called_closed_is(agg: Aggregator, seed: int) -> None:
    found = closure(agg)
    assert set(found.closed) | set(found.open) == {"s", "t"} and not set(found.closed) & set(found.open)
    rng = random.Random(seed)
    assert isinstance(agg.combine, Block)
    for _ in range(12):
        x = Fraction(rng.randint(-40, 40), rng.choice((1, 7)))
        lifted = run(agg.leaf, {}, {("input", "x"): {(): x}})
        elements: dict[tuple[str, str], Array] = {}
        for side in ("left", "right"):
            for name in ("s", "t"):  # an interval that is open holds nothing back
                where = found.closed.get(name, im.ANY)
                elements[side, name] = {(): inside(where, rng)}
        combined = run(agg.combine, {}, elements)
        for name, interval in found.closed.items():
            assert stays(lifted[name][()], interval), (name, "lift", x)
            assert stays(combined[name][()], interval), (name, "combine", elements)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(specs())
def test_what_is_not_closed_is_never_used(agg: Aggregator) -> None:
    """Certificates name closed intervals only, and dropping the others changes no verdict."""
    open_ = closure(agg).open
    proof = prove(agg, 2)
    for verdict in (proof.associativity, proof.identity):
        if isinstance(verdict, Proved):
            assert not any(f"interval of '{name}'" in line for name in open_ for line in verdict.certificate)


@pytest.mark.parametrize(
    ("interval", "why"),
    [("[0, 1]", "combine"), ("(0, 2)", "lift"), ("(0.5, inf)", "lift")],
)
def test_an_interval_that_would_prove_it(interval: str, why: str) -> None:
    """Multiplying magnitudes is associative of positive numbers; the rule as it stands is not."""
    lift = {"combine": "clamp(x, 0, 1)", "lift": "x"}[why]
    agg = spec(f"input x state s in {interval} = 1 lift {{ s = {lift} }} combine (l, r) {{ s = abs(l.s) * r.s + abs(l.s) - l.s"
               " + where(l.s > 1, 1, 0) }")  # fmt: skip
    assert closure(agg).open == {"s": why}
    assert isinstance(prove(agg, LONG).associativity, Refuted)


@pytest.mark.parametrize("text", ["(0, inf)", "(-1, inf)", "(-inf, 2)", "(0, 1)", "(-1, 1)", "(0, 1]", "[-2, 3)"])
def test_images_of_the_line(text: str) -> None:
    """Each image lies in its interval, and rises or falls over all of it."""
    agg = spec(f"state s in {text} = 0 combine (l, r) {{ s = l.s + r.s }}")
    interval = agg.state[0].interval
    assert interval is not None
    ref = Ref("state", "a.s", ())
    image, bounds, replaced = parametrised(ref, {"a.s": interval})
    assert replaced == {"a.s"}
    over = bounds.get("a.s'", im.ANY)
    values = []
    for u in (-200, -30, -1, 0, 1, 30, 200):
        if im.holds(over, Fraction(u)):
            from psmc.algebra.exact import Evaluator

            value = Evaluator({}, {("state", "a.s'"): {(): Fraction(u)}}, {}).value(image, {})
            assert not isinstance(value, nu.Complex | bool)
            assert im.holds(interval, Fraction(value)), (u, value)
            values.append(Fraction(value))
    assert values == sorted(values) or values == sorted(values, reverse=True)
    for end in (interval.lo, interval.hi):
        assert end is None or min(abs(v - end) for v in values) < Fraction(1, 10**10)


@pytest.mark.parametrize("text", ["[0, 1]", "(-inf, inf)"])
def test_no_image(text: str) -> None:
    agg = spec(f"state s in {text} = 0 combine (l, r) {{ s = l.s + r.s }}")
    ref = Ref("state", "a.s", ())
    interval = agg.state[0].interval or Interval()
    assert parametrised(ref, {"a.s": interval})[0] is ref


# Values at the edge of what a lift gives. Each rule is a monoid inside the interval, and none on all that is lifted.
REACHED = {
    "large odd powers keep the sign": "input x state s in [0, inf) = 0 lift { s = x^65 }",
    "of negative exponent too": "input x state s in [0, inf) = 0 lift { s = x^-67 }",
    "a tap reads 0 before the first token": "input x in (0, inf) state s in (0, inf) = 1 lift { s = x{-1} }",
    "exp(log 0) is 0": "input x in [0, inf) state s in (0, inf) = 1 lift { s = exp(log(x)) }",
    "also by way of a let": "input x in [0, inf) state s in (0, inf) = 1 lift { let u = log(x); s = exp(u) }",
    "of the aggregator": "input x in [0, inf) let u = log(x) state s in (0, inf) = 1 lift { s = exp(2 * u) }",
}


@pytest.mark.parametrize("text", REACHED.values(), ids=REACHED)
def test_edges_that_a_lift_reaches(text: str) -> None:
    rule = "abs(l.s + r.s)" if "= 0" in text else "where(l.s > 0, l.s * r.s, 5)"
    agg = spec(f"{text} combine (l, r) {{ s = {rule} }}")
    assert closure(agg).open == {"s": "lift"}
    assert isinstance(prove(agg).associativity, Refuted)


@pytest.mark.parametrize("k", [64, 65, 66, 1001, -64, -65, -66])
@pytest.mark.parametrize("text", ["(-inf, inf)", "[0, inf)", "(0, 2]", "(-inf, 0)", "[-2, 0]", "[-1, 1]", "[1, 1]"])
def test_large_powers(k: int, text: str) -> None:
    (component,) = spec(f"state s in {text} = 0 combine (l, r) {{ s = l.s + r.s }}").state
    found = im.power(component.interval or im.ANY, k)
    for x in map(Fraction, ("-3", "-2", "-1", "-1/2", "0", "1/3", "1", "2", "5")):
        if im.holds(component.interval or im.ANY, x) and (x or k > 0):
            assert im.holds(found, x**k), (x, found)


# Conditions of `where` that hold in its branches: (lift of x in (-inf, inf), the interval, whether lift lands in it)
BRANCHES = [
    ("where(x > 0, x, 1)", "(0, inf)", True),
    ("where(x >= 0, x, 1)", "(0, inf)", False),
    ("where(0 < x and x < 1, x, 0)", "[0, 1)", True),
    ("where(0 < x or x < 1, x, 0)", "[0, 1)", False),
    ("where(not (x < 0 or x > 1), x, 0)", "[0, 1]", True),
    ("where(not (x < 0 and x > 1), x, 0)", "[0, 1]", False),
    ("where(x <= y, 0, x)", "[0, inf)", False),
    ("where(x <= abs(y), 0, x)", "(0, inf)", False),
    ("where(x <= abs(y), 0, x)", "[0, inf)", True),
    ("where(n > 2, 2, n)", "(-inf, 2]", True),
    ("where(2 * n < 5, n, 2)", "(-inf, 2]", False),
    ("where(log(abs(x)) < 5, exp(log(abs(x))), 1)", "(0, inf)", False),
]


@pytest.mark.parametrize(("lift", "interval", "lands"), BRANCHES)
def test_conditions_hold_in_their_branches(lift: str, interval: str, lands: bool) -> None:
    agg = spec(f"input x, y, n : int state s in {interval} = 1 lift {{ s = {lift} }} combine (l, r) {{ s = max(l.s, r.s) }}")
    assert ("s" in closure(agg).closed) == lands


@pytest.mark.parametrize("value", ["rsqrt(-1 - x^2)", "1 / sqrt(logsigmoid(x))", "1 / (x - x)"])
def test_what_has_no_value_anywhere(value: str) -> None:
    """Its image is empty, or 0 alone: nothing is known of its inverse, and nothing is divided by 0 to find out."""
    agg = spec(f"input x; state s in (0, inf) = 1; lift {{ s = {value} }} combine (l, r) {{ s = l.s * r.s }}")
    assert not isinstance(prove(agg).associativity, Refuted)
