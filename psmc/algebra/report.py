"""Diagnostics of the 3xx block: what the verdicts mean for the person who wrote the spec."""

from __future__ import annotations

from collections.abc import Callable

from psmc.algebra.intervals import closure
from psmc.algebra.prover import prove
from psmc.algebra.repair import Repair, repair
from psmc.algebra.verdict import Counterexample, Proof, Refuted, Unknown
from psmc.diagnostics import Diagnostic, Label, PsmcError
from psmc.ir import Aggregator, Block

_AT_INFINITY = "write the rule so that it has a value there, as logaddexp(x, y) or where(...) have at infinity"
_BOUNDED = "declare intervals on the state and the params where values are known to be positive or bounded"
_HALF = {"lift": "lift may give one", "combine": "combine may give one for two inside"}


def diagnostic_for(
    agg: Aggregator, proof: Proof, find: Callable[[Aggregator, Proof], Repair | None] = repair
) -> Diagnostic | None:
    """The error that a proof amounts to under the spec's claim, if it is one; `find` looks for a repair to offer.

    PSM301 the claim (yes or assume) is refuted, PSM302 the identity element is wrong, PSM303 `yes` could not be proved,
    PSM304 the identity could not be proved under `yes`, PSM901 two methods contradict each other.
    """
    if agg.claim == "no":
        return None
    for verdict in (proof.associativity, proof.identity):
        if isinstance(verdict, Unknown) and "PSM901" in verdict.residual:
            return _contradiction(agg, verdict)
    if isinstance(proof.associativity, Refuted):
        return _refuted(agg, proof.associativity.counterexample, find(agg, proof))
    if isinstance(proof.identity, Refuted):
        return _wrong_identity(agg, proof.identity.counterexample, find(agg, proof))
    if agg.claim == "assume":
        return None
    if isinstance(proof.associativity, Unknown):
        message = "'combine' is claimed associative, which could not be proved."
        return _undecided(agg, "PSM303", message, proof.associativity)
    if isinstance(proof.identity, Unknown):
        return _undecided(agg, "PSM304", "the identity element could not be proved to be one.", proof.identity)
    return None


def require(agg: Aggregator, budget: float = 20.0) -> Proof:
    """The proof; PsmcError PSM301-PSM304 if it does not carry the spec's claim."""
    proof = prove(agg, budget)
    diagnostic = diagnostic_for(agg, proof)
    if diagnostic is not None:
        raise PsmcError(diagnostic)
    return proof


def _claim(agg: Aggregator, text: str) -> tuple[Label, ...]:
    span = agg.where("claim")
    return () if span is None else (Label(span, text),)


def _repair_lines(repaired: Repair | None) -> tuple[str, ...]:
    if repaired is None:
        return ()
    return (f"{repaired.why}: write '{repaired.text}' (both laws are proved with it)",)


def _refuted(agg: Aggregator, found: Counterexample, repaired: Repair | None) -> Diagnostic:
    vouched = agg.claim == "assume"
    return Diagnostic(
        "PSM301",
        "'combine' is claimed associative but is not.",
        agg.where(f"combine {found.component}", "combine", "claim", "name"),
        f"'{found.component}' depends on the parenthesisation",
        _claim(agg, "vouched for here" if vouched else "claimed here"),
        (found.text, *_interval_notes(agg)),
        (
            *_repair_lines(repaired),
            "correct the rule, or write 'associative: no' if a fixed order is the meaning",
            *(("'assume' is for rules that cannot be decided; this one is decided",) if vouched else ()),
        ),
    )


def _wrong_identity(agg: Aggregator, found: Counterexample, repaired: Repair | None) -> Diagnostic:
    side = "e∘x" if found.law == "left identity" else "x∘e"
    fails = f"{side} = x fails" if found.left is not None else f"{side} has no value"
    return Diagnostic(
        "PSM302",
        f"the declared identity element is not one: {fails} for '{found.component}'.",
        agg.where(f"identity {found.component}", f"state {found.component}", "combine", "name"),
        "not the identity of 'combine'",
        _claim(agg, "claimed here"),
        (found.text, *_interval_notes(agg)),
        (
            *_repair_lines(repaired),
            *((_AT_INFINITY,) if found.left is None else ()),
            *(_identity_advice(agg, found.component) if repaired is None else ()),
        ),
    )


def _identity_advice(agg: Aggregator, component: str) -> tuple[str, ...]:
    change = f"change the value behind '=' of '{component}', or the rule: combining with it must change nothing"
    if agg.component(component).interval is not None:
        return (change,)
    return change, (
        f"if only some values of '{component}' can occur, declare their interval on the state: "
        "it is used where lift lands in it and combine keeps it"
    )


def _undecided(agg: Aggregator, code: str, message: str, verdict: Unknown) -> Diagnostic:
    notes = [f"{verdict.reason}; no counterexample was found either."]
    if "= 0" in verdict.residual:
        operands = "elements a, b and c" if code == "PSM303" else "elements x"
        notes.append(f"left to show, for all {operands}: {verdict.residual}")
    advice = [_AT_INFINITY if verdict.undefined else _BOUNDED]
    if "time limit" in verdict.reason:
        advice.append("give it more time: psmc check --budget 120")
    return Diagnostic(
        code,
        message,
        agg.where("combine", "claim", "name"),
        "not decided",
        _claim(agg, "claimed here"),
        (*notes, *_interval_notes(agg)),
        (*advice, "write 'associative: assume' to vouch for it yourself"),
    )


def _contradiction(agg: Aggregator, verdict: Unknown) -> Diagnostic:
    return Diagnostic(
        "PSM901",
        f"a bug of psmc: two methods disagree about '{agg.name}', so nothing is claimed.",
        agg.where("combine", "claim", "name"),
        notes=(verdict.reason + ".", verdict.residual),
        helps=("please report it, with the spec.",),
    )


def _interval_notes(agg: Aggregator) -> tuple[str, ...]:
    """Declared intervals that the proof could not use."""
    if not isinstance(agg.combine, Block):
        return ()
    failed = closure(agg).open
    return tuple(
        f"values of '{c.name}' outside its interval count too: {_HALF[failed[c.name]]}"
        for c in agg.state
        if c.name in failed
    )
