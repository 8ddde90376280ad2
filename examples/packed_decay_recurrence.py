# Gated linear attention over packed documents, as a recurrence: a flag starts a new one. Yang et al. 2023,
# arXiv 2312.06635; segments within a scan, Blelloch 1990, CMU-CS-90-190, §1.5.

import psmc
from psmc.lang import exp, outer, sqrt, where


@psmc.aggregator(
    inputs="q[K], k[K], v[V], g[K] in (-inf, 0], first : int in [0, 1]",
    state="S[K, V] = 0",
    associative=True,
)
class PackedDecayRecurrence:
    """The state is dropped before the first token of a document. Yang et al. 2023, arXiv 2312.06635; Blelloch 1990."""

    def recurrence(s, x):
        return dict(S=where(x.first > 0, 0, exp(x.g)[:, None] * s.S) + outer(x.k, x.v))

    def output(s, x):
        return dict(o=x.q @ s.S / sqrt(x.dims.K))
