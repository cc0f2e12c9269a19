"""overlap: an LLM inference engine that you put inside your Python program.

The public API is what this module exports. Importing it imports no torch.
"""

from overlap.config import EngineConfig
from overlap.engine import AsyncEngine, Generation, Health, Statistics
from overlap.errors import (
    ConfigError,
    EngineClosed,
    EngineDead,
    InternalError,
    ModelError,
    OverlapError,
    RequestAborted,
    RequestError,
    RequestFailed,
)
from overlap.messages import ChatMessage, FinishReason, Output, Prompt, SamplingParams, Usage

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "ChatMessage",
    "ConfigError",
    "EngineClosed",
    "EngineConfig",
    "EngineDead",
    "FinishReason",
    "Generation",
    "Health",
    "InternalError",
    "ModelError",
    "Output",
    "OverlapError",
    "Prompt",
    "RequestAborted",
    "RequestError",
    "RequestFailed",
    "SamplingParams",
    "Statistics",
    "Usage",
    "__version__",
]
