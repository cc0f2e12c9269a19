"""Answers that are held to a form: each fits it, is what the definition says, and changes no other answer.

The oracle is the definition, the slow way: the model's logits by `transformers`, without KV cache, a matcher of
llguidance's fed the whole answer anew for each token, and of the tokens that it allows the one that sampling draws.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from overlap import AsyncEngine, Output, RequestAborted, RequestError, SamplingParams, Statistics, StructuredOutput
from overlap.grammar.compile import Grammars
from overlap.sample.sampler import sample
from overlap.state.rows import SlotRows
from overlap.text import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "yes", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
FORMS = {
    "person": StructuredOutput.json_schema(PERSON),
    "tree": StructuredOutput.json_schema(json.dumps(TREE)),
    "regex": StructuredOutput.regex(r"[A-C]{2}-\d{1,4}(é|ü)?"),
    "choice": StructuredOutput.choice(["red", "reddish", "green", 'with "quotes"\n', "東京"]),
    "lark": StructuredOutput.lark('start: item ("," item){0,4}\nitem: /[a-z]{1,3}/ | "(" item ")"'),
    "object": StructuredOutput.json_object(),
}
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.4, "seed": 2, "top_k": 5},
    {"temperature": 0.8, "seed": 3, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "seed": 4, "frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": {40: 5.0, 2: -3.0}, "logprobs": 3},
]
NEW = 48
PROMPTS = [list(range(30 + i, 48 + 3 * i)) for i in range(5)]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 8192, "max_rows": 32}
Job = tuple[list[int], SamplingParams]


def fits(name: str, text: str) -> bool:
    """Whether a whole answer has its form, by other means than llguidance."""
    match name:
        case "person":
            value = json.loads(text)
            tags, age = value["tags"], value["age"]
            whole = list(value) == ["name", "age", "tags"] and len(value["name"]) <= 6 and 0 <= age <= 150
            return whole and len(tags) <= 3 and all(tag in ("x", "yes", None) for tag in tags)
        case "tree":
            value = json.loads(text)
            while value is not None:
                assert set(value) == {"v", "next"}
                value = value["next"]
            return True
        case "regex":
            return re.fullmatch(r"[A-C]{2}-\d{1,4}(é|ü)?", text) is not None
        case "choice":
            return text in ("red", "reddish", "green", 'with "quotes"\n', "東京")
        case "lark":
            bare = re.compile(r"\(([a-z]{1,3})\)")
            while bare.search(text):
                text = bare.sub(r"\1", text)
            return re.fullmatch(r"[a-z]{1,3}(,[a-z]{1,3}){0,4}", text) is not None
        case _:
            return isinstance(json.loads(text), dict)


def jobs_of(names: list[str]) -> list[Job]:
    """Each form with each kind of sampling, and between them requests without a form."""
    jobs = []
    for number, name in enumerate(names):
        for at, asked in enumerate(ASKED):
            prompt = PROMPTS[(number + at) % len(PROMPTS)]
            jobs.append((prompt, SamplingParams(max_tokens=NEW, structured=FORMS[name], **asked)))
            if at % 2:
                jobs.append((prompt, SamplingParams(max_tokens=NEW, ignore_eos=True, **asked)))
    return jobs


async def answers(path: Path, jobs: list[Job], *, rounds: int = 1, **options: Any) -> tuple[list[Output], Statistics]:
    got: dict[int, Output] = {}
    async with AsyncEngine(path, **{**OPTIONS, **options}) as engine:
        for _ in range(rounds):
            async for one in engine.generate_batch([p for p, _ in jobs], [p for _, p in jobs], progress=False):
                got[one.index] = one
        await check_idle(engine)
        figures = engine.statistics()
    return [got[index] for index in range(len(jobs))], figures


async def check_idle(engine: AsyncEngine) -> None:
    """Every page and slot is accounted for once nothing runs."""
    await asyncio.wrap_future(engine._core.idle())
    planner, _ = engine._core.parts
    await asyncio.wrap_future(engine._core.call(planner.check_idle))


def expected(path: Path, prompt: list[int], params: SamplingParams) -> list[int]:
    """The definition, token by token. Without penalties: those have an oracle of their own."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    size = model.config.vocab_size
    form = params.structured
    assert form is not None
    grammars = Grammars(Tokenizer.from_json_file(path / "tokenizer.json"), size, (2,))
    rows = SlotRows(1, 1, "cpu")
    rows.temperature[0], rows.top_k[0], rows.top_p[0], rows.min_p[0] = (
        params.temperature, max(params.top_k, 0), params.top_p, params.min_p,
    )  # fmt: skip
    rows.seed_lo[0] = params.seed or 0
    slot, drawn = torch.zeros(1, dtype=torch.int32), torch.arange(params.temperature > 0, dtype=torch.int32)
    answer: list[int] = []
    while len(answer) < NEW and 2 not in answer:
        matcher: LLMatcher = grammars.compile(form)
        assert matcher.consume_tokens(answer)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:size]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[:, -1].float()
        logits = logits.masked_fill(torch.from_numpy(bits == 0)[None], -torch.inf)
        position = torch.tensor([len(prompt) + len(answer)], dtype=torch.int32)
        answer.append(int(sample(logits, rows, slot, position, drawn, truncated=True)))
    return answer


