# Viterbi scores, as a recurrence in the max-plus semiring. Viterbi 1967; Hassan et al. 2021, arXiv 2102.05743.

import psmc


@psmc.aggregator(inputs="emission[N]", params="transition[N, N]", state="delta[N] = 0", associative=True)
class ViterbiRecurrence:
    """delta[j]: log-probability of the best path that ends in state j.
    Viterbi 1967; Hassan et al. 2021, arXiv 2102.05743."""

    def recurrence(s, x):
        return dict(delta=(s.delta[:, None] + x.transition).max(0) + x.emission)

    def output(s, x):
        return dict(delta=s.delta)
