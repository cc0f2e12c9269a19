"""overlap: an LLM inference engine that you put inside your Python program.

The public API is what this module exports. Importing it imports no torch.
"""

from overlap.config import EngineConfig
from overlap.engine import AsyncEngine, Health
from overlap.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    InternalError,
    ModelError,
    OverlapError,
    QueueFull,
    RequestAborted,
    RequestError,
    RequestFailed,
)
from overlap.figures import Statistics
from overlap.generation import Generation
from overlap.messages import ChatMessage, FinishReason, Output, Prompt, SamplingParams, Terms, Usage
from overlap.structured import StructuredOutput

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "ChatMessage",
    "ConfigError",
    "DeadlineExceeded",
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
    "QueueFull",
    "RequestAborted",
    "RequestError",
    "RequestFailed",
    "SamplingParams",
    "Statistics",
    "StructuredOutput",
    "Terms",
    "Usage",
    "__version__",
]
