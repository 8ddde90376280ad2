"""Random pointwise specs as .psm text: products of associative rules with random nonlinear lifts and readouts.

`spec(pick)` makes every choice through `pick(options)`: from a seeded generator (`specs`), or from Hypothesis, which
then shrinks the spec itself (`pointwise_specs`). All of them are associative, over all of the reals.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Pick = Callable[[Sequence[Any]], Any]

# Safe on the whole line, with values and slopes that stay moderate. {0}, {1}: arguments.
UNARY = (
    "tanh({0})", "sigmoid({0})", "sin({0})", "cos({0})", "silu({0})", "gelu({0})", "softplus({0})", "logsigmoid({0})",
    "relu({0})", "abs({0})", "erf({0})", "exp(-abs({0}))", "exp(tanh({0}))", "expm1(tanh({0}))", "log1p(({0})^2)",
    "log(2 + tanh({0}))", "sqrt(1 + ({0})^2)", "rsqrt(1 + ({0})^2)", "clamp({0}, -1, 0.75)", "(-{0})", "tanh({0})^3",
    "stop({0})", "sign({0})", "0.5 * {0}",
)  # fmt: skip
BINARY = (
    "({0} + {1})", "({0} - {1})", "tanh({0}) * {1}", "{0} / (1 + ({1})^2)", "max({0}, {1})", "min({0}, {1})",
    "logaddexp({0}, {1})", "where({0} > {1}, {0}, 0.25 * {1})", "where({0} <= 0.1 and not ({1} == 0), {1}, -{0})",
)  # fmt: skip
# What a lift makes of an expression for a component of that domain.
DOMAINS = {
    "real": ("{0}",),
    "decay": ("sigmoid(1 + {0})", "exp(-softplus({0}))", "1 - sigmoid({0})", "exp(-0.2 * ({0})^2)", "tanh({0})"),
    "scale": ("exp(0.1 * tanh({0}))", "1 + 0.1 * sin({0})", "(-exp(0.1 * tanh({0})))"),
    "entry": ("0.1 + 0.8 * sigmoid({0})", "0.5 * exp(0.5 * tanh({0}))"),
    "weight": ("0.1 + softplus({0})", "exp(tanh({0}))"),
    "cost": ("logsigmoid({0})", "-0.1 - abs({0})", "0.2 * tanh({0})"),
    "unit": ("exp(complex(-0.05 - ({0})^2, {0}))", "0.9 * complex(cos({0}), sin({0}))", "complex(tanh({0}), 0.3)"),
    "plane": ("complex({0}, tanh({0}))", "complex(0.5, {0})"),
    "flag": ("where({0} > 0.8, 1, 0)",),
}


@dataclass(frozen=True)
class Family:
    """A monoid: components as (name, domain, declaration), its rule, and what may be read of it. '@' is the prefix of
    its names, and `[]` is replaced by the indices."""

    parts: tuple[tuple[str, str, str], ...]
    rule: str
    reads: tuple[str, ...]


FAMILIES = {
    "sum": Family((("s", "real", "= 0"),), "@s[] = l.@s[] + r.@s[]", ("0.2 * @s[]",)),
    "product": Family((("p", "scale", "= 1"),), "@p[] = l.@p[] * r.@p[]", ("@p[]", "log1p(@p[]^2)")),
    "max": Family((("m", "real", "= -inf"),), "@m[] = max(l.@m[], r.@m[])", ("@m[]",)),
    "min": Family((("m", "real", "= inf"),), "@m[] = min(l.@m[], r.@m[])", ("@m[]",)),
    "decayed": Family(
        (("a", "decay", "= 1"), ("h", "real", "= 0")),
        "@a[] = l.@a[] * r.@a[]; @h[] = r.@a[] * l.@h[] + r.@h[]",
        ("@h[]", "(@h[] - 0.5 * prev.@h[])", "@a[] * @h[]"),
    ),
    "flipped": Family(  # the same rule, in terms of what is forgotten
        (("f", "decay", "= 0"), ("h", "real", "= 0")),
        "@f[] = l.@f[] + r.@f[] - l.@f[] * r.@f[]; @h[] = l.@h[] - r.@f[] * l.@h[] + r.@h[]",
        ("@h[]",),
    ),
    "logsumexp": Family(
        (("m", "real", "= -inf"), ("u", "weight", "= 0")),
        "@m[] = max(l.@m[], r.@m[]); @u[] = l.@u[] * exp(l.@m[] - @m[]) + r.@u[] * exp(r.@m[] - @m[])",
        ("@m[] + log(@u[])",),
    ),
    "logadd": Family((("z", "real", "= -inf"),), "@z[] = logaddexp(l.@z[], r.@z[])", ("@z[]",)),
    "maxplus": Family(
        (("a", "cost", "= 0"), ("b", "real", "= -inf")),
        "@a[] = l.@a[] + r.@a[]; @b[] = max(l.@b[] + r.@a[], r.@b[])",
        ("@b[]",),
    ),
    "triangular": Family(
        (
            ("a", "decay", "= 1"),
            ("c", "real", "= 0"),
            ("d", "decay", "= 1"),
            ("x", "real", "= 0"),
            ("y", "real", "= 0"),
        ),
        """@a[] = r.@a[] * l.@a[]; @c[] = r.@c[] * l.@a[] + r.@d[] * l.@c[]; @d[] = r.@d[] * l.@d[]
    @x[] = r.@a[] * l.@x[] + r.@x[]; @y[] = r.@c[] * l.@x[] + r.@d[] * l.@y[] + r.@y[]""",
        ("@x[] - 0.1 * @y[]", "0.1 * @y[]"),
    ),
    "moebius": Family(
        (("p", "entry", "= 1"), ("q", "entry", "= 0"), ("r", "entry", "= 0"), ("s", "entry", "= 1")),
        """@p[] = r.@p[] * l.@p[] + r.@q[] * l.@r[]; @q[] = r.@p[] * l.@q[] + r.@q[] * l.@s[]
    @r[] = r.@r[] * l.@p[] + r.@s[] * l.@r[]; @s[] = r.@r[] * l.@q[] + r.@s[] * l.@s[]""",
        ("(@p[] + @q[]) / (@r[] + @s[])", "@p[] / (@p[] + @s[])"),
    ),
    "welford": Family(
        (("n", "weight", "in (0, inf) = 0"), ("mu", "real", "= 0"), ("v", "zero", "= 0")),
        """@n[] = l.@n[] + r.@n[]
    let @gap[] = r.@mu[] - l.@mu[]
    @mu[] = l.@mu[] + @gap[] * r.@n[] / @n[]
    @v[] = l.@v[] + r.@v[] + @gap[]^2 * l.@n[] * r.@n[] / @n[]""",
        ("@mu[]", "@v[] / @n[]", "@mu[] / (1 + @n[])"),
    ),
    "rotation": Family(
        (("a", "unit", ": complex = 1"), ("h", "plane", ": complex = 0")),
        "@a[] = l.@a[] * r.@a[]; @h[] = r.@a[] * l.@h[] + r.@h[]",
        ("real(@h[])", "imag(@h[] * conj(@h[] + complex(0, 1)))", "real(@h[]) * imag(@a[])"),
    ),
    "segments": Family(
        (("f", "flag", ": int in [0, 1] = 0"), ("s", "real", "= 0")),
        "@f[] = max(l.@f[], r.@f[]); @s[] = where(r.@f[] > 0, r.@s[], l.@s[] + r.@s[])",
        ("0.2 * @s[]", "@f[] * @s[]"),
    ),
}
MOST = 6  # components of a product


@dataclass
class Made:
    """A spec in the making. `tensors`: what expressions may read; `indices`: of components and outputs."""

    pick: Pick
    indices: str
    tensors: list[str] = field(default_factory=list)
    taps: bool = False

    def expression(self, depth: int, leaves: Sequence[str]) -> str:
        """A random scalar expression of the leaves."""
        if depth == 0:
            leaf: str = self.pick(leaves)
            return leaf
        if self.pick((False, True)):
            return str(self.pick(UNARY)).format(self.expression(depth - 1, leaves))
        parts = (self.expression(depth - 1, leaves), self.expression(depth - 1, leaves))
        return str(self.pick(BINARY)).format(*parts)

    def lifted(self, domain: str) -> str:
        """An expression of the inputs and params in a component's domain."""
        if domain == "zero":
            return "0"
        return str(self.pick(DOMAINS[domain])).format(self.expression(self.pick((0, 1, 2)), self.tensors))


