"""Run one method of a decorated class on symbolic arrays: what its arguments are, and what it may return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

from psmc.diagnostics import Diagnostic, PsmcError, fail
from psmc.frontend import arrays as ar
from psmc.frontend.pysource import here, is_ours, of_function, of_traceback
from psmc.frontend.scope import suggest
from psmc.frontend.symbolic import Array, TraceAttributeError, node_of, size
from psmc.frontend.writer import Tensors, Writer
from psmc.source import Span


class Record:
    """The names one argument of a method gives access to: x.k, x["k"], l.S, s.S, x.dims.K, x.params.A."""

    def __init__(self, what: str, scope: object, owner: str | None, tensors: Tensors, *more: tuple[str, Any]) -> None:
        self.__dict__["_tensors"] = tensors
        self.__dict__["_what"] = what
        self.__dict__["_scope"] = scope
        self.__dict__["_owner"] = owner
        self.__dict__["_more"] = dict(more)

    def __getitem__(self, name: str) -> Array:
        span = here()
        if name not in self._tensors:
            raise TraceAttributeError(self._unknown(str(name), span))
        return Array(ar.Leaf(span, self._tensors[name], owner=self._owner, name=name, scope=self._scope))

    def __getattr__(self, name: str) -> Any:
        if name in self._tensors:
            return self[name]
        if name in self._more:
            return self._more[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise TraceAttributeError(self._unknown(name, here()))

    def _unknown(self, name: str, span: Span) -> Diagnostic:
        known = [*self._tensors, *self._more]
        listed = f"it has {', '.join(known)}." if known else "it has none."
        return Diagnostic("PSM201", f"{self._what} '{name}'", span, helps=suggest(name, known) or (listed,))

    def __setattr__(self, name: str, value: Any) -> None:
        fail(
            "PSM255",
            f"'{name}' cannot be assigned here",
            here(),
            helps=("return the new values: return dict(…). Only the s of a recurrence takes assignments.",),
        )

    def __dir__(self) -> list[str]:
        return [*self._tensors, *self._more]

    def __iter__(self) -> Iterator[Any]:
        fail("PSM255", "this argument is not a sequence", here(), helps=("read its parts by name, such as x.k.",))

    def __repr__(self) -> str:
        return f"<{', '.join(self._tensors)}>"


class Dims:
    """The sizes of the dims as numbers."""

    def __init__(self, sizes: Mapping[str, int | None]) -> None:
        self._sizes = sizes

    def __getattr__(self, name: str) -> Array:
        span = here()
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._sizes:
            helps = suggest(name, self._sizes) or (f"the dims are {', '.join(self._sizes) or 'none'}.",)
            raise TraceAttributeError(Diagnostic("PSM201", f"unknown dim '{name}'", span, helps=helps))
        return Array(size(name, span, self._sizes[name]))

    __getitem__ = __getattr__

    def __dir__(self) -> list[str]:
        return [*self._sizes]


class Levels:
    """What a tree's counter holds, by the dim that counts its levels: at.L.S is an array over L, then S's dims."""

    def __init__(self, scope: object, owner: str | None, sizes: Mapping[str, int | None], state: Tensors) -> None:
        self._parts = scope, owner, state
        self._sizes = sizes

    def __getattr__(self, dim: str) -> Record:
        if dim.startswith("__"):
            raise AttributeError(dim)
        getattr(Dims(self._sizes), dim)  # or it is no dim
        scope, owner, state = self._parts
        return _Level(scope, owner, dim, state)

    __getitem__ = __getattr__

    def __dir__(self) -> list[str]:
        return [*self._sizes]


class _Level(Record):
    def __init__(self, scope: object, owner: str | None, dim: str, state: Tensors) -> None:
        super().__init__("the state has no component", scope, owner, state)
        self.__dict__["_dim"] = dim

    def __getitem__(self, name: str) -> Array:
        node = super().__getitem__(name)._node
        assert isinstance(node, ar.Leaf)
        return Array(replace(node, axes=(self._dim, *node.axes), level=True))


class State(Record):
    """The state inside a recurrence: reading gives the newest value, assigning is one statement."""

    def __init__(self, writer: Writer) -> None:
        super().__init__("the state has no component", writer, None, writer.declared.state)
        self.__dict__["_writer"] = writer

    def __getitem__(self, name: str) -> Array:
        array = super().__getitem__(name)
        version = self._writer.version.get(name, 0)
        if version == 0:
            return Array(ar.Leaf(array._node.span, array._node.axes, owner="prev", name=name, scope=self._writer))
        return Array(
            ar.Leaf(array._node.span, array._node.axes, owner=None, name=name, scope=self._writer, version=version)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        span = here()
        if name not in self._tensors:
            raise TraceAttributeError(self._unknown(name, span))
        self._writer.update(name, node_of(value, span), span)


# --- running a method ---------------------------------------------------------------------------


def call(fn: FunctionType, *args: Any, **named: Any) -> Any:
    """Run user code. Whatever it raises becomes a diagnostic at the place where it was raised."""
    try:
        return fn(*args, **named)
    except PsmcError:
        raise
    except Exception as error:
        if is_ours(error.__traceback__):
            raise
        text = str(error).split("\n", 1)[0]
        raise PsmcError(
            Diagnostic(
                "PSM254",
                f"'{fn.__name__}' raised {type(error).__name__}{': ' if text else ''}{text}",
                of_traceback(error.__traceback__, fn),
                helps=("a method runs once, on symbolic arrays: use their operators and psmc.lang.",),
            )
        ) from error


def extra_arguments(
    fn: FunctionType, required: tuple[str, ...], optional: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """Values for the optional arguments a method asks for by name. Raises PSM255 if its signature does not fit."""
    parameters = list(inspect.signature(fn).parameters.values())
    span = of_function(fn)
    usage = f"def {fn.__name__}({', '.join(required)})"
    if parameters and parameters[0].name in ("self", "cls"):
        fail(
            "PSM255",
            f"'{fn.__name__}' takes no '{parameters[0].name}'",
            span,
            helps=(f"write {usage}: there is no instance.",),
        )
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    extra = [p for p in (*plain[len(required) :], *(p for p in parameters if p not in plain)) if p.default is p.empty]
    unknown = [p.name for p in extra if p.name not in optional or p.kind == p.POSITIONAL_ONLY]
    if len(plain) < len(required) or unknown:
        more = f"; further arguments may be {' and '.join(optional)}, by these names" if optional else ""
        shown = ", ".join(p.name for p in parameters)
        fail(
            "PSM255",
            f"'{fn.__name__}' takes ({', '.join(required)}), not ({shown})",
            span,
            helps=(f"write {usage}{more}.",),
        )
    return {p.name: optional[p.name]() for p in plain[len(required) :] if p.name in optional} | {
        p.name: optional[p.name]() for p in extra if p.kind == p.KEYWORD_ONLY
    }


def returned(fn: FunctionType, value: Any, *, single: str | None = None) -> dict[str, ar.Node]:
    """The named values of a returned dict; one bare array counts as `single`. Raises PSM253."""
    span = of_function(fn)
    if single is not None and isinstance(value, Array):
        value = {single: value}
    if not isinstance(value, Mapping):
        what = "nothing" if value is None else f"a {type(value).__name__}"
        if inspect.iscoroutine(value):
            value.close()
        fail(
            "PSM253",
            f"'{fn.__name__}' returned {what}",
            span,
            helps=("return a dict of named values: return dict(S=…).",),
        )
    out: dict[str, ar.Node] = {}
    for name, part in value.items():
        if not isinstance(name, str) or not name.isidentifier():
            fail(
                "PSM253", f"'{fn.__name__}' returned a dict with the key {name!r:.40}", span, helps=("keys are names.",)
            )
        out[name] = node_of(part, span)
    return out
