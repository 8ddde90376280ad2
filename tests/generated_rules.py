"""Random associative rules, built so that they are: monoids of a few kinds, and constructions that keep the laws."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rule:
    """Components `name -> (dims and interval, identity)`, results `name -> (indices, value)` over l. and r."""

    state: dict[str, tuple[str, str]]
    results: dict[str, tuple[str, str]]
    dims: tuple[str, ...] = ()
    identity_kept: bool = True  # False: the construction loses the identity (on values outside its range)

    def text(self) -> str:
        def declared(name: str) -> str:
            shape, identity = self.state[name]
            head, _, interval = shape.partition(" in ")
            dims, _, kind = head.partition(":")
            typed = f" : {kind}" if kind else ""
            bounded = f" in {interval}" if interval else ""
            return f"{name}{dims}{typed}{bounded} = {identity}"

        dims = f"dim {', '.join(sorted(set(self.dims)))}" if self.dims else ""
        rule = "\n  ".join(f"{n}{indices} = {value}" for n, (indices, value) in self.results.items())
        return f"{dims} state {', '.join(map(declared, self.state))}\ncombine (l, r) {{\n  {rule}\n}}"


def renamed(rule: Rule, prefix: str) -> Rule:
    def fix(text: str) -> str:
        for side in "lr":
            for name in sorted(rule.state, key=len, reverse=True):
                text = text.replace(f"{side}.{name}", f"{side}.{prefix}{name}#")
        return text.replace("#", "")

    return replace(
        rule,
        state={prefix + n: s for n, s in rule.state.items()},
        results={prefix + n: (i, fix(v)) for n, (i, v) in rule.results.items()},
    )


def simple(name: str, shape: str, identity: str, value: str, indices: str = "", *dims: str) -> Rule:
    return Rule({name: (shape, identity)}, {name: (indices, value)}, dims)


BASE = [
    simple("x", "", "0", "l.x + r.x"),
    simple("x", "", "1", "l.x * r.x"),
    simple("x", "", "-inf", "max(l.x, r.x)"),
    simple("x", "", "inf", "min(l.x, r.x)"),
    simple("x", "", "-inf", "logaddexp(l.x, r.x)"),
    simple("x", "", "0", "l.x + r.x + l.x * r.x"),
    simple("x", "", "0", "where(r.x == 0, l.x, r.x)"),
    simple("z", ":complex", "1", "l.z * r.z"),
    simple("x", " in (-1, 1)", "0", "(l.x + r.x) / (1 + l.x * r.x)"),
    simple("x", " in (0, inf)", "1", "exp(log(l.x) + log(r.x))"),
    simple("x", " in [0, inf)", "0", "sqrt(l.x^2 + r.x^2)"),
    simple("A", "[K, K]", "eye", "sum[m] l.A[i, m] * r.A[m, j]", "[i, j]", "K"),
    simple("A", "[K, K]", "eye", "sum[m] r.A[i, m] * l.A[m, j]", "[i, j]", "K"),
    simple("A", "[K, K]", "log(eye)", "max[m] (l.A[i, m] + r.A[m, j])", "[i, j]", "K"),
    simple("A", "[K, K]", "-log(eye)", "-max[m] -(l.A[i, m] + r.A[m, j])", "[i, j]", "K"),
    simple("A", "[K, K]", "log(eye) - log(1 - eye)", "max[m] min(l.A[i, m], r.A[m, j])", "[i, j]", "K"),
    simple("A", "[K, K] in [0, inf)", "eye", "max[m] l.A[i, m] * r.A[m, j]", "[i, j]", "K"),
    simple("p", "[K]:int", "iota", "r.p[l.p[i]]", "[i]", "K"),
    simple("v", "[K]", "0", "l.v[i] + r.v[i]", "[i]", "K"),
    simple("v", "[K]", "-inf", "max(l.v[i], r.v[i])", "[i]", "K"),
    Rule({"a": ("", "1"), "b": ("", "0")}, {"a": ("", "l.a * r.a"), "b": ("", "r.a * l.b + r.b")}),
    Rule({"a": ("", "0"), "b": ("", "-inf")}, {"a": ("", "l.a + r.a"), "b": ("", "max(r.a + l.b, r.b)")}),
    Rule(
        {"a": ("", "1"), "b": ("", "0"), "c": ("", "0"), "d": ("", "1")},
        {
            "a": ("", "l.a * r.a + l.b * r.c"),
            "b": ("", "l.a * r.b + l.b * r.d"),
            "c": ("", "l.c * r.a + l.d * r.c"),
            "d": ("", "l.c * r.b + l.d * r.d"),
        },
    ),
    Rule(
        {"a": ("", "1"), "b": ("", "0"), "c": ("", "0")},
        {
            "a": ("", "(r.a * l.a + r.b * l.c) / (r.c * l.b + 1)"),
            "b": ("", "(r.a * l.b + r.b) / (r.c * l.b + 1)"),
            "c": ("", "(r.c * l.a + l.c) / (r.c * l.b + 1)"),
        },
    ),
    Rule(
        {"a": ("", "0"), "lo": ("", "-inf"), "hi": ("", "inf")},
        {
            "a": ("", "l.a + r.a"),
            "lo": ("", "min(max(l.lo + r.a, r.lo), r.hi)"),
            "hi": ("", "min(max(l.hi + r.a, r.lo), r.hi)"),
        },
        identity_kept=False,
    ),
    Rule(
        {"m": ("", "-inf"), "u": ("", "0")},
        {
            "m": ("", "max(l.m, r.m)"),
            "u": ("", "l.u * exp(l.m - max(l.m, r.m)) + r.u * exp(r.m - max(l.m, r.m))"),
        },
    ),
    Rule(
        {"n": (" in (0, inf)", "0"), "c": ("", "0")},
        {"n": ("", "l.n + r.n"), "c": ("", "(l.n * l.c + r.n * r.c) / (l.n + r.n)")},
    ),
    Rule(
        {"A": ("[K, K]", "eye"), "S": ("[K, V]", "0")},
        {
            "A": ("[i, m]", "sum[p] r.A[i, p] * l.A[p, m]"),
            "S": ("[i, j]", "sum[p] r.A[i, p] * l.S[p, j] + r.S[i, j]"),
        },
        ("K", "V"),
    ),
    Rule(
        {"t": ("", "0"), "x": ("", "0"), "y": ("", "0")},
        {
            "t": ("", "l.t + r.t"),
            "x": ("", "l.x * cos(r.t) - l.y * sin(r.t) + r.x"),
            "y": ("", "l.x * sin(r.t) + l.y * cos(r.t) + r.y"),
        },
    ),
    Rule(
        {"a": ("[K]", "1"), "S": ("[K, V]", "0")},
        {"a": ("[i]", "l.a[i] * r.a[i]"), "S": ("[i, j]", "r.a[i] * l.S[i, j] + r.S[i, j]")},
        ("K", "V"),
    ),
    # the Heisenberg group, quaternions, 2x2 matrices over (max, +) and (min, max) written out
    Rule(
        {"x": ("", "0"), "y": ("", "0"), "z": ("", "0")},
        {"x": ("", "l.x + r.x"), "y": ("", "l.y + r.y"), "z": ("", "l.z + r.z + l.x * r.y")},
    ),
    Rule(
        {"w": ("", "1"), "x": ("", "0"), "y": ("", "0"), "z": ("", "0")},
        {
            "w": ("", "l.w * r.w - l.x * r.x - l.y * r.y - l.z * r.z"),
            "x": ("", "l.w * r.x + l.x * r.w + l.y * r.z - l.z * r.y"),
            "y": ("", "l.w * r.y - l.x * r.z + l.y * r.w + l.z * r.x"),
            "z": ("", "l.w * r.z + l.x * r.y - l.y * r.x + l.z * r.w"),
        },
    ),
    *(
        Rule(
            {"a": ("", one), "b": ("", zero), "c": ("", zero), "d": ("", one)},
            {
                "a": ("", plus.format(times.format("l.a", "r.a"), times.format("l.b", "r.c"))),
                "b": ("", plus.format(times.format("l.a", "r.b"), times.format("l.b", "r.d"))),
                "c": ("", plus.format(times.format("l.c", "r.a"), times.format("l.d", "r.c"))),
                "d": ("", plus.format(times.format("l.c", "r.b"), times.format("l.d", "r.d"))),
            },
        )
        for plus, times, zero, one in (
            ("max({}, {})", "({} + {})", "-inf", "0"),
            ("min({}, {})", "max({}, {})", "inf", "-inf"),
        )
    ),
]

# What acts (component, identity, rule), on what (rule, identity), and how: x -> a·x is an endomorphism of the latter.
ACTIONS = [
    ("a", "", "1", "l.a * r.a", "{x} + {y}", "0", "{a} * {x}"),
    ("a", " in (0, inf)", "1", "l.a * r.a", "max({x}, {y})", "-inf", "{a} * {x}"),
    ("a", " in (0, inf)", "1", "l.a * r.a", "min({x}, {y})", "inf", "{a} * {x}"),
    ("t", "", "0", "l.t + r.t", "max({x}, {y})", "-inf", "({x} + {a})"),
    ("t", "", "0", "l.t + r.t", "min({x}, {y})", "inf", "({x} + {a})"),
    ("t", "", "0", "l.t + r.t", "logaddexp({x}, {y})", "-inf", "({x} + {a})"),
    ("t", "", "0", "l.t + r.t", "{x} + {y}", "0", "exp({a}) * {x}"),
    ("t", "", "0", "l.t + r.t", "max({x}, {y})", "-inf", "exp({a}) * {x}"),
    ("a", " in (0, 1]", "1", "l.a * r.a", "{x} + {y}", "0", "{a} * {x}"),
    ("n", ":int", "0", "l.n + r.n", "{x} + {y}", "0", "2 ^ {a} * {x}"),
    ("z", ":complex", "1", "l.z * r.z", "{x} + {y}", "0", "{a} * {x}"),
    ("a", "", "1", "l.a * r.a", "where({y} == 0, {x}, {y})", "0", "{x}"),
]


def semidirect(rng: random.Random) -> Rule:
    """(a, x)∘(b, y) = (a b, b·x ∘ y); every component that is acted on may be a vector or a matrix."""
    name, kind, one, rule, monoid, zero, action = rng.choice(ACTIONS)
    shape, at, dims = rng.choice((("", "", ()), ("", "", ()), ("[K]", "[i]", ("K",)), ("[K, V]", "[i, j]", ("K", "V"))))
    spread = bool(dims) and rng.random() < 0.5  # the actor is a vector too
    own, own_at = (("[K]", "[i]") if spread else ("", ""))
    acted = action.format(a=f"r.{name}{own_at}", x=f"l.x{at}")
    complex_ = ":complex" if "complex" in kind else ""
    return Rule(
        {name: (own + kind, one), "x": (shape + complex_, zero)},
        {
            name: (own_at, rule.replace(f".{name}", f".{name}{own_at}")),
            "x": (at, monoid.format(x=acted, y=f"r.x{at}")),
        },
        dims,
    )


def product(x: Rule, y: Rule) -> Rule:
    x, y = renamed(x, "one_"), renamed(y, "two_")
    kept = x.identity_kept and y.identity_kept
    return Rule({**x.state, **y.state}, {**x.results, **y.results}, x.dims + y.dims, kept)


def opposite(rule: Rule) -> Rule:
    def flip(text: str) -> str:
        return text.replace("l.", "\0.").replace("r.", "l.").replace("\0.", "r.") if text else text

    return replace(rule, results={n: (i, flip(v)) for n, (i, v) in rule.results.items()})


def segmented(rule: Rule) -> Rule:
    """A flag drops everything before it."""
    rule = renamed(rule, "s_")
    results = {n: (i, f"where(r.flag > 0, r.{n}{i}, {v})") for n, (i, v) in rule.results.items()}
    state = {**rule.state, "flag": (":int in [0, 1]", "0")}
    return replace(rule, state=state, results={**results, "flag": ("", "max(l.flag, r.flag)")})


# x -> (forward, backward, interval of what is stored), applied to every real component
BIJECTIONS = {
    "shift": ("({} + 2)", "({} - 2)", ""),
    "scale": ("({} * 3)", "({} / 3)", ""),
    "mirror": ("(-{})", "(-({}))", ""),
    "affine": ("({} * 0.5 - 1)", "(2 * ({} + 1))", ""),
    "exponential": ("log({})", "exp({})", " in (0, inf)"),
    "expm1": ("log1p({})", "expm1({})", " in (-1, inf)"),
    "logistic": ("(log({0}) - log(1 - {0}))", "sigmoid({})", " in (0, 1)"),
}
# y -> y + f(x) for another component x
SHEARS = {"square": "{}^2", "cube": "{}^3", "exp": "exp({})", "product": "{} * {}"}


def conjugated(rule: Rule, name: str) -> Rule:
    """x' = φ⁻¹(φ x ∘ φ y) on every real component; the stored value is φ⁻¹ of the old one."""
    forward, backward, interval = BIJECTIONS[name]
    state, results = {}, {}
    for n, (indices, value) in rule.results.items():
        shape, identity = rule.state[n]
        for side in "lr":
            for other, (o_indices, _) in rule.results.items():
                value = _wrapped(value, f"{side}.{other}", bool(o_indices), forward)
        results[n] = (indices, backward.format(f"({value})"))
        state[n] = (shape + interval, backward.format(identity))
    return replace(rule, state=state, results=results)


