"""What the scheduler needs to know of an aggregator, as data (DESIGN: live state, layers, class).

All expressions have the lift substituted: they read inputs (with their taps), params, and earlier layers' components
as Ref('state', m) and Ref('prev', m). Products and sums are in a canonical order, so that two spellings of one model
agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psmc.ir import Assign, Expr, Index

Class = Literal["pointwise", "affine", "dense", "opaque"]
DecayKind = Literal["none", "constant", "scalar", "K", "V", "KV"]


@dataclass(frozen=True)
class Term:
    """Σ over columns c of left[c] · right[c], an outer product of low rank. Each column is a vector, an Assign over the
    layer's outer indices and the one along which it runs. A transition's left and right both run over `key`; an
    injection's left over `key` and its right over `value` (over nothing for a vector component)."""

    left: tuple[Assign, ...] = ()
    right: tuple[Assign, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.left)


@dataclass(frozen=True)
class Decay:
    """D[outer, key, value] of S_t = D ⊙ S_{t-1} + …

    kind      none: D is 1; constant: one number that no token changes; scalar: one number a token; K, V, KV: diagonal
    parts     (over key, over value) with D = their product, a scalar D being the first; None if D is not separable
    log       log D by rules that keep its digits; None if D is not known to be > 0
    logs      the same of `parts`
    constant  no input and no other layer is read: the same for every token, whatever its kind
    """

    value: Assign
    kind: DecayKind
    parts: tuple[Assign, Assign] | None
    log: Assign | None
    logs: tuple[Assign, Assign] | None
    constant: bool


@dataclass(frozen=True)
class Affine:
    """S_t = D ⊙ S_{t-1} + U (Wᵀ S_{t-1}) + B Cᵀ on one component S.

    `key` is the index that the output contracts or the transition acts on, `value` the other one (None for a vector
    component such as a normaliser: then C is one number), `outer` any further ones, along which all is elementwise.
    The component's own order of dims is that of its declaration: it may be [V, K]. `scaled`: D's value part multiplies
    all of the transition, S_t = D_value ⊙ (D_key ⊙ S_{t-1} + U (Wᵀ S_{t-1})) + B Cᵀ.
    `transition` holds U (left) and W (right), `injection` B (left) and C (right).
    """

    component: str
    key: Index
    value: Index | None
    outer: tuple[Index, ...]
    decay: Decay
    transition: Term
    injection: Term
    scaled: bool = False

    @property
    def rank(self) -> int:
        return self.transition.rank

    @property
    def columns_alike(self) -> bool:
        """Apart from D_value, the columns of S over the value index evolve alike: what a chunk of tokens can share."""
        if self.decay.parts is None:
            return False
        return self.rank == 0 or self.scaled or self.decay.kind not in ("V", "KV")


@dataclass(frozen=True)
class Layer:
    """One strongly connected set of live components, scanned with one plan.

    reads    earlier components whose prefixes (`m`, `prev.m`) it sees as per-token inputs
    ring     the semiring in which it is affine in its own earlier value, as 'plus times' in op names ('add mul',
             'max add'); None if in none
    element  what its elements need to be combined with each other when the layer is scanned by `combine` alone
    step     the new value of each component, over Ref('prev', own), Ref('state' and 'prev', reads), inputs, params;
             empty where the rule is Python
    """

    components: tuple[str, ...]
    cls: Class
    ring: str | None
    reads: tuple[str, ...] = ()
    element: tuple[str, ...] = ()
    step: tuple[Assign, ...] = ()
    affine: Affine | None = None

    @property
    def linear(self) -> bool:
        return self.ring is not None


@dataclass(frozen=True)
class Linear:
    """y[value, extra] = Σ_key query[key] S[key, value] + Σ_key previous[key] prev.S[key, value].

    `query` and `previous` are Assigns over (outer, key, extra); `extra` are further indices of the output that they
    read (several queries a token). `indices` are y's: (outer, value, extra).
    """

    name: str
    component: str
    indices: tuple[Index, ...]
    query: Assign | None
    previous: Assign | None


@dataclass(frozen=True)
class Readout:
    """One output: `epilogue` with each linear part as Ref('let', name, …).

    `whole`: components that the epilogue still reads beyond its linear parts (they are needed in full, such as a
    pointwise layer's). `reduces`: dims that the epilogue sums over, so that it needs all of them in one place.
    """

    output: str
    linear: tuple[Linear, ...]
    epilogue: Assign
    whole: tuple[str, ...] = ()
    reduces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """`live`: what a prefix must carry, in declaration order; `element`: what elements need to be combined with each
    other (segments, ranks). `lanes`: dims that every component and output has once and that nothing reduces or
    permutes, so that they can be flattened into lanes. `expanded`: dims of the state that some output contracts.
    `stacks`: affine components with the same key, decay, transition and B, which are one matrix with more value
    columns (S and its normaliser); the one with the most columns first."""

    name: str
    live: tuple[str, ...]
    element: tuple[str, ...]
    layers: tuple[Layer, ...]
    lanes: tuple[str, ...]
    pointwise: bool  # combine and lift of `element` and the readout are free of index sums, gathers and Eye
    expanded: tuple[str, ...] = ()
    readout: tuple[Readout, ...] = ()
    stacks: tuple[tuple[str, ...], ...] = ()

    def layer(self, component: str) -> Layer:
        return next(x for x in self.layers if component in x.components)


__all__ = [
    "Affine", "Class", "Decay", "DecayKind", "Expr", "Layer", "Linear", "Readout", "Structure", "Term",
]  # fmt: skip
