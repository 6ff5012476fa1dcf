"""OSP: "Online Self-Preferring Language Models"."""

from __future__ import annotations

from onlinerl.algorithms.dpo import Dpo


class Osp(Dpo):
    """DPO on how strong a preference is: p f(z) + (1 - p) f(-z), whose optimum is z = logit(p).

    The paper's oracle is the policy itself, asked in both orders; any oracle that gives probabilities will do. Which pairs it is asked
    about is `pairing`'s business.
    """

    soft_labels: bool = True
