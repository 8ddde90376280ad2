"""`const`, `fn` and `use`: what a file offers to its aggregators and to files that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.frontend.budget import Budget
from psmc.frontend.elaborate import Elaborator
from psmc.frontend.expand import check_fn
from psmc.frontend.indices import Indices
from psmc.frontend.scope import Errors, Fn, Library, Meaning, Namespace, suggest
from psmc.source import Span

Load = Callable[[str, Span], sf.File]
MAX_USES = 100


@dataclass
class _ConstScope:
    """Constants read constants only."""

    library: Library
    pending: dict[str, sf.Const]
    others: frozenset[str]  # what else an aggregator declares
    resolving: list[str] = field(default_factory=list)

    def read(self, node: sf.Access) -> Meaning:
        name = node.name.text
        if node.owner is None and not node.lag:
            if name in self.resolving:
                fail(
                    "PSM215",
                    f"const '{name}' is defined by itself",
                    node.span,
                    labels=(Label(self.library.const_spans[name], "defined here"),),
                    helps=("break the cycle: one of the consts on it needs a value of its own",),
                )
            if name in self.pending:
                self.resolve(name)
            if name in self.library.consts:
                return self.library.consts[name]
        if not self.knows(name) and name not in self.others:
            fail(
                "PSM201",
                f"unknown const '{name}'",
                node.span,
                helps=suggest(name, [*self.library.consts, *self.pending]),
            )
        fail(
            "PSM225",
            f"a const is made of numbers and consts, and '{name}' is neither",
            node.span,
            helps=("use 'let'",),
        )

    def resolve(self, name: str) -> None:
        node = self.pending[name]
        self.resolving.append(name)
        try:
            value = Elaborator(self, Indices(), Budget()).expr(node.value, {})
            if value.kind == "bool":
                fail("PSM208", f"const '{name}' is a condition, not a number", node.value.span)
            self.library.consts[name] = value
        finally:
            self.resolving.pop()
            self.pending.pop(name, None)

    def knows(self, name: str) -> bool:
        return name in self.library.consts or name in self.pending

    def namespace(self) -> Namespace:
        return Namespace({n: ("const", s) for n, s in self.library.const_spans.items()})

    def size(self, dim: str) -> int | None:
        del dim
        return None


def extend(
    base: Library,
    consts: Iterable[sf.Const],
    fns: Iterable[sf.Fn],
    errors: Errors,
    others: frozenset[str] = frozenset(),
) -> Library:
    """`base` and the definitions given; `base` itself is left alone. Order does not matter."""
    library = Library(dict(base.fns), dict(base.consts), dict(base.const_spans))
    pending: dict[str, sf.Const] = {}
    for const in consts:
        with errors:
            _check_new(const.name, library.const_spans.get(const.name.text), "const")
            library.const_spans[const.name.text] = const.name.span
            pending[const.name.text] = const
    added: list[Fn] = []
    for node in fns:
        with errors:
            known = library.fns.get(node.name.text)
            _check_new(node.name, known.node.name.span if known else None, "fn")
            added.append(Fn(node, library))
            library.fns[node.name.text] = added[-1]
    scope = _ConstScope(library, pending, others)
    for name in list(pending):
        if name in pending:
            with errors:
                scope.resolve(name)
    for fn in added:
        with errors:
            check_fn(fn)
    return library


def _check_new(name: sf.Name, known: Span | None, what: str) -> None:
    if known is not None:
        labels = (Label(known, "first defined here"),) if known != name.span else ()
        fail(
            "PSM202",
            f"{what} '{name.text}' is defined twice",
            name.span,
            labels=labels,
            helps=("rename one of the two",),
        )


def file_library(file: sf.File, load: Load | None, errors: Errors) -> Library:
    """The consts and fns of a file, those of the files it uses included (one level: `use` does not re-export)."""
    return _Loader(load, errors).whole(file)


class _Loader:
    def __init__(self, load: Load | None, errors: Errors) -> None:
        self._load = load
        self._errors = errors
        self._done: dict[str, Library] = {}
        self._open: list[str] = []
        self._count = 0

    def whole(self, file: sf.File) -> Library:
        """What the aggregators of `file` see."""
        self._open.append(file.source.name)
        seen = Library()
        for use in file.uses:
            with self._errors:
                self._merge(seen, self._used(use), use)
        self._open.pop()
        return extend(seen, file.consts, file.fns, self._errors)

    def _used(self, use: sf.Use) -> Library:
        """What one used file defines itself."""
        if self._load is None:
            fail(
                "PSM224",
                f"'{use.path}' cannot be used here: this spec is not a file",
                use.span,
                helps=("write the fns and consts into the spec",),
            )
        self._count += 1
        if self._count > MAX_USES:
            fail("PSM224", f"more than {MAX_USES} files are used", use.span)
        file = self._load(use.path, use.span)
        name = file.source.name
        if name in self._open:
            chain = " uses ".join(f"'{n}'" for n in (*self._open[self._open.index(name) :], name))
            fail(
                "PSM224",
                f"files use each other in a cycle: {chain}",
                use.span,
                helps=("move what both need to a third file",),
            )
        if name not in self._done:
            whole = self.whole(file)
            own_consts = {c.name.text for c in file.consts}
            own_fns = {f.name.text for f in file.fns}
            self._done[name] = Library(
                {n: fn for n, fn in whole.fns.items() if n in own_fns},
                {n: value for n, value in whole.consts.items() if n in own_consts},
                {n: span for n, span in whole.const_spans.items() if n in own_consts},
            )
        return self._done[name]

    @staticmethod
    def _merge(into: Library, used: Library, use: sf.Use) -> None:
        for name, fn in used.fns.items():
            if name in into.fns and into.fns[name] != fn:
                fail("PSM202", f"fn '{name}' comes from two files", use.span, helps=("rename one of the two",))
            into.fns[name] = fn
        for name, span in used.const_spans.items():
            if into.const_spans.setdefault(name, span) != span:
                fail("PSM202", f"const '{name}' comes from two files", use.span, helps=("rename one of the two",))
        into.consts.update(used.consts)
