"""Macros: `fn` bodies are elaborated in their own scope, with arguments bound to tensors or expressions.

Hygienic by construction: a body sees its parameters, its own indices, and the consts and fns of the file it was
written in; the index variables it binds are new ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from psmc import ir
from psmc.diagnostics import Diagnostic, Label, PsmcError, fail
from psmc.frontend import surface as sf
from psmc.frontend.elaborate import Elaborator, Env, Scope
from psmc.frontend.misuse import check_arguments
from psmc.frontend.scope import Fn, Handle, Library, Meaning, Namespace, suggest
from psmc.ir.ops import OPS

MAX_USES_SHOWN = 3


@dataclass(frozen=True)
class FnScope:
    """Names in a fn body: parameters, dims of the pattern, consts."""

    fn: Fn
    bound: dict[str, Meaning]
    caller: Scope

    @property
    def library(self) -> Library:
        return self.fn.library

    def read(self, node: sf.Access) -> Meaning:
        name = node.name.text
        if node.owner is not None:
            fail(
                "PSM210",
                f"a fn sees its arguments only, not '{node.owner.text}.{name}'",
                node.span,
                helps=(f"make it an argument: fn {self.fn.node.name.text}(…, x)",),
            )
        meaning = self.bound.get(name, self.library.consts.get(name))
        if meaning is None:
            fail(
                "PSM201",
                f"unknown name '{name}' in fn '{self.fn.node.name.text}'",
                node.span,
                helps=suggest(name, [*self.bound, *self.library.consts])
                or ("a fn sees its arguments and consts only",),
            )
        return delay(meaning, node)

    def knows(self, name: str) -> bool:
        return name in self.bound or name in self.library.consts

    def namespace(self) -> Namespace:
        return signature(self.fn)

    def size(self, dim: str) -> int | None:
        return self.caller.size(dim)


def delay(meaning: Meaning, node: sf.Access) -> Meaning:
    """Apply the tap of `x{-1}`, which only inputs have."""
    if not node.lag:
        return meaning
    if not isinstance(meaning, Handle) or meaning.space != "input":
        fail(
            "PSM221",
            f"only inputs have taps, and '{node.name.text}' is none",
            node.span,
            helps=("a state before this token is prev.S; a tap reads an earlier input: x{-1}",),
        )
    delayed = meaning.delayed(node.lag)
    if not 1 <= delayed.lag <= 64:
        fail("PSM221", f"this tap reaches back {delayed.lag} tokens, and taps reach back 1 to 64", node.span)
    return delayed


def signature(fn: Fn) -> Namespace:
    """The names of a fn's head; fails if one is used twice for different things."""
    space = Namespace()
    for const, span in fn.library.const_spans.items():
        space.adopt(const, "const", span)
    for name, _ in fn.node.params:
        space.declare(name, "param")
    for _, dims in fn.node.params:
        for dim in dims:
            if space.role(dim.text) != "dim":
                space.declare(dim, "dim")
    return space


def check_fn(fn: Fn) -> None:
    """What can be said of a fn before it is used."""
    name = fn.node.name
    if name.text == "eye" or (name.text in OPS and OPS[name.text].symbol is None):
        fail("PSM202", f"'{name.text}' is an operator of the language", name.span, helps=("choose another name",))
    space = signature(fn)
    for index in fn.node.indices:
        space.declare(index, "index")


def expand(caller: Elaborator, fn: Fn, node: sf.Call, env: Env, depth: int) -> ir.Expr:
    """The value of `fn(args)[subs]` at the call's place."""
    name = fn.node.name.text
    if fn in caller.stack:
        fail(
            "PSM216",
            f"fn '{name}' calls itself",
            node.span,
            labels=(Label(fn.node.name.span, "defined here"),),
            helps=("fns are expanded in place and cannot recurse; a recurrence over time is 'recurrence { … }'",),
        )
    check_arguments(node, [p.text for p, _ in fn.node.params])
    if len(node.subs or ()) != len(fn.node.indices):
        _wrong_subscripts(fn, node)
    bound: dict[str, Meaning] = {}
    for (param, dims), arg in zip(fn.node.params, node.args, strict=True):
        if not dims:
            bound[param.text] = caller.expr(arg, env, depth + 1)
            continue
        handle = _tensor(caller, arg, env, param, dims)
        bound[param.text] = handle
        for pattern, dim in zip(dims, handle.dims, strict=True):
            known = bound.setdefault(pattern.text, ir.DimValue(dim))
            if known != ir.DimValue(dim):
                assert isinstance(known, ir.DimValue)
                fail(
                    "PSM206",
                    f"dim '{pattern.text}' of fn '{name}' is '{known.dim}' and '{dim}' in this call",
                    node.span,
                )
    inner: dict[str, ir.Sub] = {}
    for index, written in zip(fn.node.indices, node.subs or (), strict=True):
        inner[index.text] = caller.sub(written, None, env, depth + 1)
    body = Elaborator(FnScope(fn, bound, caller.scope), caller.indices, caller.budget, (*caller.stack, fn))
    try:
        return body.expr(fn.node.value, inner, depth + 1)
    except PsmcError as error:
        place = Label(node.span, f"'{name}' is used here")
        raise PsmcError(*(_used_at(d, place) for d in error.diagnostics)) from None


def _used_at(diagnostic: Diagnostic, place: Label) -> Diagnostic:
    """Of nested uses the innermost and the outermost are shown."""
    labels = diagnostic.labels if len(diagnostic.labels) < MAX_USES_SHOWN else diagnostic.labels[:-1]
    return replace(diagnostic, labels=(*labels, place))


def _wrong_subscripts(fn: Fn, node: sf.Call) -> None:
    name, rank = fn.node.name.text, len(fn.node.indices)
    shown = f"{name}(…)[{', '.join(i.text for i in fn.node.indices)}]" if rank else f"{name}(…)"
    fail(
        "PSM203",
        f"fn '{name}' gives {f'a tensor of {rank} dim' + ('s' if rank > 1 else '') if rank else 'a number'}, and "
        f"{len(node.subs or ()) or 'no'} subscripts are given",
        node.span,
        helps=(f"write {shown}",),
    )


def _tensor(caller: Elaborator, arg: sf.ExprNode, env: Env, param: sf.Name, dims: tuple[sf.Name, ...]) -> Handle:
    """A tensor argument, given as a bare name."""
    expected = f"{param.text}[{', '.join(d.text for d in dims)}]"
    if not isinstance(arg, sf.Access) or arg.subs is not None or (arg.owner is None and arg.name.text in env):
        fail(
            "PSM218",
            f"this argument is the tensor {expected}: give its name, without subscripts",
            arg.span,
            helps=("name a longer expression first: let y[i] = …",),
        )
    meaning = caller.scope.read(arg)
    if not isinstance(meaning, Handle):
        fail("PSM218", f"this argument is the tensor {expected}, and '{arg.name.text}' is a number", arg.span)
    if len(meaning.dims) != len(dims):
        found = f"has {len(meaning.dims)} dims" if meaning.dims else "is a scalar"
        fail("PSM218", f"this argument is the tensor {expected}, and '{arg.span.text}' {found}", arg.span)
    return meaning
