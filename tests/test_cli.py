from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from overlap import AsyncEngine, SamplingParams
from overlap.cli import main

OVERLAP = [sys.executable, "-m", "overlap"]
TINY = ["--device", "cpu", "--dtype", "float32"]
GREEDY = ["--temperature", "0"]
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
SOON = 60.0


def overlap(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*OVERLAP, *arguments], input=text, capture_output=True, text=True, timeout=SOON, check=False)


class Terminal:
    """A command on a terminal of its own, with somebody who reads and types."""

    def __init__(self, *arguments: str | Path) -> None:
        self._fd, inner = pty.openpty()
        command = [sys.executable, "-c", TAKE_TERMINAL, *OVERLAP, *arguments]
        self.program = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, env={**os.environ, "TERM": "dumb"}
        )
        os.close(inner)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_until(self, pattern: str) -> str:
        """Return what was shown up to and with the first match of `pattern` that was not read before."""
        until = time.monotonic() + SOON
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{pattern!r} was not shown; there was: {self.seen[-2000:]!r}"
            self.seen += os.read(self._fd, 4096).decode(errors="replace")
        read, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return read

    def press_until_answered(self, key: str) -> None:
        """Press a key a moment after what was shown, and again while nothing is shown for it, as people do.

        CPython's `input` notices a Ctrl-C that comes between readline's prompt and its wait at the next key only.
        """
        until = time.monotonic() + SOON
        while time.monotonic() < until:
            time.sleep(0.2)
            self.type(key)
            if select.select([self._fd], [], [], 2.0)[0]:
                return

    def wait_end(self) -> int:
        with contextlib.suppress(OSError):  # Linux says EIO once the other side is closed
            while os.read(self._fd, 4096):
                pass
        return self.program.wait(SOON)

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._fd)


@contextlib.contextmanager
def terminal(*arguments: str | Path) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


def test_the_version_is_printed() -> None:
    run = overlap("--version")
    assert run.returncode == 0
    assert run.stdout.startswith("overlap ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smollm2-135m-instuct", "x"], "'smollm2-135m-instruct'"),
        (["/nowhere/model.gguf", "x"], "/nowhere/model.gguf"),
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--dtype", "float99"], "float99"),
        (["x", "--max-rows", "many"], "max_rows"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    run = overlap("generate", *arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("overlap: error: ")
    assert words in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_sampling_parameter_has_an_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert [field.name for field in fields(SamplingParams) if "--" + field.name.replace("_", "-") not in shown] == []


def test_an_answer_is_held_to_a_form_and_its_prompt_is_scored(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "form").write_text("(yes|no)!", encoding="utf-8")
    asked: list[str | Path] = ["generate", tiny_llama_dir, "The quick", "--json", "--prompt-logprobs", "1", *TINY]
    for form in ("choice:yes!|no!", f"regex:@{tmp_path / 'form'}"):
        run = overlap(*asked, "--structured", form)
        assert run.returncode == 0, run.stderr
        answer = json.loads(run.stdout)
        assert answer["text"] in ("yes!", "no!")
        first, *others = answer["prompt_logprobs"]
        assert first is None
        assert len(others) == answer["usage"]["prompt_tokens"] - 1
        assert all(entry["logprob"] <= 0 for entry in others)


@pytest.mark.parametrize(
    "option", ["--decode-sms", "--max-waiting", "--prefill-chunk", "--prefix-cache", "--no-prefix-cache"]
)
def test_serve_has_an_option_for_what_a_server_is_tuned_with(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert option in shown
    assert "gguf, safetensors" not in shown


def test_options_of_the_engine_reach_it(tiny_llama_dir: Path) -> None:
    asked: list[str | Path] = ["generate", tiny_llama_dir, "Paris", "--max-tokens", "2", *TINY]
    assert overlap(*asked, "--no-prefix-cache", "--prefill-chunk", "8", "--max-waiting", "3").returncode == 0
    run = overlap(*asked, "--decode-sms", "8")
    assert run.returncode == 2
    assert "decode_sms is for lanes" in run.stderr


def test_an_answer_of_no_asked_length_ends_with_the_context(tiny_llama_dir: Path) -> None:
    asked: list[str | Path] = ["generate", tiny_llama_dir, "Paris is", "--json", "--ignore-eos", "--context", "20"]
    run = overlap(*asked, *TINY)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["usage"]["total_tokens"] == 20
    refused = overlap(*asked, *TINY, "--max-tokens", "256")
    assert refused.returncode == 2
    assert "256" in refused.stderr
    longer = overlap(*asked[:-2], *TINY, "--min-tokens", "300")
    assert json.loads(longer.stdout)["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize("option", ["--logprobs", "--prompt-logprobs"])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["generate", "nothing.gguf", "x"], "is told with --json only"),
        (["chat", "nothing.gguf"], "has no place in a chat"),
    ],
)
def test_what_would_be_shown_to_nobody_is_refused(asked: list[str], words: str, option: str) -> None:
    run = overlap(*asked, option, "1")
    assert run.returncode == 2
    assert f"{option} {words}" in run.stderr


def test_what_json_has_no_word_for_is_null(tmp_path: Path, tiny_llama_dir: Path) -> None:
    path = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = 3e38  # all finite, but the logits are not
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name][:, 0] *= 1e6
    save_file(weights, path / "model.safetensors")
    run = overlap("generate", path, "Paris", "--json", "--logprobs", "1", "--max-tokens", "1", *GREEDY, *TINY)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout, parse_constant=pytest.fail)
    assert answer["logprobs"][0]["logprob"] is None