WAYS: dict[str, dict[str, Any]] = {
    "without overlap": {"overlap": False},
    "cold and warm, in chunks": {"rounds": 2, "prefill_chunk": 16},
    "short of pages and slots": {"kv_cache": 208, "prefill_chunk": 16, "max_rows": 6},
    "prompts in a lane of their own": {"lanes": "streams", "prefill_chunk": 16},
    "prompts in turn": {"lanes": "serial", "prefill_chunk": 16, "max_rows": 5},
    "with an n-gram drafter": {"speculative": "ngram", "num_drafts": 4},
    "drafting, short of pages": {"speculative": "ngram", "num_drafts": 3, "kv_cache": 288, "max_rows": 6},
}


async def test_each_answer_fits_its_form_and_is_that_of_the_definition(tiny_llama_dir: Path) -> None:
    jobs = jobs_of(list(FORMS))
    got, figures = await answers(tiny_llama_dir, jobs)
    names = {form: name for name, form in FORMS.items()}
    whole = 0
    for output, (_, params) in zip(got, jobs, strict=True):
        if params.structured is not None and output.finish_reason == "stop":
            assert fits(names[params.structured], output.text), output.text
            whole += 1
    assert whole >= 25  # what is left has run into max_tokens
    assert figures.structured_requests == len(FORMS) * len(ASKED)
    assert figures.structured["masks_made"] >= figures.masked_steps > 0
    for output, (prompt, params) in list(zip(got, jobs, strict=True))[::7]:
        if params.structured is not None and not params.frequency_penalty and not params.logit_bias:
            assert output.token_ids == expected(tiny_llama_dir, prompt, params)


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_of_serving_gives_the_same_tokens(tiny_llama_dir: Path, way: str) -> None:
    jobs = jobs_of(["person", "regex", "lark", "object"])
    want, _ = await answers(tiny_llama_dir, jobs)
    got, figures = await answers(tiny_llama_dir, jobs, **WAYS[way])
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    assert [one.finish_reason for one in got] == [one.finish_reason for one in want]
    assert (figures.preemptions > 0) == ("short" in way)
    assert (figures.drafted_tokens > 0) == ("draft" in way)


async def test_drafts_are_verified_under_a_mask_at_each_position(tiny_llama_dir: Path) -> None:
    form = StructuredOutput.regex("((abc|xyz), ){12}")
    jobs: list[Job] = [
        (PROMPTS[i], SamplingParams(max_tokens=120, temperature=i % 2, seed=i, structured=form)) for i in range(4)
    ]
    want, slow = await answers(tiny_llama_dir, jobs)
    got, figures = await answers(tiny_llama_dir, jobs, speculative="ngram", num_drafts=4)
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    assert all(re.fullmatch("((abc|xyz), ){12}", one.text) for one in got)
    assert figures.accepted_tokens > 20
    assert figures.steps < slow.steps


async def test_answers_without_a_form_are_the_same_beside_some_that_have_one(tiny_llama_dir: Path) -> None:
    free = [(prompt, params) for prompt, params in jobs_of(["person", "tree"]) if params.structured is None]
    held = [job for job in jobs_of(["person", "tree"]) if job[1].structured is not None]
    alone, figures = await answers(tiny_llama_dir, free)
    assert (figures.masked_steps, figures.structured["masks_made"]) == (0, 0)
    beside, _ = await answers(tiny_llama_dir, [*held, *free])
    assert [one.token_ids for one in beside[len(held) :]] == [one.token_ids for one in alone]


