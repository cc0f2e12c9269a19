"""Speculation: drafters, acceptance, the EAGLE heads and their training. See docs/architecture.md."""
