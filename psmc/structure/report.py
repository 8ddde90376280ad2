"""What the scheduler needs to know of an aggregator, as data (DESIGN: live state, layers, class)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psmc.ir import Assign, Expr

Class = Literal["pointwise", "affine", "dense", "opaque"]


@dataclass(frozen=True)
class Term:
    """Σ over its own rank index of left[i] · right[j]: one rank-m outer product. `left` and `right` are lists of
    vectors (an Assign each, with the lift substituted: they read inputs, params and earlier layers' prefixes)."""

    left: tuple[Assign, ...]
    right: tuple[Assign, ...]


@dataclass(frozen=True)
class Affine:
    """S_t = D ⊙ S_{t-1} + U (Wᵀ S_{t-1}) + B Cᵀ on a matrix component S[K, V].

    `decay` is D as an expression over (k, v) with the lift substituted: constant 1, a scalar, diagonal in K, in V or both
    (`decay_kind` says which). `transition` holds U (left) and W (right), `injection` B (left) and C (right).
    """

    component: str
    decay: Assign
    decay_kind: Literal["none", "constant", "scalar", "K", "V", "KV"]
    transition: Term
    injection: Term

    @property
    def rank(self) -> int:
        return len(self.transition.left)


@dataclass(frozen=True)
class Layer:
    """One strongly connected set of live components, scanned with one plan; `reads` names earlier components whose
    prefixes (`m`, `prev.m`) it sees as per-token inputs."""

    components: tuple[str, ...]
    cls: Class
    linear: bool  # affine in its own left operand
    reads: tuple[str, ...] = ()
    affine: Affine | None = None


@dataclass(frozen=True)
class Linear:
    """One output as Σ q ⊙ S + Σ p ⊙ prev.S inside a pointwise epilogue. q and p contract the K index of `component`."""

    output: str
    component: str
    query: Expr | None
    previous: Expr | None


@dataclass(frozen=True)
class Structure:
    """`live`: what a prefix must carry, in declaration order; `element`: what elements need to be combined with each
    other (segments, ranks). `lanes`: dims that no index is ever summed, gathered or
    expanded over, so that they can be flattened into lanes. `expanded`: dims of the state that some output contracts."""

    live: tuple[str, ...]
    element: tuple[str, ...]
    layers: tuple[Layer, ...]
    lanes: tuple[str, ...]
    pointwise: bool  # combine and lift of `element` and the readout are free of index sums, gathers and Eye
    readout: tuple[Linear, ...] = ()
