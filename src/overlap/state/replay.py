"""The state changes of a decode step as a graph can replay them: nothing comes from the host as an argument.

Counts and offsets are read from the packed plan's header, the plan's place from `Mail.turn`. A plan for this has decode
rows only and admits nobody; it may have fewer rows than the graph, R <= B. The rows from R on are padding: one token at
position 0 of the scratch slot, whose KV is written nowhere and whose token goes nowhere.

Legend: R rows of the plan, B rows of the graph.
"""

from __future__ import annotations

from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.state.inputs import StepInputs
from overlap.state.mail import DEPTH, Mail
from overlap.state.packing import HEADER, NUM_ROWS, NUM_UPDATES, PAGE_UPDATES, USED
from overlap.state.rows import SlotRows


def take_plan(mail: Mail, rows: SlotRows, num_rows: int) -> None:
    """Copy the plan whose turn it is to `mail.packed`, and apply its page updates.

    `num_rows` is B: about as much as such a plan has is fetched at once.
    """
    if mail.packed.is_cuda:
        from overlap.state import replay_triton

        replay_triton.take_plan(mail, rows, num_rows)
        return
    words = mail.packed.numpy()
    plan = mail.plan_words[int(mail.turn.numpy()[0])]
    words[: plan[USED]] = plan[: plan[USED]]
    first, count = words[PAGE_UPDATES], words[NUM_UPDATES]
    slots, indices, pages = words[first : first + 3 * count].reshape(3, -1)
    rows.page_table.numpy()[slots, indices] = pages


def build_decode_inputs(packed: Tensor, rows: SlotRows, out: StepInputs) -> None:
    """Write the inputs of B decode rows to `out` (every column but emit_tokens), and advance the lengths of R rows."""
    if packed.is_cuda:
        from overlap.state import replay_triton

        replay_triton.build_decode_inputs(packed, rows, out)
        return
    num_rows = int(packed.numpy()[NUM_ROWS])
    slots = out.emit_slots
    slots[:num_rows] = packed[HEADER : HEADER + num_rows]
    slots[num_rows:] = rows.scratch
    starts = rows.seq_len.index_select(0, slots)
    out.page_table.copy_(rows.page_table.index_select(0, slots))
    pages = out.page_table.gather(1, (starts // PAGE).long()[:, None])[:, 0]
    out.token_ids.copy_(rows.last_token.index_select(0, slots))
    out.positions.copy_(starts)
    out.kv_index.copy_((pages * PAGE).add_(starts % PAGE))
    out.kv_index[num_rows:] = -1
    out.seq_lens.copy_(starts + 1)
    out.emit_positions.copy_(starts + 1)
    rows.seq_len.index_copy_(0, slots[:num_rows].long(), out.seq_lens[:num_rows])


def settle_decode(mail: Mail, rows: SlotRows, tokens: Tensor) -> None:
    """Write the first R of `tokens` [B], of any integer kind, to their slots and to the host; then move the turn on."""
    if mail.packed.is_cuda:
        from overlap.state import replay_triton

        replay_triton.settle_decode(mail, rows, tokens)
        return
    num_rows, turn = int(mail.packed.numpy()[NUM_ROWS]), int(mail.turn.numpy()[0])
    slots = mail.packed[HEADER : HEADER + num_rows].long()
    rows.last_token[slots] = tokens[:num_rows].int()
    mail.landings[turn, :num_rows] = tokens[:num_rows].int()
    mail.turn.fill_((turn + 1) % DEPTH)