def test_the_file_of_a_form_that_is_not_there_is_named() -> None:
    run = overlap("generate", "x", "--structured", "json_schema:@nofile")
    assert run.returncode == 2
    said = "the form is to be in the file 'nofile', which cannot be read: No such file or directory."
    assert said in " ".join(run.stderr.split())


@pytest.mark.parametrize("form", ["yaml", "json_schema:{", "regex:", "regex:@nowhere", "choice:"])
def test_a_form_that_is_none_is_refused_before_anything_is_loaded(form: str) -> None:
    run = overlap("generate", "x", "--structured", form)
    assert run.returncode == 2
    assert "--structured" in run.stderr
    assert "Traceback" not in run.stderr


def test_what_runs_as_what_is_said_and_what_host_and_device_did_is_drawn(tiny_llama_dir: Path, tmp_path: Path) -> None:
    said = overlap("explain", tiny_llama_dir, *TINY)
    assert said.returncode == 0, said.stderr
    assert "max_rows = 32: " in said.stdout
    assert "attention: " in said.stdout
    asked: list[str | Path] = ["generate", tiny_llama_dir, "Paris", "--ignore-eos", "--max-tokens", "9", *TINY]
    drawn = overlap(*asked, "--trace", tmp_path / "steps.svg")
    assert drawn.returncode == 0, drawn.stderr
    assert "9 of 9 steps" in (tmp_path / "steps.svg").read_text(encoding="utf-8")
    refused = overlap(*asked, "--trace", tmp_path / "steps.gif")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert ".svg" in refused.stderr


def test_stdout_gets_the_text_and_nothing_else(tiny_llama_dir: Path) -> None:
    asked: list[str | Path] = ["generate", tiny_llama_dir, "The quick brown fox", "--max-tokens", "12", *GREEDY, *TINY]
    streamed, whole = overlap(*asked), overlap(*asked, "--json")
    assert (streamed.returncode, whole.returncode) == (0, 0), streamed.stderr + whole.stderr
    assert (streamed.stderr, whole.stderr) == ("", "")
    answer = json.loads(whole.stdout)
    assert streamed.stdout == answer["text"] + "\n"
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) <= 12
    assert answer["finish_reason"] in ("stop", "length")


def test_a_prompt_can_come_from_stdin(tiny_llama_dir: Path) -> None:
    options = ["--max-tokens", "6", *GREEDY, *TINY]
    assert (
        overlap("generate", tiny_llama_dir, "-", *options, text="Paris is").stdout
        == overlap("generate", tiny_llama_dir, "Paris is", *options).stdout
    )


