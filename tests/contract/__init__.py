"""What all tests of a compiled aggregator share: data for a spec, cases to run, the comparison with the oracle."""
