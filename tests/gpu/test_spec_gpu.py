"""What only a GPU can answer about speculation: the same tokens by graphs, no wait, the exact distribution."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from overlap import AsyncEngine, SamplingParams
from overlap.assemble import Parts, assemble
from overlap.config import EngineConfig
from overlap.graphs.driver import GraphDriver
from overlap.graphs.policy import Shape, decode_kind, short_kind
from overlap.ops.attention import AttentionRows, TorchAttention
from overlap.runner import Runner
from overlap.schedule.plan import StepPlan
from overlap.schedule.request import Request
from overlap.schedule.shaping import Shaping
from overlap.spec.chain import ChainDrafter
from overlap.spec.head_files import HeadConfig, head_shapes, write_eagle3
from overlap.state.mail import DEPTH
from overlap.state.packing import pack
from overlap.state.rows import SlotRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HIDDEN, INNER, LAYERS, VOCABULARY = 576, 1536, 4, 512
SMALL = {  # the head size and grouping of SmolLM2-135M
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 511,
}  # fmt: skip
SHAPED = Shaping(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((9, 4.0),))
KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "greedy": ({},),
    "sampled": ({}, {"temperature": 0.8}),
    "truncated": ({}, {"temperature": 1.1, "top_k": 40}, {"temperature": 0.9, "top_p": 0.9}),
    "shaped": ({"shaping": SHAPED}, {"temperature": 0.8, "shaping": SHAPED}, {}),
}


def write_model(path: Path) -> None:
    """Write a checkpoint of random numbers, so that a drafter can be the target itself."""
    chance = torch.Generator().manual_seed(0)

    def random_(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=chance) * 0.04).bfloat16()

    tensors = {"model.norm.weight": torch.ones(HIDDEN).bfloat16(), "lm_head.weight": random_(VOCABULARY, HIDDEN) * 3}
    tensors["model.embed_tokens.weight"] = random_(VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        shapes = {"q": (576, HIDDEN), "k": (192, HIDDEN), "v": (192, HIDDEN), "o": (HIDDEN, 576)}
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = random_(*shape)
        for name, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items():
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = random_(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SMALL))
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words = [*letters, *(f"w{number}" for number in range(VOCABULARY - len(letters)))]
    text = tokenizers.Tokenizer(tokenizers.models.BPE({word: place for place, word in enumerate(words)}, []))
    text.decoder = tokenizers.decoders.ByteLevel()
    text.save(str(path / "tokenizer.json"))
    save_file(tensors, path / "model.safetensors")


def write_head(path: Path) -> None:
    """Write an EAGLE-3 head of random numbers: its drafts are mostly wrong, and its steps are those of any head."""
    config = HeadConfig(
        kind="eagle3", hidden_size=HIDDEN, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=64,
        intermediate_size=640, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, vocab_size=VOCABULARY,
        draft_vocab_size=200,
    )  # fmt: skip
    chance = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=chance) * 0.05 + (len(shape) == 1)
        for name, shape in head_shapes(config, 3 * HIDDEN).items()
    }
    ids = torch.randperm(VOCABULARY, generator=chance)[:200].sort().values
    tensors["d2t"] = ids - torch.arange(200)
    write_eagle3(path, config, tensors)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    write_model(path)
    return path


@pytest.fixture(scope="module")
def drafters(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("head")
    write_head(path)
    return {
        "ngram": {"speculative": "ngram"},
        "eagle": {"speculative": "eagle", "draft_model": str(path)},
        "itself": {"speculative": "draft", "draft_model": str(small)},
    }


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Parts]:
    asked: dict[str, Any] = {"device": "cuda", "max_rows": 32, "token_budget": 256, "kv_cache": 16384}
    if "speculative" in options:
        asked["num_drafts"] = 4
    parts = assemble(EngineConfig(model=str(path), **{**asked, **options}))
    try:
        yield parts
    finally:
        parts.own.close()


def driver(runner: Runner) -> GraphDriver:
    assert runner._main._graphs is not None, runner.explain()
    return runner._main._graphs


def on_stream(runner: Runner, call: Callable[[], Any]) -> Any:
    """Call something in the runner's stream, wait for it, and raise what it raised."""
    results: list[Any] = []
    runner._main._stream.launch("test", lambda: results.append(call()))
    torch.cuda.synchronize()
    asyncio.run(runner._main._stream.wait_reached(runner._main._stream.mark()))
    return results[0]


