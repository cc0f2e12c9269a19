"""What SamplingParams and Terms take, and what they say to the rest."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overlap import AsyncEngine, EngineConfig, RequestError, SamplingParams, StructuredOutput, Terms
from overlap.equivalents import ENGINE_OPTIONS, SAMPLING_PARAMETERS
from overlap.messages import MAX_STOP_TOKEN_IDS

MANY = list(range(MAX_STOP_TOKEN_IDS + 1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop": 5}, "stop must be a non-empty string or a sequence of them, not 5."),
        ({"stop": {"a": 1}}, "stop must be a non-empty string or a sequence of them, not {'a': 1}."),
        ({"stop_token_ids": 5}, "stop_token_ids must be a sequence of token ids, not 5."),
        ({"stop_token_ids": None}, "stop_token_ids must be a sequence of token ids, not None."),
        ({"stop_token_ids": b"ab"}, "stop_token_ids must be a sequence of token ids, not b'ab'."),
        ({"stop_token_ids": [True]}, "stop_token_ids must be a sequence of token ids, not [True]."),
        ({"stop_token_ids": MANY}, "stop_token_ids has 257 ids; give 256 at most."),
        ({"logit_bias": 5}, "logit_bias must be a mapping of token ids to numbers, as in {42: -5.0}, not 5."),
        ({"logit_bias": [1]}, "logit_bias must be a mapping of token ids to numbers, as in {42: -5.0}, not [1]."),
        ({"logit_bias": "ab"}, "logit_bias must be a mapping of token ids to numbers, as in {42: -5.0}, not 'ab'."),
        ({"logit_bias": [(1, 2.0), (1, 3.0)]}, "logit_bias has token 1 twice. Give each token one bias."),
        ({"skip_special_tokens": None}, "skip_special_tokens must be True or False, not None."),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, not 'no'."),
        ({"include_stop_str_in_output": 5}, "include_stop_str_in_output must be True or False, not 5."),
        ({"temperature": 10**400}, "temperature must be a finite number, not 1000"),
        ({"temperature": np.float32("nan")}, "temperature must be a finite number, not "),
        ({"temperature": np.True_}, "temperature must be a finite number, not "),
        ({"max_tokens": np.True_}, "max_tokens must be an integer, not "),
        ({"max_tokens": np.float32(2)}, "max_tokens must be an integer, not "),
    ],
)
def test_what_a_sampling_parameter_cannot_be_is_said_with_its_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert str(error.value).startswith(words)


def test_sampling_parameters_go_by_name() -> None:
    with pytest.raises(RequestError, match=r"by name, as in SamplingParams\(temperature=0\.5\), not 0\.7"):
        SamplingParams(0.7)  # type: ignore[call-arg]  # what is tested


@pytest.mark.parametrize(
    "name", ["guided_json", "truncate_prompt_tokens", "detokenize", "n", "best_of", "max_new_tokens"]
)
def test_a_parameter_of_another_engine_is_refused_with_what_stands_for_it_here(name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert str(error.value) == f"There is no sampling parameter {name!r} here. {SAMPLING_PARAMETERS[name]}"


def test_what_stands_for_other_names_is_no_name_of_ours_and_names_only_what_there_is() -> None:
    for table, ours in ((SAMPLING_PARAMETERS, SamplingParams), (ENGINE_OPTIONS, EngineConfig)):
        known = {field.name for field in fields(ours)}
        assert not known & set(table)
        named = {name for text in table.values() for name in re.findall(r"`(\w+)`", text)}
        assert named <= known | {"generate_batch"}


def test_numbers_of_numpy_are_kept_as_those_of_python() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int32(3),  # type: ignore[arg-type]
        seed=np.uint64(2**64 - 1),  # type: ignore[arg-type]
        max_tokens=np.int64(7),  # type: ignore[arg-type]
        stop_token_ids=np.array([4, 5]),  # type: ignore[arg-type]
        logit_bias={np.int64(3): np.float32(1.5)},  # type: ignore[dict-item]
    )
    plain = SamplingParams(
        temperature=0.5, top_k=3, seed=2**64 - 1, max_tokens=7, stop_token_ids=[4, 5], logit_bias={3: 1.5}
    )
    assert repr(params) == repr(plain)
    terms = Terms(priority=np.int8(3), deadline=np.float32(1.5))  # type: ignore[arg-type]
    assert repr(terms) == repr(Terms(priority=3, deadline=1.5))


def test_parameters_can_be_copied_and_changed() -> None:
    params = SamplingParams(stop="a", stop_token_ids=[1], logit_bias={2: 3}, structured=StructuredOutput.json_object())
    assert replace(params, seed=1) == replace(params, seed=1)
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize("choices", [5, None, [5], "yes", [""]])
def test_choices_that_are_no_texts_are_refused(choices: Any) -> None:
    with pytest.raises(RequestError, match="The choices must be a list of texts that are not empty, not "):
        StructuredOutput.choice(choices)


@pytest.mark.parametrize("token", [512, 2**31, 2**40])
async def test_a_stop_id_that_the_vocabulary_lacks_is_refused_and_the_engine_goes_on(
    tiny_llama_dir: Path, token: int
) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", kv_cache=1024, max_rows=2) as engine:
        words = f"stop_token_ids has token {token}, but the vocabulary has 512 tokens"
        with pytest.raises(RequestError, match=words):
            await anext(aiter(engine.generate("Paris", SamplingParams(stop_token_ids=[3, token]))))
        outputs = [one async for one in engine.generate("Paris", SamplingParams(max_tokens=3, ignore_eos=True))]
        assert len(outputs[-1].token_ids) == 3


async def test_an_end_token_of_the_model_that_the_vocabulary_lacks_is_no_harm(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 2**31]}))
    async with AsyncEngine(path, device="cpu", dtype="float32", kv_cache=1024, max_rows=2) as engine:
        outputs = [one async for one in engine.generate("Paris", SamplingParams(max_tokens=3))]
        assert outputs[-1].finish_reason is not None
