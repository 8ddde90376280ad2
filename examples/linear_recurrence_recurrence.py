# First-order linear recurrence, as a recurrence. Blelloch 1990, §1.4; Martin & Cundy 2018, arXiv 1709.04057.

import psmc


@psmc.aggregator(inputs="a, b", state="h = 0", associative=True)
class LinearRecurrenceRecurrence:
    """h' = a h + b. Blelloch 1990; Martin & Cundy 2018, arXiv 1709.04057."""

    def recurrence(s, x):
        return dict(h=x.a * s.h + x.b)

    def output(s, x):
        return dict(y=s.h)
