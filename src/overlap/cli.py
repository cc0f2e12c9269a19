"""The command line: `overlap generate`, `chat`, `serve`, `explain`, `warmup`, `calibrate` and `train-drafter`.

The model's text goes to stdout and everything else to stderr, so that a pipe gets the text alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from overlap import AsyncEngine, EngineConfig, Output, SamplingParams, __version__
from overlap.cli_options import add_engine, add_sampling, add_serving
from overlap.conversation import Conversation, converse, note
from overlap.core import THREAD
from overlap.errors import OverlapError, RequestError
from overlap.messages import TokenLogprob

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
INTERRUPTED: Final = 128 + 2
BROKEN_PIPE: Final = 128 + 13
USUAL_TOKENS: Final = 256
"""Tokens of an answer of `generate` where nobody says how many, if the context has room for them."""
LEAVE_SECONDS: Final = 10.0
"""How long Ctrl-C waits for an engine that is still being opened."""

_ENGINE_OPTIONS: Final = tuple(field.name for field in fields(EngineConfig) if field.name != "model")
_SAMPLING_OPTIONS: Final = tuple(field.name for field in fields(SamplingParams))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0, 1 for a failure, 2 for bad input, 130 for Ctrl-C, 141 for an output that nobody reads any more.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OverlapError as error:
        print(f"overlap: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"overlap: error: {error}", file=sys.stderr)
            return 1
        # Whoever read our output has left. Python flushes the rest of it at exit and would complain: give it a place.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        _end_engines()
        return INTERRUPTED
    return code


def _end_engines() -> None:
    """Wait until no engine is being opened any more: Python must not end under a thread that imports torch.

    If that takes long, or Ctrl-C comes again, the process ends here, with no more ado.
    """
    until = time.monotonic() + LEAVE_SECONDS
    engines = [thread for thread in threading.enumerate() if thread.name == THREAD]
    try:
        for thread in engines:
            thread.join(max(0.0, until - time.monotonic()))
        left = any(thread.is_alive() for thread in engines)
    except KeyboardInterrupt:
        left = True
    if left:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(INTERRUPTED)


# ---------------------------------------------------------------- generate


def _generate(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    params = _sampling(arguments)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None and not arguments.json:
            raise RequestError(f"--{name.replace('_', '-')} is told with --json only. Add --json, or leave it out.")
    asyncio.run(_stream_answer(arguments, prompt, params))
    return 0


async def _stream_answer(arguments: argparse.Namespace, prompt: str, params: SamplingParams) -> None:
    async with _engine(arguments) as engine:
        asked = [{"role": "user", "content": prompt}] if arguments.chat else prompt
        if params.max_tokens is None:
            params = replace(params, max_tokens=await _usual_tokens(engine, asked, params.min_tokens))
        seen = contextlib.nullcontext() if arguments.trace is None else engine.trace(arguments.trace)
        with seen:
            async with contextlib.aclosing(engine.generate(asked, params)) as outputs:
                async for output in outputs:
                    if not arguments.json:
                        print(output.text_delta, end="", flush=True)
    print(json.dumps(_as_json(output), allow_nan=False) if arguments.json else "", flush=True)


async def _usual_tokens(engine: AsyncEngine, asked: str | list[dict[str, str]], least: int) -> int:
    """Return how many tokens an answer may have where nobody has said: the usual, as far as the context has room."""
    prompt = await (engine.encode(asked) if isinstance(asked, str) else engine.encode_chat(asked))
    return max(1, min(max(USUAL_TOKENS, least), engine.context - len(prompt)))


def _as_json(output: Output) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "usage": {
            "prompt_tokens": output.usage.prompt_tokens,
            "completion_tokens": output.usage.completion_tokens,
            "total_tokens": output.usage.total_tokens,
        },
        **({} if output.logprobs is None else {"logprobs": _scores(output.logprobs)}),
        **({} if output.prompt_logprobs is None else {"prompt_logprobs": _scores(output.prompt_logprobs)}),
    }


def _scores(entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    return [None if entry is None else _finite(asdict(entry)) for entry in entries]


def _finite(value: Any) -> Any:
    """Return what JSON has a word for: null stands for what is no finite number."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- chat


def _chat(arguments: argparse.Namespace) -> int:
    opening = () if arguments.system is None else ({"role": "system", "content": arguments.system},)
    params = _sampling(arguments)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            raise RequestError(f"--{name.replace('_', '-')} has no place in a chat: use `overlap generate --json`.")
    # The engine has a thread of its own, so nothing stands still while this one waits for somebody to type.
    with asyncio.Runner() as runner:
        engine = _engine(arguments)
        runner.run(engine.start())
        try:
            if sys.stdin.isatty():
                note(f"{engine.model_name}. Ctrl-C stops an answer; /reset forgets the conversation; Ctrl-D ends.")
            converse(runner, Conversation(engine, params, list(opening), opening))
        finally:
            runner.run(engine.aclose())
    return 0


