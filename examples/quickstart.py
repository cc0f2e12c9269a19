"""One answer, streamed; then a batch, in the order in which the answers are ready.

python examples/quickstart.py
"""

import asyncio

from overlap import AsyncEngine, SamplingParams


async def main() -> None:
    async with AsyncEngine("smollm2-135m-instruct") as engine:
        async for out in engine.generate("The capital of France is", SamplingParams(max_tokens=16)):
            print(out.text_delta, end="", flush=True)
        print("\n")

        countries = ["Italy", "Japan", "Kenya", "Peru"]
        prompts = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in countries]
        async for out in engine.generate_batch(prompts, SamplingParams(temperature=0, max_tokens=32)):
            print(f"{countries[out.index]}: {out.text}")


if __name__ == "__main__":  # overlap does not need this line; it lets others import this file
    asyncio.run(main())
