"""Log-linear attention as a class. Guo et al. 2025, arXiv 2506.04761."""

import psmc


@psmc.aggregator(
    inputs="q[K] k[K] v[V] own in [0, inf) past[L] in [0, inf)",
    state="S[K,V]=0",
    dims="K V L=12",
    associative=False,
    order="tree",
)
class LogLinearAttention:
    """o_t = sum over levels c of lambda_t[c] S_t[c]^T q_t: linear attention with O(log T) memories, each of the 2^(c-1)
    tokens of a level. Guo et al. 2025, arXiv 2506.04761."""

    def lift(x):
        return dict(S=x.k[:, None] * x.v)

    def combine(l, r):
        return dict(S=l.S + r.S)

    def output(s, x, prev_at):
        own = x.own * (x.q @ x.k) * x.v
        return own + x.past @ (x.q @ prev_at.L.S)
