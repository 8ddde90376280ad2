"""What the prover says. Verdicts are data: the command line, the generated module and tests read the same objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Proved:
    """True over the reals, for every size of every dim. `certificate` lists the facts used, one line each."""

    method: str
    certificate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counterexample:
    """Exact values at which a law fails. `elements` are a, b, c (or x, e): component -> nested list of Fractions.

    `left` None: e∘x (or x∘e) has no value there, although x is an element.
    `text` is the same, formatted so that a person can check both sides by hand.
    """

    law: Literal["associativity", "left identity", "right identity"]
    dims: tuple[tuple[str, int], ...]
    elements: tuple[tuple[str, tuple[tuple[str, object], ...]], ...]
    component: str
    position: tuple[int, ...]
    left: object
    right: object
    text: str


@dataclass(frozen=True)
class Refuted:
    counterexample: Counterexample


@dataclass(frozen=True)
class Unknown:
    """Neither proved nor refuted. `residual` is what was left to show; `reason` says why it stopped."""

    residual: str
    reason: str
    # The law as written has no value for any operand: inf - inf, 0/0.
    undefined: bool = False


Verdict: TypeAlias = Proved | Refuted | Unknown


@dataclass(frozen=True)
class Proof:
    """Both laws of one aggregator. None: the law is not claimed (`associative: no`) or not decidable (extern)."""

    associativity: Verdict | None
    identity: Verdict | None
    # Components for which floats turn e∘e or e∘x into NaN although the law holds in the extended reals.
    float_breaks: tuple[str, ...] = ()
    seconds: float = 0.0
