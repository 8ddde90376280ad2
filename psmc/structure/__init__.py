"""What an aggregator's algebra allows: live state, layers, class of each layer, factored transitions. Read off the IR."""
