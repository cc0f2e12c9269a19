"""One file an op: the plain torch reference, and the fast kernel behind the same signature."""
