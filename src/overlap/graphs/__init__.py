"""Drivers of model programs."""
