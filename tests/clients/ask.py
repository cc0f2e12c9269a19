"""Ask the server at OPENAI_BASE_URL through LiteLLM, LangChain or the `llm` command, whole and streamed.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python tests/clients/ask.py litellm
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTION = "How many tokens are there?"


def ask_litellm(base: str) -> None:
    litellm: Any = importlib.import_module("litellm")  # by name: the project's own environment has none of them
    asked: dict[str, Any] = {
        "model": "openai/tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "api_base": base,
    }
    whole = litellm.completion(**asked, temperature=0, max_tokens=8)
    chunks = litellm.completion(**asked, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0


def ask_langchain(base: str) -> None:
    langchain: Any = importlib.import_module("langchain_openai")
    chain = langchain.ChatOpenAI(model="tiny", base_url=base, temperature=0, max_tokens=8)
    message = chain.invoke(QUESTION)
    assert "".join(str(chunk.content) for chunk in chain.stream(QUESTION)) == message.content
    assert message.usage_metadata["output_tokens"] > 0


def ask_llm(base: str) -> None:
    program = Path(sys.executable).with_name("llm")
    with tempfile.TemporaryDirectory() as directory:
        model = f"- model_id: tiny\n  model_name: tiny\n  api_base: {base}\n"
        (Path(directory) / "extra-openai-models.yaml").write_text(model, encoding="utf-8")
        said = [
            subprocess.run(
                [str(program), "-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "8", *more, QUESTION],
                env={**os.environ, "LLM_USER_PATH": directory},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for more in ([], ["--no-stream"])
        ]
    assert said[0] == said[1] != ""


def main() -> None:
    {"litellm": ask_litellm, "langchain": ask_langchain, "llm": ask_llm}[sys.argv[1]](os.environ["OPENAI_BASE_URL"])


if __name__ == "__main__":
    main()