def requests(count: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> list[tuple[int, Request]]:
    """Requests with the step at which each arrives."""
    chance = random.Random(seed)
    asked = []
    for key in range(count):
        stem = [chance.randrange(511) for _ in range(chance.choice([1, 5, 20, 60, 150]))]
        params = {**chance.choice(KINDS[chance.choice(kinds)]), "seed": key}
        prompt, limit = np.array(stem * 2, dtype=np.int32), chance.choice([9, 30, 150])
        asked.append((chance.randrange(60), Request(key=key, front=0, prompt=prompt, limit=limit, **params)))
    return asked


def serve(parts: Parts, asked: list[tuple[int, Request]], aborts: dict[int, int]) -> dict[int, list[int]]:
    """Answer requests that come at their steps, two flights in the air; `aborts` has keys and when they are ended."""
    planner, runner = parts.planner, parts.own
    answers: dict[int, list[int]] = {request.key: [] for _, request in asked}

    async def run() -> None:
        flight, number = None, 0
        while flight is not None or planner.has_work or number <= max(step for step, _ in asked):
            for step, request in asked:
                if step == number:
                    planner.submit(request)
            for key, step in aborts.items():
                if step == number:
                    planner.end(key)
            plan = planner.plan()
            launched = runner.launch(plan) if plan is not None else None
            if flight is not None:
                settled = planner.settle(flight.plan, await flight.wait_landed())
                for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
                    answers[key].append(token)
            flight = launched
            number += 1

    asyncio.run(run())
    return answers


def prefilled(parts: Parts, rows: int, params: tuple[dict[str, Any], ...], steps: int = 3) -> StepPlan:
    """Run some prompts and some steps behind them; return the plan of the decode step that comes next, not launched."""
    planner, runner = parts.planner, parts.own
    for key in range(rows):
        prompt = np.tile(np.arange(3 * key, 3 * key + 7, dtype=np.int32), 2)
        planner.submit(Request(key=key, front=0, prompt=prompt, limit=99, seed=key, **params[key % len(params)]))

    async def run() -> StepPlan:
        left = steps
        while True:
            plan = planner.plan()
            assert plan is not None
            if plan.num_decode == rows:
                left -= 1
                if left < 0:
                    return plan
            planner.settle(plan, await runner.launch(plan).wait_landed())

    return asyncio.run(run())


class State:
    """The device state that a step changes, target's and drafter's, to be compared and put back."""

    def __init__(self, runner: Runner) -> None:
        torch.cuda.synchronize()
        speculation: Any = runner._main._speculation
        drafts, drafter, scratch = speculation._drafts, speculation._drafter, runner._rows.scratch
        columns = [*(getattr(runner._rows, name) for name in SlotRows.COLUMNS), drafts.control.hits]
        columns += [drafts.tokens_SK[:scratch], drafts.num_S[:scratch], drafts.control.tries, drafts.control.idle]
        columns.append(drafter._kv if isinstance(drafter, ChainDrafter) else drafter.history_SL[:scratch, :-1])
        if runner._rows.shapes.rows is not None:
            columns.append(runner._rows.shapes.rows.seen[:scratch])
        self._columns = [*columns, runner._kv]
        self._kept = [column.clone() for column in self._columns]
        torch.cuda.synchronize()  # what is launched next runs on another stream

    def restore(self) -> None:
        with torch.inference_mode():
            for column, kept in zip(self._columns, self._kept, strict=True):
                column.copy_(kept)
        torch.cuda.synchronize()

    def equals(self, other: State) -> bool:
        return all(torch.equal(mine, theirs) for mine, theirs in zip(self._kept, other._kept, strict=True))


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 2, 128), (24, 1, 64)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_several_positions_of_a_row_attend_as_torch_does(rows: int, heads: tuple[int, int, int]) -> None:
    from overlap.ops.attention_flashinfer import FlashInferAttention

    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    width, pages, table = 5, rows * 8, 9
    kv = torch.randn(pages, 2, 2, 16, num_kv_heads, head_dim, device="cuda").bfloat16()
    page_table = torch.zeros((rows, table), dtype=torch.int32, device="cuda")
    page_table[:, :8] = torch.randperm(pages, device="cuda").view(rows, 8).int()
    seq_lens = torch.randint(width, 8 * 16 - width, (rows,), dtype=torch.int32, device="cuda")
    q = torch.randn(rows * width, num_heads, head_dim, device="cuda").bfloat16()
    asked = AttentionRows(
        num_decode=rows, width=width, seq_lens=seq_lens, page_table=page_table,
        starts=np.full(rows, 8 * 16 - width, dtype=np.int32), counts=np.full(rows, width, dtype=np.int32),
        chunk_pages=np.empty(0, dtype=np.int32),
    )  # fmt: skip
    fast, reference = FlashInferAttention(kv, num_heads, table, width=width), TorchAttention(kv, num_heads)
    for attention in (fast, reference):
        attention.plan(asked)
    for layer in (0, 1):
        expected = reference.attend(layer, q).float()
        torch.testing.assert_close(fast.attend(layer, q).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 4), (21, 24)])
