"""The engine inside a web application of your own: one route that streams plain text.

    python examples/aiohttp_app.py
    curl -N http://127.0.0.1:8080/ask -d 'Why is the sky blue?'

The engine runs on a thread of its own, so this application's other routes stay quick while it works. Whoever closes
the connection stops the answer, and its memory is free for the next one.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

from aiohttp import web

from overlap import AsyncEngine, RequestError, SamplingParams

ENGINE = web.AppKey("engine", AsyncEngine)


async def run_engine(app: web.Application) -> AsyncIterator[None]:
    """Start the engine with the application, and close it with the application."""
    async with AsyncEngine("smollm2-135m-instruct") as app[ENGINE]:
        yield


async def ask(request: web.Request) -> web.StreamResponse:
    question = [{"role": "user", "content": await request.text()}]
    params = SamplingParams(temperature=0, max_tokens=64)
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    async with aclosing(request.app[ENGINE].generate(question, params)) as outputs:
        try:
            first = await anext(outputs)
        except RequestError as error:  # such as a question that is longer than the model's context
            return web.Response(text=f"{error}\n", status=400)
        await response.prepare(request)
        await response.write(first.text_delta.encode())
        async for out in outputs:
            await response.write(out.text_delta.encode())
    await response.write(b"\n")
    return response


def make_app() -> web.Application:
    app = web.Application()
    app.cleanup_ctx.append(run_engine)
    app.router.add_post("/ask", ask)
    return app


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    # Without handler_cancellation aiohttp lets a handler go on for a client that has left.
    web.run_app(make_app(), host="127.0.0.1", port=port, handler_cancellation=True)
