"""R-DPO: "Disentangling Length from Quality in Direct Preference Optimization", arXiv 2403.19159."""

from __future__ import annotations

from onlinerl.algorithms.dpo import Dpo


class LengthDpo(Dpo):
    """f(z + length_penalty (tokens of the chosen - tokens of the rejected response)): a chosen response that is longer has less to win.

    `length_penalty` suits `beta` 0.1: 100 tokens more count as 10 nats of margin. The paper's values could not be verified.
    """

    length_penalty: float = 0.01
