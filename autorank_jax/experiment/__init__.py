"""One experiment from its options to its results."""
