"""One matrix from numbers to codes: a method is one file in `methods`."""
