"""One model cut over several devices.

python examples/several_devices.py MODEL 2                               the engine starts the other ranks by itself
torchrun --nproc-per-node=2 examples/several_devices.py MODEL 2          torchrun starts them; an engine each job

On two machines of eight devices, with the model at the same path on both (N is 0 on the first, and 1):
torchrun --nnodes=2 --node-rank=N --master-addr=FIRST --nproc-per-node=8 examples/several_devices.py MODEL 16
"""

import argparse
import asyncio
import os
import sys

from overlap import AsyncEngine, SamplingParams


async def main(asked: argparse.Namespace) -> None:
    options = {"device": asked.device, "load_format": asked.load_format, "tensor_parallel": asked.size}
    async with AsyncEngine(asked.model, **options) as engine:
        async for out in engine.generate(asked.prompt, SamplingParams(temperature=0, max_tokens=32)):
            print(out.text_delta, end="", flush=True)
        print("\n")
        print(engine.explain())


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model")
    arguments.add_argument("size", type=int, help="devices")
    arguments.add_argument("--prompt", default="The capital of France is")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--load-format", default="auto")
    if int(os.environ.get("RANK", "0")) == 0:
        asyncio.run(main(arguments.parse_args()))
    else:
        from overlap.parallel.rank import follow

        sys.exit(follow())
