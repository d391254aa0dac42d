"""The losses of one step, taken apart by kind of token and by data source, and the error that names whose loss is not a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structcot.data.batch import MicroBatch
from structcot.data.render import KINDS
from structcot.errors import TrainingDiverged

MAX_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanLosses:
    """Mean loss over the supervised tokens of a step: whole, by kind of token (name of data.render.KINDS), and by data source."""

    total: float
    by_kind: dict[str, float]
    by_source: dict[str, float]


def mean_losses(batches: Sequence[MicroBatch], losses: Sequence[Tensor]) -> MeanLosses:
    """Means of the row losses of each micro-batch, summed in fp64; by source only where there is more than one."""
    losses_M = torch.cat(list(losses)).double()
    by_kind = _means(losses_M, torch.cat([batch.kinds_M for batch in batches]), KINDS)
    origins = sorted({origin for batch in batches for origin in batch.origins_S})
    by_source = {}
    if len(origins) > 1:
        numbers_M = [
            torch.tensor([origins.index(origin) for origin in batch.origins_S], device=losses_M.device)[batch.documents_M]
            for batch in batches
        ]
        by_source = _means(losses_M, torch.cat(numbers_M), origins)
    return MeanLosses(total=float(losses_M.mean()), by_kind=by_kind, by_source=by_source)


def need_finite(step: int, means: MeanLosses, grad_norm: float, batches: Sequence[MicroBatch], losses: Sequence[Tensor]) -> None:
    """Stop before the weights change if something is not a number; `step` counts from 1.

    Raises:
        TrainingDiverged: naming the records whose own loss is not finite, else all records of the step.
    """
    if math.isfinite(means.total) and math.isfinite(grad_norm):
        return
    guilty = [
        batch.sources_S[document]
        for batch, losses_M in zip(batches, losses, strict=True)
        for document in batch.documents_M[~losses_M.isfinite()].unique().tolist()
    ]
    named = guilty or [source for batch in batches for source in batch.sources_S]
    listed = ", ".join(named[:MAX_NAMED]) + (f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else "")
    raise TrainingDiverged(
        f"step {step}: the loss is {means.total:g} and the gradient norm is {grad_norm:g}; the weights were not changed."
        f" {'Records with a non-finite loss' if guilty else 'Records of this step'}: {listed}."
        " Look at these records or lower train.learning_rate; the same command resumes from the last checkpoint"
    )


def _means(losses_M: Tensor, groups_M: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean loss of each group that occurs."""
    sums = torch.bincount(groups_M, weights=losses_M, minlength=len(names)).tolist()
    counts = torch.bincount(groups_M, minlength=len(names)).tolist()
    return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
