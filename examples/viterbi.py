# Viterbi scores as max-plus matrix products. Viterbi 1967; as a scan, Hassan et al. 2021, arXiv 2102.05743.

import psmc


@psmc.aggregator(
    inputs="emission[N]",
    params="transition[N, N]",
    state="M[N, N] = where(eye == 1, 0, -inf)",
    associative=True,
)
class Viterbi:
    """delta[j]: log-probability of the best path that ends in state j.
    Viterbi 1967; Hassan et al. 2021, arXiv 2102.05743."""

    def lift(x):
        return dict(M=x.transition + x.emission)

    def combine(l, r):
        return dict(M=(l.M[:, :, None] + r.M[None, :, :]).max(1))

    def output(s, x):
        return dict(delta=s.M.max(0))
