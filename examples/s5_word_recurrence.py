# The word problem of S5, as a recurrence. Barrington 1989;
# as a test of sequence models, Merrill et al. 2024, arXiv 2404.08819.

import psmc


@psmc.aggregator(
    dims="N=5",
    inputs="x[N] : int in [0, 4]",
    state="p[N] : int in [0, 4] = iota",
    associative=True,
)
class S5WordRecurrence:
    """p: where each of five ends up after all permutations so far. Merrill et al. 2024, arXiv 2404.08819."""

    def recurrence(s, x):
        return dict(p=x.x[s.p])

    def output(s, x):
        return dict(y=s.p)