# ---------------------------------------------------------------- serve


def _serve(arguments: argparse.Namespace) -> int:
    from overlap.serve.supervise import Asked, Supervisor, default_fronts

    fronts = default_fronts() if arguments.fronts is None else arguments.fronts
    if fronts:
        options = EngineConfig.from_options(arguments.model, _given(arguments, _ENGINE_OPTIONS))  # refuses early
        asked = Asked(
            model=options.model,
            options=_given(arguments, _ENGINE_OPTIONS),
            app=_serve_options(arguments),
            fronts=fronts,
            host=arguments.host,
            port=arguments.port,
            drain_seconds=arguments.drain_seconds,
        )
        with asyncio.Runner() as runner:
            return runner.run(Supervisor(asked, note).run())
    import uvloop  # the other commands start sooner without it

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_until_told(arguments))
    return 0


async def _serve_until_told(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM, which lets open answers end, or Ctrl-C."""
    from overlap.serve import serving  # the other commands need no HTTP
    from overlap.serve.front_process import options_of

    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with _engine(arguments) as engine:
        options = options_of(_serve_options(arguments))
        async with serving(engine, options, host=arguments.host, port=arguments.port) as address:
            note(f"{engine.model_name} is served at {address}/v1 (Ctrl-C ends)")
            await told.wait()


def _serve_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ServeOptions that were given, as they go to fronts of their own too."""
    from overlap.environment import api_key

    key = arguments.api_key or api_key()
    return {
        "api_keys": [key] if key else [],
        "cors_origins": arguments.cors_origin or [],
        "log": arguments.log_requests or arguments.log_prompts,
        "log_prompts": arguments.log_prompts,
        **_given(arguments, ("model_name", "body_seconds", "stall_seconds", "deadline_seconds")),
    }


# ---------------------------------------------------------------- warmup


def _warmup(arguments: argparse.Namespace) -> int:
    from overlap import warmup
    from overlap.environment import cache_directory, package_index
    from overlap.models import open_checkpoint

    warmup.check(arguments.arch)
    wanted: list[warmup.Module] = []
    for model in arguments.models or [DEFAULT_MODEL]:
        checkpoint = open_checkpoint(
            model,
            load_format="dummy",  # the shape is all that is read
            cache_dir=cache_directory(arguments.cache_dir),
            index_url=package_index(),
        )
        checkpoint.close()
        found = warmup.modules_of(
            checkpoint.config,
            dtype=arguments.dtype,
            architecture=arguments.arch,
            fa3=arguments.fa3,
        )
        if not found:
            note(f"{model}: FlashInfer has no kernels for its heads; torch's attention would run.")
        wanted += found
    return 1 if warmup.build(wanted, arguments.arch, note) else 0


# ---------------------------------------------------------------- explain


def _explain(arguments: argparse.Namespace) -> int:
    async def explained() -> None:
        async with _engine(arguments) as engine:
            print(engine.explain())

    asyncio.run(explained())
    return 0


# ---------------------------------------------------------------- calibrate


def _calibrate(arguments: argparse.Namespace) -> int:
    asyncio.run(_calibrated(arguments))
    return 0


async def _calibrated(arguments: argparse.Namespace) -> None:
    async with _engine(arguments) as engine:
        await engine.calibrate()
        print("\n".join(line for line in engine.explain().splitlines() if line.startswith("lanes: ")))


# ---------------------------------------------------------------- train-drafter


def _train_drafter(arguments: argparse.Namespace) -> int:
    import torch  # the other commands start without it

    from overlap.spec.train import TrainSettings
    from overlap.spec.train_command import Job, train_drafter

    device = arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    names = ("steps", "batch_size", "minutes", "unroll", "draft_vocabulary", "intermediate", "seed", "learning_rate")
    job = Job(
        model=arguments.model,
        output=Path(arguments.output),
        train=TrainSettings(**_given(arguments, names)),
        prompts=None if arguments.prompts is None else Path(arguments.prompts),
        start=None if arguments.start is None else Path(arguments.start),
        device=device,
        dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32,
        cache_dir=None if arguments.cache_dir is None else Path(arguments.cache_dir),
        **_given(arguments, ("num_prompts", "answer_tokens", "temperature", "self_asked")),
    )
    report = train_drafter(job)
    shares = ", ".join(f"{share:.2f}" for share in report.accepted)
    note(f"accepted by position: {shares}; {report.mean_emitted:.2f} tokens a verify. The head is in {job.output}")
    return 0


# ---------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="overlap", description="Run a language model.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"overlap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="go on with a text, or answer a question", allow_abbrev=False)
    _add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="what to go on with; - reads it from stdin")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    generate.add_argument("--json", action="store_true", help="print one JSON object when the answer is complete")
    generate.add_argument(
        "--trace",
        metavar="FILE",
        help="what host and device did step by step: a picture (.svg), or .json for Perfetto",
    )
    add_sampling(generate, max_tokens=USUAL_TOKENS)
    add_engine(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with a model in the terminal", allow_abbrev=False)
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling(chat, max_tokens=None)
    add_engine(chat)
    chat.set_defaults(run=_chat)

    serve = commands.add_parser("serve", help="serve a model to OpenAI clients", allow_abbrev=False)
    _add_model(serve)
    add_serving(serve)
    add_engine(serve)
    serve.set_defaults(run=_serve)

    warm = commands.add_parser("warmup", help="build GPU kernels ahead of time, no GPU needed", allow_abbrev=False)
    warm.add_argument("models", metavar="MODEL", nargs="*", help=f"as in generate (default: {DEFAULT_MODEL})")
    warm.add_argument("--arch", default="9.0a", help="compute capability to build for (default: %(default)s, Hopper)")
    warm.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="(default: %(default)s)")
    warm.add_argument("--fa3", action=argparse.BooleanOptionalAction, default=True, help="(default: build it, 10 min)")
    warm.add_argument("--cache-dir", metavar="DIR", help="where fetched models are kept")
    warm.set_defaults(run=_warmup)

    explain = commands.add_parser("explain", help="say what a model would run as, and why", allow_abbrev=False)
    _add_model(explain)
    add_engine(explain)
    explain.set_defaults(run=_explain)

    measure = commands.add_parser("calibrate", help="measure how prompts and answers share a GPU", allow_abbrev=False)
    _add_model(measure)
    add_engine(measure)
    measure.set_defaults(run=_calibrate)

    train = commands.add_parser("train-drafter", help="train an EAGLE-3 head for a model", allow_abbrev=False)
    _add_model(train)
    train.add_argument("--output", metavar="DIR", required=True, help="where the head goes; a second run goes on there")
    train.add_argument("--prompts", metavar="FILE", help="prompts, one a line (default: built-in ones of many kinds)")
    train.add_argument(
        "--self-asked", type=float, metavar="SHARE",
        help="share of prompts that the model makes up itself (default: 0.5; 0 with --prompts or no chat template)",
    )  # fmt: skip
    train.add_argument("--start", metavar="DIR", help="a head to go on from (default: begin anew)")
    train.add_argument("--learning-rate", type=float, metavar="R", help="at the beginning (default: 0.001)")
    train.add_argument("--num-prompts", type=int, metavar="N", help="answers to make (default: 20000)")
    train.add_argument("--answer-tokens", type=int, metavar="N", help="tokens of an answer at most (default: 384)")
    train.add_argument("--temperature", type=float, help="of the answers (default: 0.8)")
    train.add_argument("--minutes", type=float, metavar="M", help="for data and training together (default: no limit)")
    train.add_argument("--steps", type=int, metavar="N", help="training steps (default: 4000)")
    train.add_argument("--batch-size", type=int, metavar="N", help="texts in a step (default: 32)")
    train.add_argument("--unroll", type=int, metavar="N", help="drafts in a row that are trained (default: 4)")
    train.add_argument("--draft-vocabulary", type=int, metavar="N", help="tokens that it can draft (default: 4096)")
    train.add_argument("--intermediate", type=int, metavar="N", help="feed-forward size of the head (default: 640)")
    train.add_argument("--seed", type=int, help="(default: 0)")
    train.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda:0 where there is one)")
    train.add_argument("--cache-dir", metavar="DIR", help="where fetched models are kept")
    train.set_defaults(run=_train_drafter)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=DEFAULT_MODEL,
        help="a known name, a GGUF file, a Hugging Face directory or a repo id (default: %(default)s)",
    )


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}


def _engine(arguments: argparse.Namespace) -> AsyncEngine:
    return AsyncEngine(arguments.model, **_given(arguments, _ENGINE_OPTIONS))


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**_given(arguments, _SAMPLING_OPTIONS))


if __name__ == "__main__":
    sys.exit(main())
