"""Training a head: the module is the head that the engine runs, the loss falls, and a cut run goes on."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overlap import AsyncEngine
from overlap.errors import ConfigError
from overlap.models.llama import Llama
from overlap.spec.data import Corpus, batches, draft_vocabulary, join, prompts_from, self_asked, split
from overlap.spec.eagle import load_head
from overlap.spec.head_files import write_eagle3
from overlap.spec.train import HeadTraining, TrainSettings
from overlap.spec.train_command import Job, train_drafter


def settings(**given: Any) -> TrainSettings:
    small: dict[str, Any] = {
        "steps": 30, "batch_size": 4, "length": 48, "unroll": 3, "draft_vocabulary": 100, "intermediate": 32,
        "learning_rate": 3e-3, "save_every": 10,
    }  # fmt: skip
    return TrainSettings(**{**small, **given})


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    generator = np.random.default_rng(0)
    return join([(generator.integers(3, 90, 5).tolist(), generator.integers(3, 90, 30).tolist()) for _ in range(12)])


def test_the_loss_falls_and_a_resumed_run_has_the_same_weights(target: Llama, corpus: Corpus, tmp_path: Path) -> None:
    whole = HeadTraining(target, corpus, settings())
    fixed = next(batches(corpus, 4, 48, 0))
    before = whole.loss(fixed).item()
    whole.run(progress=False)
    assert whole.loss(fixed).item() < before - 0.2
    cut = HeadTraining(target, corpus, settings())
    for batch in itertools.islice(batches(corpus, 4, 48, 0), 10):
        cut._train(batch, cut.step / 30)
        cut.step += 1
    cut.save(tmp_path / "checkpoint.safetensors")
    again = HeadTraining(target, corpus, settings())
    again.resume(tmp_path / "checkpoint.safetensors")
    again.run(progress=False)
    assert again.step == 30
    for name, tensor in whole.head.named_tensors().items():
        assert torch.equal(tensor, again.head.named_tensors()[name]), name


def test_a_checkpoint_of_another_head_is_refused(target: Llama, corpus: Corpus, tmp_path: Path) -> None:
    HeadTraining(target, corpus, settings()).save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ConfigError, match="Remove it to begin anew"):
        HeadTraining(target, corpus, settings(intermediate=64)).resume(tmp_path / "checkpoint.safetensors")


def test_the_unroll_is_what_the_engine_drafts(target: Llama, corpus: Corpus, spec: Any, tmp_path: Path) -> None:
    """Greedy answers drafted by the loaded head are accepted exactly as often as the training's report says."""
    from overlap.messages import SamplingParams

    prompts = [corpus.text(row)[:5].tolist() for row in range(6)]
    greedy = [SamplingParams(temperature=0)] * 6
    answers = spec.Reference(target).run(prompts, greedy, 33)
    judged = join(list(zip(prompts, answers, strict=True)))
    training = HeadTraining(target, judged, settings(steps=80, unroll=3, learning_rate=5e-3))
    training.run(progress=False)
    report = training.report(judged)
    assert report.accepted[0] > 0.3  # it has seen these very texts
    write_eagle3(tmp_path / "head", training.config, training.tensors(torch.float32))
    drafter = spec.chain(load_head(tmp_path / "head", target), 3, 6)
    # One verify at each position: the target moves on by one token whatever was drafted.
    hits = [0, 0, 0]
    tried = 0
    for start in range(30):
        reference = spec.Reference(target, drafter)
        reference.run([[*prompt, *answer[:start]] for prompt, answer in zip(prompts, answers, strict=True)], greedy, 2)
        for accepted in reference.accepted[:6]:
            tried += 1
            for place in range(accepted):
                hits[place] += 1
    assert tried == 180
    assert hits[0] / tried == pytest.approx(report.accepted[0], abs=0.02)
    assert hits[1] / hits[0] == pytest.approx(report.accepted[1], abs=0.05)