def spec(pick: Pick, name: str = "random_spec") -> str:
    """One spec, as text."""
    lane = pick((False, False, True))
    made = Made(pick, "[d]" if lane else "")
    inputs, params = [], []
    for word in ("x", "y", "z")[: pick((1, 2, 3))]:
        own = "[D]" if lane and (word == "x" or pick((False, True))) else ""
        inputs.append(word + own + pick(("", "", " in (-inf, 0]", " in [0, 1]", " in (0, inf)")))
        made.tensors.append(word + own.lower())
        if pick((0, 0, 0, 1)):
            made.tensors.append(f"{word}{{-{pick((1, 2))}}}{own.lower()}")
    for word in ("w", "c")[: pick((0, 1, 2))]:
        own = "[D]" if lane and pick((False, True)) else ""
        params.append(word + own)
        made.tensors.append(word + own.lower())
    state, lift, combine, reads = [], [], [], []
    left = MOST
    for number in range(pick((1, 2, 3))):
        fitting = [k for k, f in FAMILIES.items() if len(f.parts) <= left]
        if not fitting:
            break
        family = FAMILIES[pick(fitting)]
        left -= len(family.parts)
        own = "abc"[number] + "_"
        write = lambda text, own=own: text.replace("@", own).replace("[]", made.indices)  # noqa: E731
        for part, domain, declaration in family.parts:
            state.append(f"{own}{part}{'[D]' if lane else ''} {declaration}")
            lift.append(f"{own}{part}{made.indices} = {made.lifted(domain)}")
        combine.append(write(family.rule))
        reads.append(write(pick(family.reads)))
    outputs = []
    for number in range(pick((1, 1, 2))):
        leaves = reads if number == 0 else [*reads, *made.tensors]
        shown = " + ".join(reads) if number == 0 and pick((False, True)) else made.expression(pick((1, 2)), leaves)
        if lane and "[d]" not in shown:
            shown = f"x[d] * {shown}"
        outputs.append(f"{'op'[number]}{made.indices} = {shown}")
    lines = [
        *(["dim D"] if lane else []),
        f"input {', '.join(inputs)}",
        *([f"param {', '.join(params)}"] if params else []),
        f"state {', '.join(state)}",
        "lift {",
        *(f"  {line}" for line in lift),
        "}",
        "combine (l, r) {",
        *(f"  {line}" for line in combine),
        "}",
        f"output {', '.join(outputs)}",
        "associative: yes",
    ]
    return f"aggregator {name} {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def specs(count: int, seed: int = 0) -> list[str]:
    """The same specs for the same seed, in any process; the first of a longer list."""
    return [spec(random.Random(f"{seed}.{number}").choice, f"random_{number}") for number in range(count)]


def pointwise_specs() -> Any:
    """The Hypothesis strategy."""
    from hypothesis import strategies as st

    @st.composite
    def made(draw: Any) -> str:
        return spec(lambda options: draw(st.sampled_from(list(options))))

    return made()
