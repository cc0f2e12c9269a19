"""Rows of device state, indexed by slot, and the kernel that builds a step's inputs from them."""