def test_the_command_makes_data_trains_and_writes_a_head_with_its_card(
    tiny_llama_dir: Path, target: Llama, tmp_path: Path
) -> None:
    job = Job(
        model=str(tiny_llama_dir), output=tmp_path / "head", train=settings(steps=4), num_prompts=10, held_out=2,
        answer_tokens=12, device="cpu", dtype=torch.float32, progress=False,
    )  # fmt: skip
    report = train_drafter(job)
    assert len(report.accepted) == 3
    card = (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert f"{report.mean_emitted:.2f}" in card
    assert "4 steps" in card
    assert load_head(tmp_path / "head", target).config.draft_vocab_size == 100
    assert train_drafter(job) == report  # all is there: nothing is made or trained anew


def test_no_prompt_is_both_trained_on_and_judged_by(tmp_path: Path) -> None:
    kept, judged = split(prompts_from(None, 3000, 1), 64)
    assert len(judged) == 64
    assert not set(kept) & set(judged)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert sorted(prompts_from(tmp_path / "prompts.txt", 4, 0)) == ["one", "one", "two", "two"]
    (tmp_path / "prompts.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no prompts"):
        prompts_from(tmp_path / "prompts.txt", 4, 0)


@pytest.mark.parametrize("share", [-0.1, 1.2, 50])
def test_a_share_of_made_up_questions_that_is_none_is_refused_before_anything_is_made(
    tmp_path: Path, share: float
) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Job(model="m", output=tmp_path, train=settings(), self_asked=share, device="cpu", dtype=torch.float32)


def test_a_draft_vocabulary_is_the_most_frequent_tokens_in_order() -> None:
    made = join([([7, 7, 3], [9, 9, 9, 1])])
    assert draft_vocabulary(made, 12, 3).tolist() == [1, 7, 9]
    assert draft_vocabulary(made, 4 * 3, 99).tolist() == list(range(12))


def test_batches_go_on_from_any_number_as_if_they_had_begun_there(corpus: Corpus) -> None:
    begun = list(itertools.islice(batches(corpus, 5, 48, 3), 9))
    later = list(itertools.islice(batches(corpus, 5, 48, 3, first=4), 5))
    for one, other in zip(begun[4:], later, strict=True):
        assert torch.equal(one.tokens_BL, other.tokens_BL)


def test_texts_of_about_the_same_length_share_a_batch_and_none_comes_twice_in_a_pass() -> None:
    chance = np.random.default_rng(1)
    texts = [([number + 3], chance.integers(3, 90, int(length)).tolist()) for number, length in
             enumerate(chance.integers(1, 200, 400))]  # fmt: skip
    made = join(texts)
    met, padding, filled = [], 0, 0
    for batch in itertools.islice(batches(made, 8, 512, 5), 50):
        met += batch.tokens_BL[:, 0].tolist()
        padding += batch.tokens_BL.numel() - int(batch.lengths_B.sum())
        filled += int(batch.lengths_B.sum())
    assert sorted(met) == [number + 3 for number in range(400)]
    assert padding < 0.15 * filled
    again = [batch.tokens_BL[:, 0].tolist() for batch in itertools.islice(batches(made, 8, 512, 5), 100)]
    assert sorted(again[:50]) != again[:50]
    assert again[:50] != again[50:], "another order in the next pass"


def test_a_run_may_go_on_from_a_head_that_is_there(target: Llama, corpus: Corpus, spec: Any, tmp_path: Path) -> None:
    first = HeadTraining(target, corpus, settings())
    first.run(progress=False)
    write_eagle3(tmp_path / "head", first.config, first.tensors(torch.float32))
    fixed = next(batches(corpus, 4, 48, 0))
    other = settings(intermediate=64, draft_vocabulary=50)  # the head's own hold
    again = HeadTraining(target, corpus, other, tmp_path / "head")
    assert again.config == first.config
    assert torch.equal(again.ids_N, first.ids_N)
    assert again.loss(fixed).item() == pytest.approx(first.loss(fixed).item(), rel=1e-5)
    (tmp_path / "eagle").mkdir()
    spec.write_random_head(tmp_path / "eagle", target, "eagle")
    with pytest.raises(ConfigError, match="only EAGLE-3 heads are trained"):
        HeadTraining(target, corpus, other, tmp_path / "eagle")


async def test_a_chat_model_makes_up_questions_and_one_without_a_template_says_that_it_can_not(
    smollm2_path: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "context": 512}
    async with AsyncEngine(str(smollm2_path), max_rows=8, **options) as engine:
        asked = await self_asked(engine, 4, seed=1, progress=False)
        assert 2 <= len(asked) <= 4
        assert len(set(asked)) == len(asked)
        assert all(len(question.split()) >= 3 and "<|" not in question for question in asked)
        assert set(await self_asked(engine, 4, seed=1, progress=False)) == set(asked), "a seed says which"
    plain = shutil.copytree(tiny_llama_dir, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    told = json.loads((plain / "tokenizer_config.json").read_text())
    told.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(told))
    async with AsyncEngine(str(plain), device="cpu", dtype="float32", kv_cache=512) as engine:
        assert engine.chat_template is None
        with pytest.raises(ConfigError, match="no chat template"):
            await self_asked(engine, 4, seed=1, progress=False)


def test_the_command_line_trains_a_head(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from overlap.cli import main

    given = {
        "--output": str(tmp_path / "head"), "--num-prompts": "80", "--answer-tokens": "6", "--steps": "2",
        "--batch-size": "4", "--draft-vocabulary": "64", "--intermediate": "32", "--device": "cpu", "--minutes": "2",
    }  # fmt: skip
    assert main(["train-drafter", str(tiny_llama_dir), *itertools.chain.from_iterable(given.items())]) == 0
    assert "tokens a verify" in capsys.readouterr().err
    assert (tmp_path / "head" / "model.safetensors").is_file()


def test_the_head_for_576_channels_takes_12_megabytes_at_most() -> None:
    from overlap.spec.head_files import HeadConfig, head_shapes

    defaults = TrainSettings()
    config = HeadConfig(
        kind="eagle3", hidden_size=576, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5,
        intermediate_size=defaults.intermediate, rope_theta=1e5, rope_scaling=None, vocab_size=49152,
        draft_vocab_size=defaults.draft_vocabulary,
    )  # fmt: skip
    sizes = {
        name: math.prod(shape) * (8 if name == "d2t" else 2) for name, shape in head_shapes(config, 3 * 576).items()
    }
    assert 11_000_000 < sum(sizes.values()) + 49152 < 12_000_000
