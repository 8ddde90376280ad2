"""Random specs whose names, dims and kinds fit: what reaches the resolver's end, lifting and the prover."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

UNARY = ("exp", "log", "sqrt", "abs", "tanh", "sigmoid", "softplus", "relu", "sign", "log1p", "expm1", "sin", "cos")
UNARY += ("silu", "gelu", "erf", "rsqrt", "logsigmoid", "stop")
BINARY = ("{} + {}", "{} - {}", "{} * {}", "{} * {}", "{} + {}", "max({}, {})", "min({}, {})", "logaddexp({}, {})")
BINARY += ("{} / {}", "clamp({}, -1, {})")
INTERVALS = ("(0, inf)", "[0, 1]", "(-inf, 0]", "[-1, 1]", "(0, 1)", "[0, inf)")
LETTERS = "ijmnptu"
SLIP = 0.004  # a wrong thing, a choice


@dataclass
class Name:
    text: str
    dims: tuple[str, ...]
    kind: str


@dataclass
class _Writer:
    rng: random.Random
    dims: dict[str, int | None] = field(default_factory=dict)
    names: list[Name] = field(default_factory=list)
    taken: int = 0

    def one(self, *options: str) -> str:
        return self.rng.choice(options)

    def fresh(self, base: str) -> str:
        self.taken += 1
        return f"{base}{self.taken}"

    def slip(self) -> bool:
        return self.rng.random() < SLIP

    # --- declarations -------------------------------------------------------------------------------

    def declared(self, base: str, most: int = 2) -> tuple[Name, str]:
        dims = tuple(self.rng.choice(tuple(self.dims)) for _ in range(self.rng.randrange(most + 1))) if self.dims else ()
        kind = self.rng.choices(("real", "int", "complex"), (12, 2, 1))[0]
        name = Name(self.fresh(base), dims, kind)
        text = name.text + (f"[{', '.join(dims)}]" if dims else "")
        if kind != "real":
            text += f" : {kind}"
        if kind != "complex" and self.rng.random() < 0.25:
            text += f" in {'[0, 1]' if kind == 'int' else self.one(*INTERVALS)}"
        return name, text

    def identity(self, name: Name) -> str:
        if name.dims == ("K", "K") and self.rng.random() < 0.5:
            return "eye"
        if name.kind == "real":
            return self.one("0", "1", "-inf", "inf", "0", "1", "log(2)", "1 / 3")
        return self.one("0", "1")

    # --- expressions --------------------------------------------------------------------------------

    def leaf(self, free: dict[str, str], scope: list[Name]) -> str:
        choice = self.rng.random()
        if choice < 0.15 or not scope:
            return self.one("0", "1", "2", "0.5", "3", "1e-6")
        if choice < 0.18 and free:
            return self.rng.choice(tuple(free))
        if choice < 0.2 and self.dims:
            return self.rng.choice(tuple(self.dims))
        name = self.rng.choice(scope)
        subs, bound = [], []
        for dim in name.dims:
            fitting = [i for i, d in free.items() if d == dim]
            size = self.dims[dim]
            if fitting and self.rng.random() < 0.8:
                subs.append(self.rng.choice(fitting))
            elif size is not None and self.rng.random() < 0.5:
                subs.append(str(self.rng.randrange(size)))
            else:
                index = next(c for c in LETTERS if c not in free and c not in bound)
                subs.append(index)
                bound.append(index)
        if self.slip():
            subs = [*subs, "i"]
        text = name.text + (f"[{', '.join(subs)}]" if subs else "")
        return text if not bound else f"({self.one('sum', 'sum', 'max', 'prod')}[{', '.join(bound)}] {text})"

    def expr(self, depth: int, free: dict[str, str], scope: list[Name]) -> str:
        if depth <= 0:
            return self.leaf(free, scope)
        a, b = self.expr(depth - 1, free, scope), self.expr(depth - self.rng.choice((1, 1, 2)), free, scope)
        choice = self.rng.random()
        if choice < 0.6:
            return f"({self.rng.choice(BINARY).format(a, b)})"
        if choice < 0.72:
            return f"{self.rng.choice(UNARY)}({a})"
        if choice < 0.78:
            return f"where({a} {self.one('<', '<=', '>', '==', '!=')} {b}, {b}, {a})"
        if choice < 0.82:
            return f"({a})^{self.one('2', '3', '-1', '(1/2)', '0')}"
        if choice < 0.86:
            return f"(-{a})"
        if choice < 0.9 and len(free) > 1:
            return f"eye({', '.join(self.rng.sample(tuple(free), 2))}) * {a}"
        if choice < 0.96 and self.dims:
            index = next(c for c in LETTERS if c not in free)
            inner = self.expr(depth - 1, {**free, index: self.rng.choice(tuple(self.dims))}, scope)
            if re.search(rf"\[[^]]*\b{index}\b", inner):  # its dim is that of what it subscripts
                return f"({self.one('sum', 'max', 'prod')}[{index}] {inner})"
            return a
        return a

    def assigned(self, name: Name, depth: int, scope: list[Name]) -> str:
        free = dict(zip(LETTERS, name.dims, strict=False))
        value = self.expr(depth, free, [n for n in scope if n.kind in _BELOW[name.kind]] or scope)
        subs = f"[{', '.join(free)}]" if free else ""
        return f"{name.text}{subs} = {value}"


_BELOW = {"real": ("int", "real"), "int": ("int",), "complex": ("int", "real", "complex")}
# Rules that are associative in the operands' entries; others are made at random.
_RULES = ("l.{0} + r.{0}", "l.{0} * r.{0}", "max(l.{0}, r.{0})", "r.{0}", "l.{0}", "l.{0} + r.{0} + l.{0} * r.{0}")


def typed(rng: random.Random) -> str:
    w = _Writer(rng)
    for dim in rng.sample(("K", "V", "N"), rng.randrange(3)):
        w.dims[dim] = rng.choice((None, None, 1, 2, 3))
    lines = [f"dim {d}" + (f" = {n}" if n else "") for d, n in w.dims.items()]
    inputs, params, state = [], [], []
    for _ in range(rng.randrange(1, 4)):
        name, text = w.declared("x")
        inputs.append(name)
        lines.append(f"input {text}")
    for _ in range(rng.choice((0, 0, 1))):
        name, text = w.declared("w")
        params.append(name)
        lines.append(f"param {text}")
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        name, text = w.declared("s")
        state.append(name)
        lines.append(f"state {text} = {w.identity(name)}")
    outside = [*inputs, *params]
    sides = [Name(f"{side}.{n.text}", n.dims, n.kind) for side in "lr" for n in state]
    depth = rng.choice((1, 1, 2, 3))
    if rng.random() < 0.3:
        before = [Name(f"prev.{n.text}", n.dims, n.kind) for n in state]
        lines.append("recurrence {\n" + "\n".join(w.assigned(n, depth, [*outside, *before]) for n in state) + "\n}")
    else:
        if not w.slip():
            lines.append("lift {\n" + "\n".join(w.assigned(n, depth, outside) for n in state) + "\n}")
        rules = []
        for n in state:
            free = ", ".join(LETTERS[: len(n.dims)])
            subs = f"[{free}]" if free else ""
            if rng.random() < 0.5:
                rules.append(f"{n.text}{subs} = {rng.choice(_RULES).format(n.text + subs)}")
            else:
                rules.append(w.assigned(n, depth, [*sides, *params]))
        lines.append("combine (l, r) {\n" + "; ".join(rules) + "\n}")
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = Name(w.fresh("y"), tuple(rng.choice(tuple(w.dims)) for _ in range(rng.randrange(2))) if w.dims else (), "real")
        read = [*outside, *state, *(Name(f"prev.{n.text}", n.dims, n.kind) for n in state)]
        lines.append(f"output {w.assigned(name, depth, read)}")
    lines.append(f"associative: {rng.choice(('yes', 'yes', 'yes', 'assume', 'no'))}")
    if rng.random() < 0.15:
        lines.insert(rng.randrange(len(lines)), "# a comment")
    return "aggregator fuzz {\n" + "\n".join(lines) + "\n}\n"
