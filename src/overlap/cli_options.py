"""The options of the command line that stand for fields of SamplingParams and EngineConfig."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from overlap.errors import RequestError
from overlap.structured import StructuredOutput


class _Biases(argparse.Action):
    """Collects ID=BIAS into a dictionary."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        token, _, bias = str(values).partition("=")
        try:
            given = {**(getattr(namespace, self.dest) or {}), int(token): float(bias)}
        except ValueError:
            parser.error(f"{option} takes a token id and what to add to its logit, as in 42=-5, not {values!r}")
        setattr(namespace, self.dest, given)


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """Add an option for each field of SamplingParams; what is not given keeps the field's own default.

    `max_tokens` is what the command takes if none is given, for its help.
    """
    group = parser.add_argument_group("sampling")
    until = "until the model ends it or the context is full"
    until = until if max_tokens is None else f"{max_tokens}, or what the context has room for"
    group.add_argument("--max-tokens", type=int, metavar="N", help=f"tokens of an answer (default: {until})")
    group.add_argument("--temperature", type=float, help="0 always takes the likeliest token (default: 1)")
    group.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest with this probability")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    group.add_argument("--seed", type=int, help="the same seed gives the same answer")
    for name in ("presence", "frequency"):
        group.add_argument(f"--{name}-penalty", type=float, metavar="P", help="-2 to 2: for what was said (default: 0)")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="P", help="above 1: for all tokens so far (default: 1)"
    )
    group.add_argument("--logit-bias", action=_Biases, metavar="ID=BIAS", help="add to a logit; may be repeated")
    group.add_argument("--min-tokens", type=int, metavar="N", help="do not end before so many tokens")
    group.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and N alternatives")
    group.add_argument("--prompt-logprobs", type=int, metavar="N", help="the same of the prompt's tokens")
    group.add_argument(
        "--structured",
        type=_structured,
        metavar="FORM",
        help="hold the answer to json, json_schema:TEXT, regex:TEXT, lark:TEXT or choice:ONE|OTHER; @FILE for a file",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--include-stop-str-in-output", action="store_const", const=True, help="show what it ended at")
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="end at any of these tokens")
    group.add_argument("--ignore-eos", action="store_const", const=True, help="go on past the model's own end")
    group.add_argument("--skip-special-tokens", action=argparse.BooleanOptionalAction, help="(default: skip)")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that people set at a command line; what is not given keeps EngineConfig's default."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", help="cpu, cuda, cuda:N or auto")
    group.add_argument("--dtype", help="bfloat16, float16, float32 or auto")
    group.add_argument("--kv-cache", type=_number, metavar="SIZE", help="tokens, a size (2GiB), or a share (0.5)")
    group.add_argument("--max-rows", type=_number, metavar="N", help="requests in one step")
    group.add_argument("--token-budget", type=_number, metavar="N", help="tokens in one step")
    group.add_argument("--prefill-chunk", type=_number, metavar="N", help="tokens of one prompt in one step")
    group.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, help="(default: keep shared prefixes)")
    group.add_argument("--max-waiting", type=int, metavar="N", help="requests in the queue at most (default: 16384)")
    group.add_argument("--lanes", help="mixed, serial, streams, halves or auto: how steps share the device")
    group.add_argument("--decode-sms", type=int, metavar="N", help="with --lanes streams: SMs for answers alone")
    group.add_argument("--target-itl-ms", type=float, metavar="MS", help="aim at so much between two tokens")
    group.add_argument("--tensor-parallel", type=int, metavar="N", help="devices to cut the model over")
    group.add_argument("--speculative", metavar="KIND", help="ngram, eagle or draft: what drafts tokens to verify")
    group.add_argument("--draft-model", metavar="PATH", help="the EAGLE head, or the small model that drafts")
    group.add_argument("--num-drafts", type=_number, metavar="N", help="tokens to draft for a row (default: auto)")
    group.add_argument("--context", type=_number, metavar="N", help="tokens of one request, prompt and answer")
    group.add_argument("--load-format", help="auto, or dummy for random weights")
    group.add_argument("--revision", help="branch, tag or commit of a repo")
    group.add_argument("--cache-dir", metavar="DIR", help="where fetched models are kept")


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Add the options of `overlap serve` beside the engine's."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: MODEL)")
    parser.add_argument("--api-key", metavar="KEY", help="ask clients for this key (default: OVERLAP_API_KEY, if set)")
    parser.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        help="let pages of this origin ask from a browser, such as https://example.org; may be given again",
    )
    parser.add_argument("--log-requests", action="store_true", help="write a JSON line about each request to stderr")
    parser.add_argument("--log-prompts", action="store_true", help="the same, and prompts with it")
    parser.add_argument(
        "--fronts",
        type=_count,
        metavar="N",
        help="processes for HTTP and text beside the engine's; 0: all in one process (default: one for four cores)",
    )
    for name, default, text in (
        ("drain", 30.0, "how long answers may go on after SIGTERM or Ctrl-C; a second one ends at once (default: 30)"),
        ("body", None, "how long a client may take to send a body (default: 60)"),
        ("stall", None, "how long a client may read nothing of its stream before it is cut off (default: 60)"),
        ("deadline", None, "the longest that an answer may take, waiting included (default: no limit)"),
    ):
        parser.add_argument(f"--{name}-seconds", type=_seconds, default=default, metavar="S", help=text)


def _structured(asked: str) -> StructuredOutput:
    kind, _, text = asked.partition(":")
    try:
        if text.startswith("@"):
            text = _file_text(text[1:])
        if kind in ("json", "json_object") and not text:
            return StructuredOutput.json_object()
        if kind == "choice":
            return StructuredOutput.choice(text.split("|"))
        if kind in ("json_schema", "regex", "lark"):
            return StructuredOutput(kind, text)  # type: ignore[arg-type]  # one of the three
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError(
        f"a form is json, json_schema:TEXT, regex:TEXT, lark:TEXT or choice:ONE|OTHER, not {asked!r:.80}"
    )


def _file_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise argparse.ArgumentTypeError(
            f"the form is to be in the file {name!r}, which cannot be read: {why}. Give a file behind the @"
        ) from None


def _port(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"a number from 0 to 256, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"a number of seconds, 0 or more, not {text!r}")


def _number(text: str) -> int | float | str:
    """Read a number as a number, and leave anything else to EngineConfig, which knows what it may be."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
