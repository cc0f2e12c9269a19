"""The engine behind HTTP, on aiohttp."""
