# Parallel recursive LSTM, with pointwise gates. Gaudreault & Mao 2026, arXiv 2605.17108;
# the cell is the binary tree-LSTM of Tai et al. 2015, arXiv 1503.00075.

import psmc
from psmc.lang import let, sigmoid, tanh


@psmc.aggregator(
    dims="G=5",
    inputs="x",
    params="left[G] right[G] bias[G]",
    state="c = 0, h = 0",
    associative=False,
    order="tree",
)
class PrLstm:
    """c = i u + f1 c1 + f2 c2, h = o tanh(c): an LSTM cell merges two halves of a balanced tree.
    Gaudreault & Mao 2026, arXiv 2605.17108."""

    def lift(x):
        return dict(c=x.x, h=tanh(x.x))

    def combine(l, r, p):
        z = let("z", p.left * l.h + p.right * r.h + p.bias)
        c = sigmoid(z[0]) * tanh(z[4]) + sigmoid(z[1]) * l.c + sigmoid(z[2]) * r.c
        return dict(c=c, h=sigmoid(z[3]) * tanh(c))

    def output(s, x):
        return dict(y=s.h)
