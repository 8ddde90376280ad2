"""Plans: which schedule runs an aggregator. One file a plan; `choose` is the only list of them."""