def sheared(rule: Rule, name: str, rng: random.Random) -> Rule | None:
    """Conjugated by (x, y) -> (x, y + f(x)), for two real scalar components; None if there are no two."""
    able = [n for n, (shape, identity) in rule.state.items() if not shape and "inf" not in identity]
    if len(able) < 2:
        return None
    x, y = rng.sample(able, 2)
    bump = SHEARS[name]
    bump = bump.replace("{}", "{0}")

    def at_image(value: str) -> str:
        for side in "lr":
            value = _wrapped(value, f"{side}.{y}", False, f"({{}} + {bump.format(f'{side}.{x}')})")
        return value

    results = {n: (i, at_image(v)) for n, (i, v) in rule.results.items()}
    results[y] = ("", f"{results[y][1]} - {bump.format(f'({results[x][1]})')}")
    state = {**rule.state, y: ("", f"{rule.state[y][1]} - {bump.format(f'({rule.state[x][1]})')}")}
    return replace(rule, state=state, results=results)


def _wrapped(text: str, ref: str, subscripted: bool, forward: str) -> str:
    out, at = "", 0
    while (found := text.find(ref, at)) >= 0:
        end = found + len(ref)
        if subscripted:
            end = text.index("]", end) + 1
        elif end < len(text) and (text[end].isalnum() or text[end] == "_"):
            out, at = out + text[at:end], end
            continue
        out += text[at:found] + forward.format(text[found:end])
        at = end
    return out + text[at:]