@pytest.mark.parametrize("name", ["ngram", "eagle", "itself"])
def test_a_graph_does_bit_for_bit_what_its_calls_do_when_they_are_made_one_by_one(
    small: Path, drafters: dict[str, dict[str, Any]], name: str, rows: int, size: int
) -> None:
    for kind, params in KINDS.items():
        with opened(small, **drafters[name]) as parts:
            runner, plan = parts.own, prefilled(parts, rows, params)
            graphs, lane, place = driver(runner), runner._main._lane, plan.number % DEPTH
            pack(plan, lane.mail.plan_words[place])
            own = decode_kind(plan)
            assert own is not None
            assert own in (f"wide {kind}", "wide sampled", "wide greedy")
            for one in (own, kind if own.endswith(kind) else "sampled"):
                width = plan.width if one.startswith("wide") else 1
                shape = Shape(one, size, width)  # type: ignore[arg-type]  # wide, and plain
                landed, before = lane.mail.landed_words[place], State(runner)
                on_stream(runner, partial(lane.mail.turn.fill_, place))
                on_stream(runner, partial(graphs.run_eagerly, shape))
                count = rows * (5 if one.startswith("wide") else 1)
                tokens, after = landed[:count].copy(), State(runner)
                assert not after.equals(before)
                before.restore()
                assert on_stream(runner, partial(graphs.capture, shape)), runner.explain()
                assert State(runner).equals(before), "a capture changes nothing"
                landed[:] = -9
                graphs.forget_turn()  # the calls above have moved it
                assert on_stream(runner, partial(graphs.replay, shape, place, rows))
                assert landed[:count].tolist() == tokens.tolist()
                assert (landed[count:] == -9).all(), "padding lands nowhere"
                assert State(runner).equals(after)
                before.restore()
            print(f"\n{name}, {kind}: nodes { ({str(s): n for s, n in graphs.num_nodes.items()}) }")


