"""Expressions as a certificate writes them: JSON over few operators, all of them real.

    expr  = "2" | "-1/3" | "inf" | "-inf"                          a number
          | ["l" | "r" | "param" | "input" | "let", name, place...]  an element of a tensor
          | ["index", i] | ["dim", K]                              an index variable, the size of a dim
          | [op, expr...]                                          op: a key of checker.OPS
          | ["where", condition, expr, expr]
          | ["sum" | "prod" | "maximum", i, K, expr]               over i = 0 .. K-1
    place = i | 0 | expr                                           an index, a position, an int-valued gather

A complex tensor `h` becomes the tensors `h.re` and `h.im`. The other operators are written in terms of these (`_REAL`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from psmc.ir import Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.query import needs_safe_exp, signed_terms
from psmc.ir.rewrite import instantiate

Tree: TypeAlias = "str | list[Any]"
Pair: TypeAlias = "tuple[Tree, Tree]"
MAX_TREE = 200_000  # nodes: what shared subexpressions and complex products may grow to
_SPACES = {"left": "l", "right": "r", "param": "param", "input": "input", "let": "let"}
_FALSE: Tree = ["lt", "0", "0"]
_TRUE: Tree = ["le", "0", "0"]


class UnwritableError(Exception):
    """A rule that the grammar of certificates does not hold."""


def parts(name: str, kind: str) -> tuple[str, ...]:
    """The real tensors that stand for a tensor."""
    return (f"{name}.re", f"{name}.im") if kind == "complex" else (name,)


def block(source: Block) -> dict[str, Any]:
    """`lets` and `results`, each [name, [[index, dim]...], expr]."""
    lets = {a.name: a for a in source.lets}
    return {"lets": assigns(source.lets, lets), "results": assigns(source.results, lets)}


def assigns(definitions: Iterable[Assign], lets: Mapping[str, Assign]) -> list[Any]:
    write = _Writer(lets)
    out = []
    for a in definitions:
        indices = [[i.name, i.dim] for i in a.indices]
        values = write.pair(a.value) if a.value.kind == "complex" else (write.real(a.value),)
        out += [[name, indices, value] for name, value in zip(parts(a.name, a.value.kind), values, strict=True)]
    return out


def expression(assign: Assign, kind: str) -> list[Any]:
    """[indices, expr] of an identity element, one for each part."""
    write = _Writer({})
    values = write.pair(assign.value) if kind == "complex" else (write.real(assign.value),)
    return [[[[i.name, i.dim] for i in assign.indices], value] for value in values]


class _Writer:
    def __init__(self, lets: Mapping[str, Assign]) -> None:
        self._lets = lets
        self._done: dict[Expr, Tree | Pair] = {}

    def real(self, e: Expr) -> Tree:
        out = self(e)
        if isinstance(out, tuple):
            raise UnwritableError("a complex value where a real one is meant")
        return out

    def pair(self, e: Expr) -> Pair:
        out = self(e)
        return out if isinstance(out, tuple) else (out, "0")

    def __call__(self, e: Expr) -> Tree | Pair:
        found = self._done.get(e)
        if found is None:
            found = self._done[e] = self._visit(e)
            for tree in found if isinstance(found, tuple) else (found,):
                if size(tree) > MAX_TREE:
                    raise UnwritableError("it is too large to write out")
        return found

    def _visit(self, e: Expr) -> Tree | Pair:
        match e:
            case Const(value=value):
                return str(value)
            case Infinity(negative=negative):
                return "-inf" if negative else "inf"
            case IndexValue(index=index):
                return ["index", index.name]
            case DimValue(dim=dim):
                return ["dim", dim]
            case Eye(row=row, col=col):
                return ["where", ["eq", self._number(row), self._number(col)], "1", "0"]
            case Ref(space=space, name=name, subs=subs, lag=lag):
                places = [self._place(s) for s in subs]
                told = f"{name}{{-{lag}}}" if lag else name
                trees = [[_SPACES[space], part, *places] for part in parts(told, e.kind)]
                return (trees[0], trees[1]) if len(trees) == 2 else trees[0]
            case Reduce(op=op, index=index, body=body):
                head = "maximum" if op == "max" else op
                if e.kind != "complex":
                    return [head, index.name, index.dim, self.real(body)]
                if op != "sum":
                    raise UnwritableError("a product of complex numbers over an index")
                re, im = ([head, index.name, index.dim, part] for part in self.pair(body))
                return re, im
            case Op(op="exp", args=(argument,)) if argument.kind != "complex":
                return self._exp(argument)
            case Op(op=op, args=args):
                if not any(a.kind == "complex" for a in (e, *args)):
                    return _REAL[op](*map(self.real, args))
                if op == "where":
                    test, xs, ys = self.real(args[0]), self.pair(args[1]), self.pair(args[2])
                    return ["where", test, xs[0], ys[0]], ["where", test, xs[1], ys[1]]
                if op not in _COMPLEX:
                    raise UnwritableError(f"'{op}' of complex numbers")
                return _COMPLEX[op](*map(self.pair, args))
        raise AssertionError(e)

    def _exp(self, argument: Expr) -> Tree:
        """exp(x - m) is 0 where x is -inf, whatever m: the language says so."""
        out: Tree = ["exp", self.real(argument)]
        terms = signed_terms(argument, self._definition)
        for sign, term in reversed(terms) if needs_safe_exp(terms) else ():
            out = ["where", ["eq", self.real(term), "-inf" if sign > 0 else "inf"], "0", out]
        return out

    def _definition(self, ref: Ref) -> Expr | None:
        return instantiate(self._lets[ref.name], ref.subs) if ref.name in self._lets else None

    def _number(self, sub: Sub) -> Tree:
        return ["index", sub.name] if isinstance(sub, Index) else str(sub) if isinstance(sub, int) else self.real(sub)

    def _place(self, sub: Sub) -> Any:
        if isinstance(sub, Index):
            return sub.name
        if isinstance(sub, int):
            return sub
        tree = self.real(sub)
        return int(tree) if isinstance(tree, str) else tree


def size(tree: Tree) -> int:
    """Nodes, counted up to a little above MAX_TREE."""
    count, stack = 0, [tree]
    while stack and count <= MAX_TREE:
        node = stack.pop()
        count += 1
        if isinstance(node, list):
            stack += node
    return count


# --- operators ----------------------------------------------------------------------------------


def _neg(x: Tree) -> Tree:
    return ["mul", "-1", x]


def _sub(x: Tree, y: Tree) -> Tree:
    return ["add", x, _neg(y)]


def _inverse(x: Tree) -> Tree:
    return ["pow", x, "-1"]


def _sigmoid(x: Tree) -> Tree:
    return _inverse(["add", "1", ["exp", _neg(x)]])


def _softplus(x: Tree) -> Tree:
    return ["log", ["add", "1", ["exp", x]]]


def _gelu(x: Tree) -> Tree:
    return ["mul", ["mul", "1/2", x], ["add", "1", ["erf", ["mul", x, ["pow", "2", "-1/2"]]]]]


def _as_is(op: str) -> Callable[..., Tree]:
    return lambda *args: [op, *args]


_REAL: dict[str, Callable[..., Tree]] = {
    **{op: _as_is(op) for op in ("add", "mul", "pow", "max", "min", "exp", "log", "sin", "cos", "erf")},
    **{op: _as_is(op) for op in ("lt", "le", "eq", "not", "where")},
    "or": lambda x, y: ["where", x, _TRUE, y],
    "and": lambda x, y: ["where", x, y, _FALSE],
    "gt": lambda x, y: ["lt", y, x],
    "ge": lambda x, y: ["le", y, x],
    "ne": lambda x, y: ["not", ["eq", x, y]],
    "sub": _sub,
    "div": lambda x, y: ["mul", x, _inverse(y)],
    "neg": _neg,
    "abs": lambda x: ["max", x, _neg(x)],
    "sign": lambda x: ["where", ["lt", "0", x], "1", ["where", ["lt", x, "0"], "-1", "0"]],
    "clamp": lambda x, lo, hi: ["min", ["max", x, lo], hi],
    "expm1": lambda x: ["add", ["exp", x], "-1"],
    "log1p": lambda x: ["log", ["add", "1", x]],
    "sqrt": lambda x: ["pow", x, "1/2"],
    "rsqrt": lambda x: ["pow", x, "-1/2"],
    "tanh": lambda x: _sub("1", ["mul", "2", _inverse(["add", "1", ["exp", ["mul", "2", x]]])]),
    "sigmoid": _sigmoid,
    "logsigmoid": lambda x: _neg(_softplus(_neg(x))),
    "softplus": _softplus,
    "relu": lambda x: ["max", x, "0"],
    "silu": lambda x: ["mul", x, _sigmoid(x)],
    "gelu": _gelu,
    "logaddexp": lambda x, y: ["log", ["add", ["exp", x], ["exp", y]]],
    "stop": lambda x: x,
    "real": lambda x: x,
    "imag": lambda x: "0",
    "conj": lambda x: x,
    "complex": _as_is("complex"),  # of kind complex, so that _COMPLEX has it
}


def _both(op: Callable[..., Tree]) -> Callable[..., Pair]:
    return lambda *pairs: (op(*(p[0] for p in pairs)), op(*(p[1] for p in pairs)))


def _times(x: Pair, y: Pair) -> Pair:
    re = _sub(["mul", x[0], y[0]], ["mul", x[1], y[1]])
    return re, ["add", ["mul", x[0], y[1]], ["mul", x[1], y[0]]]


def _over(x: Pair, y: Pair) -> Pair:
    norm = _inverse(["add", ["mul", y[0], y[0]], ["mul", y[1], y[1]]])
    return _times(_times(x, (y[0], _neg(y[1]))), (norm, "0"))


def _power(x: Pair, n: Pair) -> Pair:
    if not isinstance(n[0], str) or "/" in n[0] or n[1] != "0" or abs(int(n[0])) > 16:
        raise UnwritableError("a power of a complex number that is not a small whole one")
    out: Pair = ("1", "0")
    for _ in range(abs(int(n[0]))):
        out = _times(out, x)
    return out if int(n[0]) >= 0 else _over(("1", "0"), out)


def _exp(x: Pair) -> Pair:
    return ["mul", ["exp", x[0]], ["cos", x[1]]], ["mul", ["exp", x[0]], ["sin", x[1]]]


_COMPLEX: dict[str, Callable[..., Tree | Pair]] = {
    "add": _both(_as_is("add")),
    "sub": _both(_sub),
    "neg": _both(_neg),
    "stop": _both(lambda x: x),
    "mul": _times,
    "div": _over,
    "pow": _power,
    "exp": _exp,
    "abs": lambda x: ["pow", ["add", ["mul", x[0], x[0]], ["mul", x[1], x[1]]], "1/2"],
    "eq": lambda x, y: _REAL["and"](["eq", x[0], y[0]], ["eq", x[1], y[1]]),
    "ne": lambda x, y: ["not", _REAL["and"](["eq", x[0], y[0]], ["eq", x[1], y[1]])],
    "real": lambda x: x[0],
    "imag": lambda x: x[1],
    "conj": lambda x: (x[0], _neg(x[1])),
    "complex": lambda x, y: (x[0], y[0]),
}
