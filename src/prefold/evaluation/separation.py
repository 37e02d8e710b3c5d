"""How well the model already tells chosen from rejected before it is trained (`prefold check --reference`).

Pairs that it separates widely teach it little; a pair in which it prefers the rejected completion far more strongly
than in the others may have its labels the wrong way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from prefold.data.findings import ROWS_SHOWN, Finding
from prefold.data.preference import RowId
from prefold.errors import counted
from prefold.evaluation.held_out_pairs import PairScores
from prefold.evaluation.paired import won

BINS = 12
_SEPARATED = 0.9
_FAR = 3.5
"""Robust standard deviations from the median beyond which a value counts as an outlier (Iglewicz and Hoaglin, 1993)."""


def separation(scores: PairScores) -> dict[str, Any]:
    """Accuracy, quartiles and histogram of the margins: mean log-prob per token, chosen minus rejected, in nats."""
    margins = scores.means[:, 0] - scores.means[:, 1]
    counts, edges = np.histogram(margins, BINS)
    return {
        "pairs": len(margins),
        "accuracy": round(float(won(margins).mean()), 4),
        "quartiles": [round(float(value), 4) for value in np.quantile(margins, (0.25, 0.5, 0.75))],
        "histogram": {"edges": [round(float(edge), 4) for edge in edges], "counts": counts.tolist()},
    }


def findings_of(scores: PairScores, origins: Sequence[RowId]) -> list[Finding]:
    margins = scores.means[:, 0] - scores.means[:, 1]
    findings = []
    if (accuracy := float((margins > 0).mean())) >= _SEPARATED:
        message = f"the model prefers the chosen completion of {accuracy:.0%} of the pairs already"
        advice = "there is little to learn from them; take harder pairs"
        findings.append(Finding("already_separated", "warning", int((margins > 0).sum()), (), message, advice))
    spread = float(scipy.stats.median_abs_deviation(margins, scale="normal"))
    against = np.flatnonzero((margins < np.median(margins) - _FAR * spread) & (margins < 0))
    if len(against):
        worst = sorted(against.tolist(), key=lambda index: float(margins[index]))[:ROWS_SHOWN]
        number = counted(len(against), "pair")
        message = f"in {number} the model prefers the rejected completion far more strongly than in the others"
        advice = "read them, the first ones first: their labels may be flipped"
        rows = tuple(origins[index] for index in worst)
        findings.append(Finding("likely_flipped", "warning", len(against), rows, message, advice))
    return findings