@pytest.mark.parametrize("name", ["ngram", "eagle", "itself"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_step_of_a_graph_does_bit_for_bit_what_its_calls_do_when_they_are_made_one_by_one(
    small: Path, drafters: dict[str, dict[str, Any]], name: str, kind: str
) -> None:
    with opened(small, **drafters[name]) as parts:
        runner, planner = parts.own, parts.planner
        before_them = prefilled(parts, 2, KINDS[kind])
        planner.settle(before_them, asyncio.run(runner.launch(before_them).wait_landed()))
        for key, length in enumerate((3, 40, 16), 100):
            prompt, params = np.arange(length, dtype=np.int32) + 3 * key, KINDS[kind][key % len(KINDS[kind])]
            planner.submit(Request(key=key, front=0, prompt=prompt, limit=9, seed=key, **params))
        plan = planner.plan()
        assert plan is not None
        assert plan.num_decode == 0, "prompts go first"
        own = short_kind(plan)
        assert own == f"short drafting {kind}"
        graphs, lane, place = driver(runner), runner._main._lane, plan.number % DEPTH
        on_stream(runner, lambda: on_inference(partial(runner._main._admit_apart, plan)))
        pack(plan, lane.mail.plan_words[place])
        for one in (own, f"short {kind}"):
            shape = Shape(one, 8)  # type: ignore[arg-type]
            landed, before = lane.mail.landed_words[place], State(runner)
            on_stream(runner, partial(lane.mail.turn.fill_, place))
            on_stream(runner, partial(graphs.run_eagerly, shape))
            tokens, after = landed[:3].copy(), State(runner)
            assert not after.equals(before)
            before.restore()
            assert on_stream(runner, partial(graphs.capture, shape)), runner.explain()
            assert State(runner).equals(before), "a capture changes nothing"
            landed[:] = -9
            graphs.forget_turn()  # the calls above have moved it
            assert on_stream(runner, partial(graphs.replay, shape, place, plan.num_tokens))
            assert landed[:3].tolist() == tokens.tolist()
            assert (landed[3:] == -9).all(), "padding lands nowhere"
            assert State(runner).equals(after)
            before.restore()


@torch.inference_mode()
def on_inference(call: Callable[[], Any]) -> Any:
    return call()


@pytest.mark.parametrize(
    ("name", "drafts"), [("ngram", (4, 4)), ("eagle", (4, 4)), ("itself", (4, 4)), ("ngram", (6, 2)), ("eagle", (7, 4))]
)
def test_answers_under_graphs_are_those_of_the_same_steps_run_eagerly_while_requests_come_and_go(
    small: Path, drafters: dict[str, dict[str, Any]], name: str, drafts: tuple[int, int], monkeypatch: Any
) -> None:
    """bfloat16, and equal to the bit: in the other run each replay is the same calls at the same padded size.

    `drafts` is how many drafts a row verifies where rows are few, and where they are many.
    """
    ladder = (16, drafts[0]), (1 << 31, drafts[1])
    monkeypatch.setattr("overlap.resolve._draft_ladder", lambda asked, *_, **__: ladder if asked.speculative else ())
    aborts = {3: 20, 7: 33, 11: 40, 12: 41}
    answers, statistics = [], []
    for replays in (True, False):
        with opened(small, kv_cache=700, **drafters[name]) as parts:  # few pages: some requests are preempted
            runner, graphs = parts.own, driver(parts.own)
            while runner.warm_up_one():
                pass

            def eager(shape: Shape, place: int, count: int, graphs: GraphDriver = graphs) -> bool:
                graphs.run_eagerly(shape)
                graphs._turn = (place + 1) % DEPTH
                return True

            if not replays:
                graphs._launch = eager  # type: ignore[method-assign]
            answers.append(serve(parts, requests(48, 1), aborts))
            statistics.append(runner.statistics())
            figures = parts.planner.statistics()
    print("\n" + "\n".join(runner.explain()))
    assert figures.preemptions > 0
    assert figures.drafted_tokens > 0
    assert statistics[0].full_replays > 20
    assert statistics[0].piecewise_replays > 5
    assert statistics[0].capture_failures == 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["ngram", "eagle", "itself"])
def test_in_float32_a_drafter_changes_no_token(small: Path, drafters: dict[str, dict[str, Any]], name: str) -> None:
    answers = []
    for options in ({}, drafters[name], {**drafters[name], "graphs": False}):
        with opened(small, dtype="float32", kv_cache=1000, **options) as parts:
            answers.append(serve(parts, requests(32, 2), {5: 30}))
            print("\n" + "\n".join(parts.own.explain()))
    same = [sum(one[key] == answers[0][key] for key in one if key != 5) for one in answers]
    print(f"\nfloat32, {name}: {same[1]} and {same[2]} of 31 answers are those of no drafter")
    # A matrix may round otherwise with its number of rows, also in float32; such a close call is rare.
    assert min(same) >= 29


@pytest.mark.parametrize("name", ["ngram", "eagle", "itself"])
def test_in_bfloat16_most_answers_begin_as_without_a_drafter(
    small: Path, drafters: dict[str, dict[str, Any]], name: str
) -> None:
    answers = []
    for options in ({}, drafters[name]):
        with opened(small, **options) as parts:
            while parts.own.warm_up_one():
                pass
            answers.append(serve(parts, requests(32, 3, ("greedy", "sampled")), {}))
    starts = sum(answers[0][key][:4] == answers[1][key][:4] for key in answers[0])
    whole = sum(answers[0][key] == answers[1][key] for key in answers[0])
    print(f"\nbfloat16, {name}: of 32 answers {starts} begin with the same four tokens, {whole} are the same")
    assert starts >= 16


@pytest.mark.parametrize("name", ["ngram", "eagle", "itself"])
def test_nothing_between_plan_and_launch_waits_for_the_device_not_even_a_capture(
    small: Path, drafters: dict[str, dict[str, Any]], name: str
) -> None:
    with opened(small, **drafters[name]) as parts:
        runner: Any = parts.own

        def watched(call: Any, *arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return call(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runner.launch = partial(watched, runner.launch)
        runner.warm_up_one = partial(watched, runner.warm_up_one)
        serve(parts, requests(32, 4), {})
        assert runner.statistics().capture_failures == 0, runner.explain()
        while runner.warm_up_one():
            pass
        before, again = runner.statistics(), requests(32, 5)
        for _, request in again:
            request.key += 100
        serve(parts, again, {})
        after = runner.statistics()
        assert after.capture_failures == 0, runner.explain()
        assert after.full_replays > before.full_replays
        assert after.piecewise_replays > before.piecewise_replays


def test_tokens_drawn_in_a_verify_under_a_graph_have_the_exact_probabilities(
    small: Path, drafters: dict[str, dict[str, Any]]
) -> None:
    rounds, rows, temperature = 200, 32, 1.5  # warm: some places of a text have one likely token
    with opened(small, prefix_cache=False, **drafters["itself"]) as parts:
        runner, lane = parts.own, parts.own._main._lane
        plan = prefilled(parts, rows, ({"temperature": temperature},), steps=0)
        graphs, place, slots = driver(runner), plan.number % DEPTH, torch.from_numpy(plan.slots).long()
        pack(plan, lane.mail.plan_words[place])
        with torch.inference_mode():  # all in the same place of the same text, with the same drafts
            for column in (lane.rows.last_token, lane.rows.seq_len, lane.rows.page_table):
                column[slots.cuda()] = column[slots[0]].clone()
            drafts = runner._main._speculation._drafts  # type: ignore[union-attr]
            drafts.tokens_SK[:] = drafts.tokens_SK[slots[0]].clone()
            drafts.num_S.fill_(4)
        before, shape = State(runner), Shape("wide sampled", rows, plan.width)
        heard: list[Tensor] = []
        logits_of = lane.program.logits

        def listen(hidden: Tensor) -> Tensor:
            logits = logits_of(hidden)
            heard.append(logits.clone())
            return logits

        lane.program.logits = listen  # type: ignore[method-assign,assignment]
        on_stream(runner, partial(lane.mail.turn.fill_, place))
        on_stream(runner, partial(graphs.run_eagerly, shape))
        lane.program.logits = logits_of  # type: ignore[method-assign]
        assert on_stream(runner, lambda: graphs.capture(shape)), runner.explain()
        counts = torch.zeros(VOCABULARY, dtype=torch.float64)
        for number in range(rounds):
            before.restore()
            lane.rows.seed_lo.copy_(torch.arange(33, dtype=torch.int32) + 1000 * number)
            on_stream(runner, lambda: graphs.replay(shape, place, rows))
            first = lane.mail.landed_words[place][: rows * 5].reshape(rows, 5)[:, 0].astype(np.int64)
            counts += torch.bincount(torch.from_numpy(first), minlength=VOCABULARY)
    expected = (heard[0][0].double().cpu() / temperature).softmax(0) * rounds * rows
    order = expected.argsort(descending=True)
    counts, expected = counts[order], expected[order]
    cells = int((expected >= 5).sum())  # what is rarer makes one cell together
    got = torch.cat((counts[:cells], counts[cells:].sum()[None]))
    want = torch.cat((expected[:cells], expected[cells:].sum()[None] + 1e-9))
    chi_square = float(((got - want) ** 2 / want)[: cells + int(want[-1] >= 5)].sum())
    print(f"\nchi-square {chi_square:.0f} over {cells} cells")
    assert cells > 20
    assert chi_square < cells + 4 * (2 * cells) ** 0.5 + 4  # about one chance in ten thousand


async def test_a_whole_engine_captures_its_speculative_steps_when_it_is_idle(
    small: Path, drafters: dict[str, dict[str, Any]]
) -> None:
    options = {**drafters["eagle"], "num_drafts": 4, "kv_cache": 8192, "max_rows": 16, "token_budget": 128}
    async with AsyncEngine(small, device="cuda", **options) as engine:
        runner: Any = engine._core._loop._runner  # type: ignore[union-attr]
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        async for out in engine.generate([1, 2, 3], params):
            pass
        assert len(out.token_ids) == 20
        for _ in range(600):
            if runner._main._graphs.policy.next_idle() is None:
                break
            await asyncio.sleep(0.1)
        before = runner.statistics()
        assert before.capture_failures == 0, engine.explain()
        # Long enough, and each its own: a step of a few prompt tokens alone would be padded too far for any graph.
        prompts = [[row + 4, *range(40, 57)] for row in range(16)]
        outputs = [out async for out in engine.generate_batch(prompts, params, progress=False)]
        assert {len(out.token_ids) for out in outputs} == {20}
        after = runner.statistics()
        assert after.full_replays > before.full_replays, engine.explain()
        assert after.fallbacks == before.fallbacks, engine.explain()
        print("\n" + engine.explain())