async def test_explain_says_what_was_held_to_a_form(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        assert "structured output: none was asked for yet" in engine.explain()
        await anext_all(engine, (PROMPTS[0], params_of("choice")))
        assert "structured output: 1 requests held to a form, 0 refused, 0 failed on the way" in engine.explain()


async def test_a_row_without_a_form_goes_on_in_every_step(tiny_llama_dir: Path) -> None:
    plain = (PROMPTS[0], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    held = (PROMPTS[1], SamplingParams(max_tokens=20, temperature=0, structured=FORMS["object"]))
    got, figures = await answers(tiny_llama_dir, [plain, held])
    assert len(got[0].token_ids) == 60
    assert figures.steps <= 60 + 3  # so none was without it but those that read the prompts, and the drained last one


async def test_requests_that_leave_in_the_middle_leave_nothing_behind(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        want = [one.token_ids async for one in engine.generate(PROMPTS[0], params_of("person"))][-1]

        async def leave(number: int) -> None:
            answer = engine.generate(PROMPTS[number % 5], params_of("object"), request_id=str(number))
            try:
                async for output in answer:
                    if len(output.token_ids) > number % 7 and number % 3:
                        break
                    if number % 3 == 0:
                        await engine.abort(str(number))
            except RequestAborted:
                pass
            await answer.aclose()

        await asyncio.gather(*(leave(number) for number in range(30)))
        again = [one.token_ids async for one in engine.generate(PROMPTS[0], params_of("person"))][-1]
        assert again == want
        await check_idle(engine)


def params_of(name: str, **asked: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NEW, "temperature": 0, "structured": FORMS[name], **asked})


async def test_a_complete_form_ends_the_answer_also_with_ignore_eos(tiny_llama_dir: Path) -> None:
    got, _ = await answers(tiny_llama_dir, [(PROMPTS[0], params_of("choice", ignore_eos=True))])
    assert got[0].finish_reason == "stop"
    assert fits("choice", got[0].text)


@pytest.mark.slow
async def test_smollm2_answers_in_the_form_of_a_schema(smollm2_path: Path) -> None:
    messages = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
    async with AsyncEngine(smollm2_path, device="cpu", kv_cache=2048) as engine:
        for asked in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
            output: Output | None = None
            async for output in engine.generate(messages, params_of("person", max_tokens=100, **asked)):
                pass
            assert output is not None
            assert output.finish_reason == "stop"
            assert fits("person", output.text)


# ── hostile forms ────────────────────────────────────────────────────────────────────────────────────────────────────

DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"type": "array", "items": {"anyOf": [DEEP, {"type": "null"}]}}
HOSTILE: dict[str, Callable[[], StructuredOutput]] = {
    "a regex that is none": lambda: StructuredOutput.regex("(abc"),
    "a regex that nothing matches": lambda: StructuredOutput.regex(r"[^\s\S]"),
    "a regex that ends in nothing": lambda: StructuredOutput.regex(r"ab([^\s\S])"),
    "look-around": lambda: StructuredOutput.regex("(?=a)b"),
    "a huge repetition": lambda: StructuredOutput.regex("((a{1,999}){1,999}){1,999}"),
    "a repetition that explodes": lambda: StructuredOutput.regex("(x+x+)+y(.*a){300}b.{400}"),
    "brackets without end": lambda: StructuredOutput.regex("(" * 5000 + "a" + ")" * 5000),
    "an empty regex": lambda: StructuredOutput.regex(""),
    "a type that is none": lambda: StructuredOutput.json_schema({"type": "nonsense"}),
    "a schema that is none": lambda: StructuredOutput.json_schema("{"),
    "a schema that is a list": lambda: StructuredOutput.json_schema("[]"),
    "a deep schema": lambda: StructuredOutput.json_schema(DEEP),
    "very deep JSON": lambda: StructuredOutput.json_schema('{"a":' * 20000 + "{}" + "}" * 20000),
    "a schema of nothing": lambda: StructuredOutput.json_schema({"type": "string", "minLength": 5, "maxLength": 2}),
    "a schema of itself": lambda: StructuredOutput.json_schema({"$ref": "#"}),
    "a schema without an end": lambda: StructuredOutput.json_schema(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
    ),
    "a reference to nowhere": lambda: StructuredOutput.json_schema({"$ref": "#/$defs/x"}),
    "a reference to the web": lambda: StructuredOutput.json_schema({"$ref": "http://localhost:1/x.json"}),
    "a bad pattern": lambda: StructuredOutput.json_schema({"type": "string", "pattern": "(a"}),
    "many properties": lambda: StructuredOutput.json_schema({"properties": {str(i): {} for i in range(600)}}),
    "many enum items": lambda: StructuredOutput.json_schema({"enum": list(range(600))}),
    "a large schema": lambda: StructuredOutput.json_schema({"description": "x" * 70_000}),
    "no choices": lambda: StructuredOutput.choice([]),
    "an empty choice": lambda: StructuredOutput.choice(["a", ""]),
    "a grammar that is none": lambda: StructuredOutput.lark("start: ("),
    "a grammar without a start": lambda: StructuredOutput.lark('other: "a"'),
    "a grammar that only repeats itself": lambda: StructuredOutput.lark("start: start"),
    "a circle of rules": lambda: StructuredOutput.lark("start: a\na: b\nb: a"),
    "a special token that is none": lambda: StructuredOutput.lark("start: <|nope|>"),
    "half of a surrogate pair": lambda: StructuredOutput.regex("a\ud800"),
}
LIVES = ("a huge repetition", "a repetition that explodes", "a schema without an end", "a deep schema")
"""Forms that can be held to as far as max_tokens goes; or not, as llguidance likes."""


@pytest.mark.parametrize("options", [{}, {"speculative": "ngram", "num_drafts": 3}], ids=["plain", "drafting"])
async def test_a_hostile_form_ends_its_own_request_and_nothing_else(
    tiny_llama_dir: Path, options: dict[str, Any]
) -> None:
    normal = (PROMPTS[0], params_of("person"))
    async with AsyncEngine(tiny_llama_dir, **OPTIONS, **options) as engine:

        async def tokens(prompt: list[int], params: SamplingParams) -> list[int]:
            return [one.token_ids async for one in engine.generate(prompt, params)][-1]

        want = await tokens(*normal)
        for name, make in HOSTILE.items():
            beside = asyncio.create_task(tokens(*normal))
            try:
                form = make()
                asked: tuple[dict[str, Any], ...] = (
                    {},
                    {"temperature": 1.5, "top_k": 1},
                    {"temperature": 1.0, "top_p": 1e-4, "seed": 2**64 - 1},
                )
                several = [tokens(PROMPTS[i], params_of("person", **{**one, "structured": form, "max_tokens": 8}))
                           for i, one in enumerate(asked)]  # fmt: skip
                async with asyncio.timeout(20):  # 2 s of its own; two cores are shared with other tests
                    got = await asyncio.gather(*several, return_exceptions=True)
            except RequestError as error:
                got = [error]
            assert all(isinstance(one, RequestError) or name in LIVES for one in got), (name, got)
            assert not any(isinstance(one, BaseException) and not isinstance(one, RequestError) for one in got), name
            assert all(len(str(one)) < 800 for one in got if isinstance(one, RequestError)), name
            assert await beside == want
        assert await tokens(*normal) == want
        await check_idle(engine)


async def test_a_form_that_allows_no_token_in_the_middle_ends_its_request_then(tiny_llama_dir: Path) -> None:
    """The vocabulary has no token for what has to come third: the byte 0xFF is in no text."""
    form = StructuredOutput.lark('start: "ab" other\nother: /c/ & /d/')
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        with pytest.raises(RequestError, match="cannot be held to this lark"):
            async for _ in engine.generate(PROMPTS[0], params_of("person", structured=form)):
                pass
        await check_idle(engine)


@pytest.mark.parametrize("panics", [False, True])
async def test_a_matcher_that_fails_at_some_step_ends_its_request_with_the_reason(
    tiny_llama_dir: Path, panics: bool
) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        plain = (PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        want = [one.token_ids async for one in engine.generate(*plain)][-1]
        masks: Any = engine._core._masks
        follow, seen = masks._follow, []

        def failing(matchers: list[Any], executor: Any) -> None:
            seen.extend(matchers)
            if len(seen) == 6 and not panics:  # llguidance's own way to fail: a token that its grammar does not have
                matchers[0].tokens = [511]
            if len(seen) == 6 and panics:
                raise SystemError("injected")
            follow(matchers, executor)

        masks._follow = failing
        beside = asyncio.create_task(anext_all(engine, plain))
        with pytest.raises(RequestError, match="injected" if panics else "cannot go on behind a token"):
            async for _ in engine.generate(PROMPTS[1], params_of("object")):
                pass
        assert await beside == want
        await check_idle(engine)
        assert engine.statistics().structured["forms_failed"] == 1


async def anext_all(engine: AsyncEngine, job: Job) -> list[int]:
    return [one.token_ids async for one in engine.generate(*job)][-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"structured": {"type": "object"}}, "structured must be a StructuredOutput"),
        ({"structured": FORMS["person"], "min_tokens": 3}, "min_tokens (3) and structured exclude each other"),
        ({"guided_decoding": {}}, "Give `structured`"),
        ({"response_format": {}}, "Give `structured`"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert message in str(error.value)


async def test_a_model_without_a_tokenizer_holds_to_no_form(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    async with AsyncEngine(tmp_path, load_format="dummy", **OPTIONS) as engine:
        with pytest.raises(RequestError, match="no tokenizer"):
            await anext(engine.generate([1, 2, 3], params_of("person")))
