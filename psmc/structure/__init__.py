"""What an aggregator's algebra allows, read off the IR: live state, layers, classes, factored transitions."""
