"""The decorator frontend: a class with methods lift, combine, recurrence, output to the surface AST of a .psm file.

    class GLA:
        def lift(x):        return dict(a=exp(x.g), S=outer(x.k, x.v))
        def combine(l, r):  return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)
        def output(s, x):   return x.q @ s.S / sqrt(x.dims.K)

Every method is called once. `x` holds this token's inputs, the params and what the method `let` returned; `x.dims.K` is
the size of a dim; `x.k.lag(1)` is an input one token earlier; an input that is itself called 'dims' is x["dims"]. A
method may ask for more by name: `prev`, the state before this token (recurrence, output), and `p`, the params (in any:
`combine(l, r, p)`). A recurrence returns its new components, or assigns them in order, `s.S = ...`, where reading gives
the newest value.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Literal, NoReturn

from psmc.diagnostics import fail
from psmc.frontend import surface as sf
from psmc.frontend.names import name_problem
from psmc.frontend.psm import parse_declarations
from psmc.frontend.pysource import Decoration, decoration, here, of_function
from psmc.frontend.trace import Dims, Levels, Record, State, call, extra_arguments, returned
from psmc.frontend.writer import Declared, Writer
from psmc.source import MAX_SOURCE_BYTES, Span

METHODS = ("let", "lift", "combine", "recurrence", "output")
MAX_DIM = 1 << 20


@dataclass(frozen=True)
class Extern:
    """A combine rule from Python: `fn(l, r)` on dicts of batched tensors."""

    fn: Callable[..., Any]
    span: Span

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.fn(*args, **named)


def extern(fn: Callable[..., Any]) -> Extern:
    """`combine = extern(module)` in a class body, or as a decorator of `combine`: this callable is the rule, untraced.

    Raises PsmcError (PSM258) for what cannot be called as a rule.
    """
    if isinstance(fn, type) or not callable(fn):
        what = "a class" if isinstance(fn, type) else f"a {type(fn).__name__}"
        fail(
            "PSM258",
            f"extern takes a function or a module, not {what}",
            here(),
            helps=("make an instance: extern(Block(…)).",),
        )
    return Extern(fn, here())


def trace(
    cls: type,
    *,
    state: str,
    associative: bool | str,
    inputs: str = "",
    params: str = "",
    dims: str = "",
    order: str | None = None,
    name: str | None = None,
) -> sf.File:
    """The surface AST of a decorated class, every node spanned in its Python source.

    `inputs`, `params` and `state` hold declarations as a .psm file writes them, commas optional; `dims` does too
    ("K V R=2"), and left empty it is every dim the others name, in that order. The aggregator is called `name`, or
    like the class, in snake case. Raises PsmcError: 1xx for the strings, 2xx for the methods.
    """
    return _Tracer(cls, name).file(
        {"inputs": inputs, "params": params, "state": state, "dims": dims}, associative, order
    )


class _Tracer:
    def __init__(self, cls: type, name: str | None) -> None:
        if not isinstance(cls, type):
            fail("PSM258", f"the decorator stands on a class, not on a {type(cls).__name__}", here())
        self.cls = cls
        self.methods = {m: f for m in METHODS if (f := self._method(m)) is not None}
        own = sorted(f for f, v in vars(cls).items() if isinstance(_plain(v), FunctionType))
        functions: list[FunctionType] = [_plain(vars(cls)[f]) for f in own]
        self.at: Decoration = decoration(cls, functions)
        self._check_methods(own)
        text = snake_case(cls.__name__) if name is None else name
        if name is None and name_problem(text, None) is not None:
            text = cls.__name__  # Sum: 'sum' is a word of the language
        span = self.at.span if name is None else self.at.argument("name")
        self.name = sf.Name(text, span)
        problem = name_problem(text, span) if isinstance(text, str) else None
        if not isinstance(text, str):
            self._argument("name", "a string", name)
        if problem is not None:
            fail(problem.code, problem.message, span, helps=problem.helps)

    def _method(self, name: str) -> Any:
        value = _plain(inspect.getattr_static(self.cls, name, None))
        if value is None or isinstance(value, FunctionType | Extern):
            return value
        fail("PSM255", f"'{name}' is a {type(value).__name__}, not a method", here(), helps=(f"write def {name}(…).",))

    def _check_methods(self, own: list[str]) -> None:
        for found in own:
            near = get_close_matches(found, METHODS, 1, 0.75)
            if near and found not in METHODS and near[0] not in self.methods:
                span = of_function(_plain(vars(self.cls)[found]))
                fail("PSM255", f"'{found}' is not a part of an aggregator", span, helps=(f"did you mean '{near[0]}'?",))

    # --- declarations -----------------------------------------------------------------------------

    def file(self, strings: dict[str, str], associative: object, order: object) -> sf.File:
        items: list[sf.Item] = [
            *self._declarations("input", "inputs", strings["inputs"]),
            *self._declarations("param", "params", strings["params"]),
            *self._declarations("state", "state", strings["state"]),
        ]
        items = [*self._dims(strings["dims"], items), *items]
        items.append(sf.Claim(self._claim(associative), self.at.argument("associative")))
        if order is not None and order != "tree" and order != "left":
            fail("PSM108", f"'order' is tree or left, not {order!r:.40}", self.at.argument("order"))
        if order is not None:
            items.append(sf.Order("tree" if order == "tree" else "left", self.at.argument("order")))
        declared = self._shapes(items)
        if declared.state:  # without one the resolver says so; any method would only fail on it
            items += self._sections(declared)
        doc = inspect.cleandoc(vars(self.cls).get("__doc__") or "")
        aggregator = sf.Aggregator(self.name, doc, tuple(items), self.at.span)
        return sf.File(self.at.source, (), (), (), (aggregator,))

    def _declarations(
        self, role: Literal["input", "param", "state"], key: str, text: object
    ) -> tuple[sf.Declared, ...]:
        if not isinstance(text, str):
            self._argument(key, "a string of declarations, such as 'q[K] k[K]'", text)
        if len(text) > MAX_SOURCE_BYTES:
            fail("PSM501", f"'{key}' has {len(text):,} characters", self.at.argument(key))
        span = self.at.string(key, text, self.cls.__name__)
        return parse_declarations(span.source, role, span.start, span.end)

    def _dims(self, text: object, items: list[sf.Item]) -> list[sf.Dim]:
        if text == "":
            found: dict[str, sf.Dim] = {}
            for item in items:
                for dim in item.dims if isinstance(item, sf.Declared) else ():
                    found.setdefault(dim.text, sf.Dim(dim))
            return list(found.values())
        return [self._dim(d) for d in self._declarations("state", "dims", text)]

    def _dim(self, item: sf.Declared) -> sf.Dim:
        value = item.identity
        if item.dims or item.kind != "real" or item.interval is not None:
            fail(
                "PSM109",
                f"'{item.name.text}' is a dim: a name, or a name and its size",
                item.span,
                helps=("write R=2.",),
            )
        if value is None:
            return sf.Dim(item.name)
        if not isinstance(value, sf.Number) or value.value.denominator != 1 or not 1 <= value.value <= MAX_DIM:
            fail("PSM109", f"the size of a dim is a whole number from 1 to {MAX_DIM:,}", value.span)
        return sf.Dim(item.name, int(value.value))

    def _claim(self, value: object) -> Literal["yes", "assume", "no"]:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if value == "assume":
            return "assume"
        fail("PSM108", f"'associative' is True, False or 'assume', not {value!r:.40}", self.at.argument("associative"))

    def _argument(self, key: str, wanted: str, value: object) -> NoReturn:
        help_ = "write it as in a .psm file: declarations side by side in one string."
        fail("PSM258", f"'{key}' is {wanted}, not a {type(value).__name__}", self.at.argument(key), helps=(help_,))

    def _shapes(self, items: list[sf.Item]) -> Declared:
        def of(role: str) -> dict[str, tuple[str | None, ...]]:
            return {
                i.name.text: tuple(d.text for d in i.dims)
                for i in items
                if isinstance(i, sf.Declared) and i.role == role
            }

        sizes = {i.name.text: i.size for i in items if isinstance(i, sf.Dim)}
        return Declared(of("input"), of("param"), of("state"), sizes)

    # --- methods ----------------------------------------------------------------------------------

    def _sections(self, declared: Declared) -> list[sf.Item]:
        out: list[sf.Item] = []
        for name, method in self.methods.items():
            if isinstance(method, Extern):
                if name != "combine":
                    fail("PSM255", f"only 'combine' can be extern, not '{name}'", method.span)
                out.append(sf.CombineExtern(method.span, method.fn))
            else:
                out += getattr(self, f"_{name}")(method, Writer(declared), of_function(method))
        return out

    def _token(self, writer: Writer) -> Record:
        declared = writer.declared
        known = {**declared.inputs, **declared.params, **declared.lets}
        return Record(
            "unknown name", writer, None, known, ("dims", Dims(declared.sizes)), ("params", self._params(writer))
        )

    def _params(self, writer: Writer) -> Record:
        declared = writer.declared
        return Record("unknown param", writer, None, declared.params, ("dims", Dims(declared.sizes)))

    def _state(self, writer: Writer, owner: str | None) -> Record:
        declared = writer.declared
        return Record("the state has no component", writer, owner, declared.state, ("dims", Dims(declared.sizes)))

    def _let(self, fn: FunctionType, writer: Writer, span: Span) -> list[sf.Item]:
        named = extra_arguments(fn, ("x",), {"p": lambda: self._params(writer)})
        values = returned(fn, call(fn, self._token(writer), **named))
        writer.results(values, {})
        writer.declared.lets.update(writer.axes)
        return [sf.Assign(s.target, s.indices, s.value, s.span, let=True) for s in writer.statements]

    def _lift(self, fn: FunctionType, writer: Writer, span: Span) -> list[sf.Item]:
        named = extra_arguments(fn, ("x",), {"p": lambda: self._params(writer)})
        writer.results(returned(fn, call(fn, self._token(writer), **named)), writer.declared.state)
        return [sf.Lift(tuple(writer.statements), span)]

    def _combine(self, fn: FunctionType, writer: Writer, span: Span) -> list[sf.Item]:
        named = extra_arguments(fn, ("l", "r"), {"p": lambda: self._params(writer)})
        left, right = list(inspect.signature(fn).parameters)[:2]
        values = call(fn, self._state(writer, left), self._state(writer, right), **named)
        writer.results(returned(fn, values), writer.declared.state)
        return [sf.Combine(sf.Name(left, span), sf.Name(right, span), tuple(writer.statements), span)]

    def _recurrence(self, fn: FunctionType, writer: Writer, span: Span) -> list[sf.Item]:
        state = State(writer)
        optional = {"prev": lambda: self._state(writer, "prev"), "p": lambda: self._params(writer)}
        value = call(fn, state, self._token(writer), **extra_arguments(fn, ("s", "x"), optional))
        if value is not None or not writer.statements:
            writer.results(returned(fn, value), writer.declared.state)
        return [sf.Recurrence(tuple(writer.statements), span)]

    def _output(self, fn: FunctionType, writer: Writer, span: Span) -> list[sf.Item]:
        optional: dict[str, Callable[[], Any]] = {
            "prev": lambda: self._state(writer, "prev"),
            "p": lambda: self._params(writer),
            "at": lambda: Levels(writer, None, writer.declared.sizes, writer.declared.state),
            "prev_at": lambda: Levels(writer, "prev", writer.declared.sizes, writer.declared.state),
        }
        named = extra_arguments(fn, ("s", "x"), optional)
        value = call(fn, self._state(writer, None), self._token(writer), **named)
        writer.outputs(returned(fn, value, single="o"))
        return [sf.Output(tuple(writer.statements), span)]


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod) else value


def snake_case(name: str) -> str:
    """GatedDeltanet -> gated_deltanet, GLARecurrence -> gla_recurrence, S4D -> s4d."""
    return re.sub(r"(?<=[a-zA-Z0-9])(?=[A-Z][a-z])", "_", name).lower()
