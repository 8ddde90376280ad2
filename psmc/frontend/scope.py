"""What names mean: declared entities, one namespace with collisions, and did-you-mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal, Self, TypeAlias

from psmc import ir
from psmc.diagnostics import Diagnostic, Label, PsmcError, fail
from psmc.frontend import surface as sf
from psmc.ir.ops import OPS
from psmc.source import Span

Role = Literal["dim", "input", "param", "state", "const", "let", "loop", "index", "output"]
BlockKind = Literal["lift", "combine", "recurrence", "output", "identity", "const", "fn"]

# `agg(q, k, ..., mask=...)`: names of the call's own keywords cannot be inputs or params.
CALL_KEYWORDS = frozenset(
    ("cu_seqlens", "initial_state", "mask", "reset", "return_state", "reverse", "self", "slots", "state")
)


@dataclass(frozen=True)
class Handle:
    """A tensor that can be subscripted: a declared one, one operand's component, or a let."""

    space: ir.Space
    name: str
    dims: tuple[str, ...]
    kind: ir.Kind
    lag: int = 0

    def at(self, subs: tuple[ir.Sub, ...]) -> ir.Ref:
        return ir.Ref(self.space, self.name, subs, self.kind, self.lag)

    def delayed(self, lag: int) -> Handle:
        return replace(self, lag=self.lag + lag)


Meaning: TypeAlias = Handle | ir.Expr


@dataclass(frozen=True, eq=False)
class Fn:
    """A macro and the consts and fns that its body sees."""

    node: sf.Fn
    library: Library


@dataclass
class Library:
    """The consts and fns visible at one place: a file's, or an aggregator's own on top of it."""

    fns: dict[str, Fn] = field(default_factory=dict)
    consts: dict[str, ir.Expr] = field(default_factory=dict)
    const_spans: dict[str, Span] = field(default_factory=dict)


class Errors:
    """Collects the diagnostics of independent parts, so that one run reports them together."""

    LIMIT = 20

    def __init__(self) -> None:
        self._found: list[Diagnostic] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, PsmcError):
            self._found += [d for d in error.diagnostics if d not in self._found]
            return True
        return isinstance(error, Poisoned)

    def __bool__(self) -> bool:
        return bool(self._found)

    def flush(self) -> None:
        """Raise everything found so far, if anything."""
        if self._found:
            raise PsmcError(*sorted(self._found, key=_place)[: self.LIMIT])


def _place(diagnostic: Diagnostic) -> tuple[str, int]:
    return (diagnostic.span.source.name, diagnostic.span.start) if diagnostic.span else ("", -1)


class Poisoned(Exception):
    """A name whose definition was already reported: what reads it stays silent."""


class Namespace:
    """One namespace: dims, inputs, params, components, consts and lets of an aggregator."""

    def __init__(self, entries: Mapping[str, tuple[Role, Span | None]] | None = None) -> None:
        self._entries = dict(entries or {})

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def copy(self) -> Namespace:
        return Namespace(self._entries)

    def declare(self, name: sf.Name, role: Role) -> None:
        self.check_free(name, role)
        self._entries[name.text] = (role, name.span)

    def adopt(self, name: str, role: Role, span: Span | None) -> None:
        """Declare without checks (a library's consts)."""
        self._entries[name] = (role, span)

    def check_free(self, name: sf.Name, role: Role) -> None:
        """Fail with both places if the name is taken."""
        found = self._entries.get(name.text)
        if found is None:
            return
        other, span = found
        same = (
            f"'{name.text}' is declared twice" if other == role else f"'{name.text}' is already the name of {a(other)}"
        )
        fail(
            "PSM202",
            same,
            name.span,
            label=f"{a(role)} here",
            labels=() if span is None or span == name.span else (Label(span, f"{a(other)} here"),),
            helps=("indices, dims, inputs, params, state, consts and lets share one namespace: rename one of the two",),
        )

    def role(self, name: str) -> Role | None:
        found = self._entries.get(name)
        return found[0] if found else None

    def names(self, *roles: Role) -> list[str]:
        return [n for n, (role, _) in self._entries.items() if not roles or role in roles]


_ROLE_TEXT: dict[str, str] = {
    "state": "a component of the state",
    "input": "an input",
    "loop": "a loop variable",
    "index": "an index",
    "output": "an output",
}


def a(role: str) -> str:
    """The role with its article, for messages."""
    return _ROLE_TEXT.get(role, f"a {role}")


def check_argument(name: sf.Name) -> None:
    """Inputs and params are arguments of the compiled function."""
    if name.text in CALL_KEYWORDS:
        fail(
            "PSM226",
            f"'{name.text}' cannot be an input or param: the compiled function has a keyword argument of that name",
            name.span,
            helps=(f"write '{name.text}_in' or another name",),
        )


def suggest(name: str, candidates: Iterable[str]) -> tuple[str, ...]:
    """Help lines for an unknown name."""
    close = get_close_matches(name, sorted(set(candidates)), n=2, cutoff=0.6)
    if not close:
        folded = [c for c in sorted(set(candidates)) if c.lower() == name.lower()]
        close = folded[:1]
    return (f"did you mean {' or '.join(repr(c) for c in close)}?",) if close else ()


def callable_ops() -> list[str]:
    """The operators that are written as calls."""
    return [name for name, info in OPS.items() if info.symbol is None]
