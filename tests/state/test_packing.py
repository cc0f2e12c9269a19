from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from overlap.cache.pages import Ints
from overlap.errors import InternalError
from overlap.schedule.plan import Admission, StepPlan
from overlap.state.packing import HEADER, capacity, pack


def column(*values: int) -> Ints:
    return np.array(values, dtype=np.int32)


PLAN = StepPlan(
    number=7,
    slots=column(4, 2, 9),
    counts=column(1, 3, 2),
    starts=column(20, 0, 5),
    num_decode=1,
    prompt=column(11, 12, 13, 14, 15),
    emits=column(0, 2),
    sampled=column(1),
    truncated=False,
    admissions=(Admission(slot=2, start=0, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, seed=2**64 - 2),),
    page_slots=column(2, 9),
    page_indices=column(0, 1),
    page_ids=column(30, 31),
    chunk_pages=column(30, 8),
)


def test_a_packed_plan_says_in_its_header_where_its_sections_are() -> None:
    out = np.full(capacity(4, 8, 4), -7, dtype=np.int32)
    layout = pack(PLAN, out)
    assert out[:HEADER].tolist() == [3, 1, 6, 2, 1, 1, 2, 16, 19, 22, 25, 28, 29, 37, 43, 48]
    assert (layout.slots, layout.prompt, layout.used) == (16, 43, 48)
    assert out[layout.slots : layout.sampled].tolist() == [4, 2, 9, 0, 1, 4, 1, 3, 2, 0, -1, 1]
    assert out[layout.sampled] == 1
    words = out[layout.admissions : layout.page_updates]
    assert words[[0, 1, 3, 6, 7]].tolist() == [2, 0, 3, -2, -1]
    assert words.view(np.float32)[[2, 4, 5]].tolist() == [0.5, 0.25, 0.125]
    assert out[layout.page_updates : layout.prompt].tolist() == [2, 9, 0, 1, 30, 31]
    assert out[layout.prompt : layout.used].tolist() == [11, 12, 13, 14, 15]
    assert (out[layout.used :] == -7).all()


def test_a_buffer_that_is_too_small_is_refused_with_both_sizes() -> None:
    with pytest.raises(InternalError, match="Step 7 needs 48 packed words, but the buffer has 47"):
        pack(PLAN, np.zeros(47, dtype=np.int32))


@pytest.mark.parametrize(("asked", "packed"), [(0.0, 0.0), (1e-60, 1e-30), (0.5, 0.5), (1e300, 1e30)])
def test_a_temperature_that_float32_cannot_hold_stays_a_temperature(asked: float, packed: float) -> None:
    out = np.zeros(capacity(4, 8, 4), dtype=np.int32)
    layout = pack(replace(PLAN, admissions=(replace(PLAN.admissions[0], temperature=asked),)), out)
    assert out[layout.admissions : layout.page_updates].view(np.float32)[2] == np.float32(packed)
