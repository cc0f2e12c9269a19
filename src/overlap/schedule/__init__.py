"""Which rows run next. Decides only; imports no torch."""
