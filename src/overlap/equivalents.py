"""What stands here for the names that vLLM and SGLang give to options and parameters. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_SHARE: Final = "Give `kv_cache`, a share such as 0.85 of the memory that the weights leave."
_GRAPHS: Final = "Give `graphs`, False for none."
_FORM: Final = "Give `structured`, a StructuredOutput."
_NO_LORA: Final = "LoRA adapters are not supported: merge the adapter into its model."
_NO_PARALLEL: Final = "`tensor_parallel` is the only way here to use several devices for one model."
_FILE_SAYS: Final = "The files say how the weights are written: give a quantized model as a GGUF."
_OWN_TOKENIZER: Final = "The tokenizer is the one in the model's directory or GGUF."
_NO_BEAMS: Final = "There is no beam search."

ENGINE_OPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gpu_memory_utilization": _SHARE,
        "mem_fraction_static": _SHARE,
        "kv_cache_memory_bytes": "Give `kv_cache`, a size such as '2GiB'.",
        "max_total_tokens": "Give `kv_cache`, a number of tokens.",
        "kv_cache_dtype": "KV is kept in `dtype`.",
        "max_model_len": "Give `context`.",
        "context_length": "Give `context`.",
        "enforce_eager": _GRAPHS,
        "disable_cuda_graph": _GRAPHS,
        "max_num_seqs": "Give `max_rows`.",
        "max_running_requests": "Give `max_rows`.",
        "max_num_batched_tokens": "Give `token_budget`.",
        "chunked_prefill_size": "Give `prefill_chunk`.",
        "enable_chunked_prefill": "Prompts are always read in chunks; `prefill_chunk` says how large.",
        "max_queued_requests": "Give `max_waiting`.",
        "enable_prefix_caching": "Give `prefix_cache`.",
        "disable_radix_cache": "Give `prefix_cache`, False for none.",
        "disable_overlap_schedule": "Give `overlap`, False for none.",
        "async_scheduling": "Give `overlap`.",
        "tensor_parallel_size": "Give `tensor_parallel`.",
        "tp_size": "Give `tensor_parallel`.",
        "pipeline_parallel_size": _NO_PARALLEL,
        "data_parallel_size": _NO_PARALLEL,
        "pp_size": _NO_PARALLEL,
        "dp_size": _NO_PARALLEL,
        "speculative_config": "Give `speculative`, `draft_model` and `num_drafts`.",
        "speculative_algorithm": "Give `speculative`.",
        "speculative_draft_model_path": "Give `draft_model`.",
        "speculative_num_draft_tokens": "Give `num_drafts`.",
        "num_speculative_tokens": "Give `num_drafts`.",
        "model_path": "The model is the first argument.",
        "download_dir": "Give `cache_dir`.",
        "tokenizer": _OWN_TOKENIZER,
        "tokenizer_path": _OWN_TOKENIZER,
        "chat_template": "The chat template is the one in the model's directory or GGUF.",
        "trust_remote_code": "No code of a model's repository is ever run.",
        "quantization": _FILE_SAYS,
        "enable_lora": _NO_LORA,
        "lora_paths": _NO_LORA,
        "seed": "Each request has a seed of its own: `SamplingParams(seed=...)`.",
        "random_seed": "Each request has a seed of its own: `SamplingParams(seed=...)`.",
        "served_model_name": "That is for the server: `overlap serve --model-name`.",
        "block_size": "Pages have 16 tokens.",
        "page_size": "Pages have 16 tokens.",
        "swap_space": "KV stays on the device.",
        "cpu_offload_gb": "Weights stay on the device.",
    }
)
"""Options of an engine."""

SAMPLING_PARAMETERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "n": "A request has one answer. Give the prompt n times to `generate_batch`, with seeds of their own or none.",
        "best_of": "A request has one answer. Give the prompt several times to `generate_batch`, and choose.",
        "guided_decoding": _FORM,
        "guided_json": _FORM,
        "guided_regex": _FORM,
        "guided_choice": _FORM,
        "guided_grammar": _FORM,
        "structured_outputs": _FORM,
        "response_format": _FORM,
        "json_schema": _FORM,
        "regex": _FORM,
        "ebnf": _FORM,
        "max_new_tokens": "Give `max_tokens`.",
        "max_completion_tokens": "Give `max_tokens`.",
        "min_new_tokens": "Give `min_tokens`.",
        "top_logprobs": "Give `logprobs`, the number of alternatives.",
        "no_stop_trim": "Give `include_stop_str_in_output`.",
        "do_sample": "Give `temperature`, 0 for the likeliest token.",
        "detokenize": "An answer always has its text; its tokens are in `Output.token_ids`.",
        "truncate_prompt_tokens": "A prompt is never cut: give the tokens that are meant.",
        "spaces_between_special_tokens": "None are put there.",
        "allowed_token_ids": "Give `structured` for a form, or `logit_bias` with -100 for tokens that are not meant.",
        "bad_words": "Give `logit_bias` with -100 for tokens that are not meant.",
        "logits_processors": "Code of yours is not run between steps; `structured` and `logit_bias` are what there is.",
        "use_beam_search": _NO_BEAMS,
        "beam_width": _NO_BEAMS,
        "length_penalty": _NO_BEAMS,
        "early_stopping": _NO_BEAMS,
    }
)
"""Parameters of sampling."""