def test_a_reader_who_leaves_early_ends_the_command_quietly(smollm2_path: Path) -> None:
    command: list[str | Path] = [
        *OVERLAP,
        "generate",
        smollm2_path,
        "One, two,",
        "--max-tokens",
        "4000",
        "--ignore-eos",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.read(4)
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 141


def test_ctrl_c_ends_generate_quietly_with_130(smollm2_path: Path) -> None:
    command: list[str | Path] = [
        *OVERLAP,
        "generate",
        smollm2_path,
        "One, two,",
        "--max-tokens",
        "4000",
        "--ignore-eos",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.read(4)
        program.send_signal(signal.SIGINT)
        program.stdout.read()
        assert program.stderr.read() == b""
    assert program.returncode == 130


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("command", [["generate", "{}", "One, two,"], ["chat", "{}"], ["serve", "{}", "--fronts", "0"]])
def test_ctrl_c_while_the_engine_opens_ends_quietly_with_130(tiny_llama_dir: Path, command: list[str]) -> None:
    asked = [*OVERLAP, *(part.format(tiny_llama_dir) for part in command), *TINY]
    pipe = subprocess.PIPE
    with subprocess.Popen(asked, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as program:
        maps = Path(f"/proc/{program.pid}/maps")
        while program.poll() is None and "libtorch" not in maps.read_text():  # torch is being imported
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        assert program.communicate(timeout=SOON) == ("", "")
    assert program.returncode == 130


@pytest.mark.slow
def test_in_chat_ctrl_c_stops_the_answer_and_not_the_program(smollm2_path: Path) -> None:
    with terminal("chat", smollm2_path, "--temperature", "0", "--device", "cpu", "--ignore-eos") as chat:
        chat.read_until("> ")
        chat.type("My name is Ada. Count to one thousand.\n")
        chat.read_until(r"thousand\.\r\n[^>]*\w")  # the first word of the answer
        chat.type("\x03")
        chat.read_until(r"\(stopped\)\r\n> ")
        chat.press_until_answered("\x03")  # with no answer to stop, it says how to end
        chat.read_until("Ctrl-D or /exit ends[^>]*> ")
        chat.type("/help\n")
        chat.read_until("There is no command /help[^>]*> ")
        chat.type("/reset\n")
        chat.read_until("forgotten[^>]*> ")
        chat.type("/exit\n")
        assert chat.wait_end() == 0


async def test_chat_remembers_what_was_said(tiny_llama_dir: Path) -> None:
    options = ["--max-tokens", "12", "--ignore-eos", *GREEDY, *TINY]
    run = overlap("chat", tiny_llama_dir, "--system", "Be brief.", *options, text="Paris?\nAnd Rome?\n")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    messages = [{"role": "system", "content": "Be brief."}]
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32") as engine:
        for question in ("Paris?", "And Rome?"):
            messages.append({"role": "user", "content": question})
            answer = [output.text async for output in engine.generate(messages, params)][-1]
            messages.append({"role": "assistant", "content": answer})
    assert run.stderr == ""
    assert run.stdout.splitlines() == f"{messages[2]['content']}\n{messages[4]['content']}\n".splitlines()


def test_ctrl_d_ends_chat(tiny_llama_dir: Path) -> None:
    with terminal("chat", tiny_llama_dir, *TINY) as chat:
        chat.read_until("> ")
        chat.type("\x04")
        assert chat.wait_end() == 0


def test_chat_says_when_the_conversation_has_outgrown_the_context(tiny_llama_dir: Path) -> None:
    asked: list[str | Path] = ["chat", tiny_llama_dir, "--ignore-eos", *GREEDY, *TINY]
    run = overlap(*asked, text="How many tokens are there?\nAnd now?\n/reset\nHow many?\n")
    assert run.returncode == 0, run.stderr
    filled, refused, forgotten, again = run.stderr.splitlines()
    assert "has filled the model's context of 512 tokens" in filled
    assert "The message was not kept; /reset starts a new conversation." in refused
    assert "forgotten" in forgotten
    assert again == filled


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_serve_answers_until_it_is_told_to_end(tiny_llama_dir: Path, sent: signal.Signals, code: int) -> None:
    command: list[str | Path] = [*OVERLAP, "serve", tiny_llama_dir, "--port", "0", *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        assert program.stdout is not None
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", program.stderr.readline())
        assert found
        with urllib.request.urlopen(f"{found[1]}/health", timeout=SOON) as health:
            assert health.status == 200
        program.send_signal(sent)
        assert program.stdout.read() == ""
        assert program.stderr.read() == ""
    assert program.returncode == code


def test_serve_says_that_a_port_is_taken(tiny_llama_dir: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = overlap("serve", tiny_llama_dir, "--port", str(taken.getsockname()[1]), *TINY)
    assert run.returncode == 1
    assert run.stderr.startswith("overlap: error: ")
    assert "address already in use" in run.stderr.lower()
