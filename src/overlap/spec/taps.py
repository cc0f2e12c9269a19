"""Which of the target's hidden states a drafter reads.

"The hidden state after layer k" is off by one in half of the ports of EAGLE. Here tap t is the residual stream in
front of layer t (counted from 0), which is `hidden_states[t]` of transformers, and what the published EAGLE-3 code
and SGLang collect for (2, n // 2, n - 3).

"""

from __future__ import annotations


def eagle3_taps(num_layers: int) -> tuple[int, int, int]:
    """Return the layers in front of which EAGLE-3 looks: (2, n // 2, n - 3). Of tiny models some are the same."""
    return (min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0))
