"""The OpenAI-compatible endpoint: an aiohttp application around an engine."""

from overlap.serve.access import MAX_BODY_BYTES, ServeOptions
from overlap.serve.app import make_app, make_runner, serving
from overlap.serve.door import Door

__all__ = ["MAX_BODY_BYTES", "Door", "ServeOptions", "make_app", "make_runner", "serving"]
