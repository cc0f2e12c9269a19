"""The OpenAI-compatible endpoint: an aiohttp application around an engine."""

from overlap.serve.app import MAX_BODY_BYTES, make_app, serving

__all__ = ["MAX_BODY_BYTES", "make_app", "serving"]