def plain_real(rule: Rule) -> bool:
    return not any(" in " in shape or ":" in shape for shape, _ in rule.state.values())


CONSTRUCTIONS = ("product", "opposite", "segmented", "conjugated", "sheared", "conjugated", "sheared", "semidirect")
_SIZE = 4  # components of what is still enlarged


def random_rule(seed: int) -> tuple[str, Rule]:
    """(how it was made, the rule)."""
    rng = random.Random(seed)
    rule = rng.choice(BASE) if rng.random() < 0.7 else semidirect(rng)
    how = ["base" if rule in BASE else "semidirect"]
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        construction = rng.choice(CONSTRUCTIONS)
        found: Rule | None = None
        if construction == "product" and len(rule.state) <= _SIZE:
            found = product(rule, rng.choice(BASE))
        elif construction == "semidirect" and len(rule.state) <= _SIZE:
            found = product(rule, semidirect(rng))
        elif construction == "opposite":
            found = opposite(rule)
        elif construction == "segmented" and "flag" not in rule.state and len(rule.state) <= _SIZE:
            found = segmented(rule)
        elif construction == "conjugated" and plain_real(rule):
            construction = rng.choice(sorted(BIJECTIONS))
            found = conjugated(rule, construction)
        elif construction == "sheared":
            construction = rng.choice(sorted(SHEARS))
            found = sheared(rule, construction, rng)
            construction += " shear"
        if found is not None:
            rule = found
            how.append(construction)
    return ", ".join(how), rule
