"""Unpaired AOT: "Distributional Preference Alignment of LLMs via Optimal Transport"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from onlinerl.algorithms.aot import Aot, kept_pairs
from onlinerl.ops.preference import log_ratios

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.ops.whole_step import Rows


class AotUnpaired(Aot):
    """AOT with delta = sort(D_w) - sort(D_l): all chosen responses of the step are to dominate all rejected ones."""

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """D."""
        return log_ratios(outputs, batch)

    def differences(self, rows: Rows) -> Tensor:
        """delta[P]; pairs of weight 0 are left out."""
        chosen, rejected = kept_pairs(rows)
        return rows.values_N[chosen].sort().values - rows.values_N[rejected].sort().values
