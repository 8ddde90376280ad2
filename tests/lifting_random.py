"""Random recurrences of the classes that are lifted, as text: rules nested in micro-steps, choices and segments."""

from __future__ import annotations

from hypothesis import strategies as st

HEAD = "input a, b, x, u in (0, 1), v in (0, inf), w in [0, 1], z : int in [0, 1], k : int in [0, 2]"
ANY = ("x", "a * b", "b - 1", "0.5", "-1", "where(a > 0, b, x)", "tanh(a) + w", "sin(x)", "0")
POSITIVE = ("u", "v", "0.5", "sigmoid(a)", "1 + w", "exp(-abs(b))", "where(k == 1, u, 2)", "u * v")
NON_NEGATIVE = ("w", "abs(x)", "b * b", "relu(a)", "u", "0", "1", "w * v")
RESETS = ("z > 0", "k == 2", "x > 1", "a > 0 and b > 0", "not (x < 0.5)")

any_ = st.sampled_from(ANY)
positive = st.sampled_from(POSITIVE)
non_negative = st.sampled_from(NON_NEGATIVE)


def _affine(s: str, d) -> str:
    return d(st.sampled_from(("({0}) * {s} + {1}", "{1} - {s} * ({0})", "({s} + {1}) / (1.5 + w) - {0}"))).format(
        d(any_), d(any_), s=s
    )


def _max_plus(s: str, d) -> str:
    form = d(st.sampled_from(("max({s} + {0}, {1})", "max({0}, {s} - {1})", "relu({s} + {0})", "max({s}, {0}) - {1}")))
    return form.format(d(any_), d(any_), s=s)


def _min_plus(s: str, d) -> str:
    return d(st.sampled_from(("min({s} + {0}, {1})", "-max(-{s} - {0}, {1})"))).format(d(any_), d(any_), s=s)


def _log_plus(s: str, d) -> str:
    return f"logaddexp({s} + {d(any_)}, {d(any_)})"


def _leaky(s: str, d) -> str:
    return d(st.sampled_from(("max(({0}) * {s}, {1})", "max({1}, {s} / ({0}))"))).format(d(positive), d(any_), s=s)


def _lattice(s: str, d) -> str:
    return d(st.sampled_from(("max(min({s}, {0}), {1})", "min({0}, max({1}, {s}))", "clamp({s}, {0}, {1})"))).format(
        d(any_), d(any_), s=s
    )


def _clamped(s: str, d) -> str:
    form = d(st.sampled_from((
        "clamp(({2}) * {s} + {0}, {1}, {3})", "clamp({s} - {0}, -1, 1)", "({2}) * max({s} + {0}, {1}) + {3}",
        "min(relu({s} / ({2}) + {0}), {1}) + {3}", "clamp(1 - (1 - {s}) * ({2}), {1}, 2)", "max({0} - 2 * ({1} - {s}), {3})", "max(min({s} + {0}, {1}), {3})",
    )))  # fmt: skip
    return form.format(d(any_), d(any_), d(positive), d(any_), s=s)


def _moebius(s: str, d) -> str:
    form = d(st.sampled_from((
        "(({0}) * {s} + {1}) / (({2}) * {s} + {3})", "{1} + {3} / ({s} + {3})", "{s} / (1 + ({0}) * {s}) + {1}",
        "({s} + {1}) * (1 - ({s} + {1}) / ({s} + {1} + {3}))", "({3}) * {s} / ({s} + {3})",
    )))  # fmt: skip
    form = form.format("({0})", "({1})", "({2})", "({3})", s=s)
    return form.format(d(non_negative), d(non_negative), d(non_negative), d(positive))


CLASSES = {
    "affine": _affine, "max-plus": _max_plus, "min-plus": _min_plus, "log-plus": _log_plus, "leaky": _leaky,
    "lattice": _lattice, "clamped": _clamped, "fractional-linear": _moebius,
}  # fmt: skip
# Classes within which each may follow the other: micro-steps of one token.
FAMILIES = (
    ("affine",), ("log-plus",), ("max-plus", "lattice", "clamped", "leaky", "min-plus"), ("fractional-linear",),
)  # fmt: skip


@st.composite
def recurrences(draw) -> tuple[str, str]:
    """(family, body): one component h; one to three steps a token, each perhaps behind a reset or skipped."""
    d = draw
    family = d(st.sampled_from(FAMILIES))
    nonneg = family == ("fractional-linear",)
    free = non_negative if nonneg else any_
    steps = [_step(d, family, free) for _ in range(d(st.integers(1, 2 if nonneg else 3)))]
    interval = " in [0, inf)" if nonneg else ""
    start = d(st.sampled_from(("0", "1", "0.5") if nonneg else ("0", "1", "-0.5")))
    body = f"{HEAD} state h{interval} = {start} recurrence {{ {'; '.join(steps)} }}"
    return family[0], body + (" output y = h + prev.h" if d(st.booleans()) else "")


def _step(d, family: tuple[str, ...], free) -> str:
    name = d(st.sampled_from(family))
    rule = CLASSES[name]("h", d)
    kind = d(st.sampled_from(("plain", "plain", "reset", "reset", "factor", "two resets")))
    if kind == "plain":
        return f"h = {rule}"
    if kind == "factor":
        return f"h = {CLASSES[name]('((1 - z) * h)', d)}"
    inner = f"where({d(st.sampled_from(RESETS))}, {d(free)}, {rule})"
    if kind == "two resets":
        inner = f"where({d(st.sampled_from(RESETS))}, {d(free)}, {inner})"
    return f"h = {inner}"


# A matrix a token over each semiring: ⊕ over an index of ⊗, then ⊕ with an injection.
RINGS = {
    "(+, *)": "sum[j] {m} * h[j] + {e}",
    "(max, +)": "max(max[j] (h[j] + {m}), {e})",
    "(min, +)": "min(-max[j] -(h[j] + {m}), {e})",
    "(max, min)": "max(max[j] min({m}, h[j]), {e})",
    "(min, max)": "min(-max[j] -max(h[j], {m}), {e})",
    "(max, *)": "max(max[j] {m} * h[j], {e})",
}


@st.composite
def matrices(draw) -> tuple[str, str]:
    """(semiring, body): one or two products a token of a vector with a matrix, perhaps behind a reset."""
    d = draw
    ring = d(st.sampled_from(sorted(RINGS)))
    nonneg = ring == "(max, *)"
    entries = ("W[i, j]", "P[i, j] * w", "W[i, j] * W[i, j]") if nonneg else ("M[i, j]", "(M[i, j] - a)", "(P[i, j] + x)")
    steps = []
    for _ in range(d(st.integers(1, 2))):
        rule = RINGS[ring].format(m=d(st.sampled_from(entries)), e=d(st.sampled_from(("w", "c[i]", "abs(x) * w"))))
        if d(st.booleans()):
            rule = f"where({d(st.sampled_from(RESETS))}, {d(st.sampled_from(('w', 'c[i]', '0')))}, {rule})"
        steps.append(f"h[i] = {rule}")
    tensors = "dim N input W[N, N] in [0, 1], M[N, N], c[N] in [0, inf) param P[N, N] in [0, 1]"
    interval = " in [0, inf)" if nonneg else ""
    return ring, f"{tensors} {HEAD} state h[N]{interval} = 0 recurrence {{ {'; '.join(steps)} }}"
