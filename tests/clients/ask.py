"""Ask the server at OPENAI_BASE_URL through LiteLLM and LangChain, whole and streamed."""

from __future__ import annotations

import importlib
import os
from typing import Any

QUESTION = "How many tokens are there?"


def main() -> None:
    # by name: the project's own environment, which checks types, has neither
    litellm: Any = importlib.import_module("litellm")
    langchain: Any = importlib.import_module("langchain_openai")
    base = os.environ["OPENAI_BASE_URL"]
    asked: dict[str, Any] = {
        "model": "openai/tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "api_base": base,
    }
    whole = litellm.completion(**asked, temperature=0, max_tokens=8)
    chunks = litellm.completion(**asked, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0

    chain = langchain.ChatOpenAI(model="tiny", base_url=base, temperature=0, max_tokens=8)
    message = chain.invoke(QUESTION)
    assert "".join(str(chunk.content) for chunk in chain.stream(QUESTION)) == message.content
    assert message.content == whole.choices[0].message.content


if __name__ == "__main__":
    main()
