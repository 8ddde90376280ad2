"""Which sections an aggregator has, and what it claims of its rule."""

from __future__ import annotations

import re
from typing import TypeVar

from psmc import ir
from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.frontend.declare import Declarations
from psmc.frontend.scope import Errors
from psmc.source import Span

T = TypeVar("T")


def one(node: sf.Aggregator, kind: type[T]) -> T | None:
    """The section of this kind; the frontends refuse a second one."""
    return next((item for item in node.items if isinstance(item, kind)), None)


def check_sections(
    node: sf.Aggregator,
    lift: sf.Lift | None,
    combine: sf.Combine | sf.CombineExtern | None,
    recurrence: sf.Recurrence | None,
) -> None:
    name = node.name
    if combine is None and recurrence is None:
        fail(
            "PSM213",
            f"aggregator '{name.text}' has neither a combine nor a recurrence",
            name.span,
            helps=(
                "say how two elements combine: combine (l, r) { … }; "
                "or how a token changes the state: recurrence { … }",
            ),
        )
    if recurrence is None:
        return
    if combine is not None:
        fail(
            "PSM213",
            f"aggregator '{name.text}' has a combine and a recurrence",
            head(recurrence),
            labels=(Label(head(combine), "the combine"),),
            helps=("keep one: a recurrence is lifted to a combine for you",),
        )
    if lift is not None:
        fail(
            "PSM213",
            "a recurrence reads the inputs itself and takes no lift",
            head(lift),
            labels=(Label(head(recurrence), "the recurrence"),),
            helps=("move the lift's statements into the recurrence as lets",),
        )


def head(section: sf.Lift | sf.Combine | sf.CombineExtern | sf.Recurrence) -> Span:
    """The keyword that opens a section."""
    word = re.match(r"\w*", section.span.text)
    return Span(section.span.source, section.span.start, section.span.start + (word.end() if word else 0))


def claimed(
    node: sf.Aggregator,
    combine: sf.Combine | sf.CombineExtern | None,
    recurrence: sf.Recurrence | None,
    found: Declarations,
    errors: Errors,
) -> tuple[ir.Claim, ir.Order]:
    """What is claimed of the rule, and the order that is its meaning if nothing is."""
    claim, order = one(node, sf.Claim), one(node, sf.Order)
    with errors:
        if claim is None:
            fail(
                "PSM214",
                f"aggregator '{node.name.text}' does not say whether its rule is associative",
                node.name.span,
                helps=("add 'associative: yes' to have it proved, or 'associative: no' to fix an order",),
            )
        found.origin["claim"] = claim.span
        if isinstance(combine, sf.CombineExtern) and claim.value == "yes":
            fail(
                "PSM214",
                "nothing can be proved of a rule that Python gives",
                claim.span,
                labels=(Label(head(combine), "the rule is extern"),),
                helps=("write 'associative: assume' to vouch for it, or 'associative: no' for a fixed order",),
            )
        if order is not None:
            found.origin["order"] = order.span
            if claim.value != "no":
                fail(
                    "PSM214",
                    f"an order is only meant with 'associative: no'; '{claim.value}' leaves it free",
                    order.span,
                    labels=(Label(claim.span, "claimed here"),),
                    helps=("delete one of the two",),
                )
            if recurrence is not None and order.value == "tree":
                fail(
                    "PSM214",
                    "a recurrence that is not associative can only run from left to right",
                    order.span,
                    labels=(Label(head(recurrence), "the recurrence"),),
                    helps=("write 'order: left'",),
                )
    if claim is None:
        return "no", "tree"
    if claim.value == "no" and recurrence is not None:
        return "no", "left"
    return claim.value, order.value if order else "tree"
