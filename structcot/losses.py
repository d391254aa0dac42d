"""The losses of one step, taken apart by kind of token and by data source, and the error that names whose loss is not a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from structcot.data.batch import MicroBatch
from structcot.data.render import KINDS
from structcot.errors import TrainingDiverged

MAX_NAMED = 8


class Suspects(NamedTuple):
    """Records (`path:line`) of a rank's micro-batches, and those whose own loss is not finite."""

    records: list[str]
    guilty: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanLosses:
    """Mean loss over the supervised tokens of a step: whole, by kind of token (name of data.render.KINDS), and by data source."""

    total: float
    by_kind: dict[str, float]
    by_source: dict[str, float]


def loss_sums(batches: Sequence[MicroBatch], losses: Sequence[Tensor], origins: Sequence[str]) -> Tensor:
    """Sums of the row losses of these micro-batches and how many rows they are, (2, kinds + origins) in fp64 on the CPU.

    By kind of token first, then by data source (`origins`); sums of several ranks add up to those of all.
    """
    losses_M = torch.cat(list(losses)).double()
    origins_M = [
        torch.tensor([origins.index(origin) for origin in batch.origins_S], dtype=torch.int64, device=losses_M.device)[batch.documents_M]
        for batch in batches
    ]
    sums = [torch.zeros(2, 0, dtype=torch.float64, device=losses_M.device)]
    for groups, names in (([batch.kinds_M for batch in batches], KINDS), (origins_M, origins)):
        groups_M = torch.cat(groups)
        totals = torch.bincount(groups_M, weights=losses_M, minlength=len(names))
        sums.append(torch.stack([totals, torch.bincount(groups_M, minlength=len(names)).double()]))
    return torch.cat(sums, dim=1).cpu()


def mean_losses(sums: Tensor, origins: Sequence[str]) -> MeanLosses:
    """Means from the sums of all ranks (see `loss_sums`); by source only where more than one occurs."""
    totals, counts = sums.tolist()
    means = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
    by_kind, by_source = (
        {name: mean for name, mean in zip(names, part, strict=True) if mean is not None}
        for names, part in ((KINDS, means[: len(KINDS)]), (origins, means[len(KINDS) :]))
    )
    total = sum(totals[: len(KINDS)]) / sum(counts[: len(KINDS)])
    return MeanLosses(total=total, by_kind=by_kind, by_source=by_source if len(by_source) > 1 else {})


def is_finite(means: MeanLosses, grad_norm: float) -> bool:
    """Whether a step may change the weights."""
    return math.isfinite(means.total) and math.isfinite(grad_norm)


def suspects(batches: Sequence[MicroBatch], losses: Sequence[Tensor]) -> Suspects:
    """The records of these micro-batches, and those among them whose own loss is not finite."""
    guilty = [
        batch.sources_S[document]
        for batch, losses_M in zip(batches, losses, strict=True)
        for document in batch.documents_M[~losses_M.isfinite()].unique().tolist()
    ]
    return Suspects([source for batch in batches for source in batch.sources_S], guilty)


def diverged(step: int, means: MeanLosses, grad_norm: float, found: Sequence[Suspects]) -> TrainingDiverged:
    """The error of a step whose numbers are not finite; `step` counts from 1, `found` are the suspects of every rank.

    It names the records whose own loss is not finite, else all records of the step.
    """
    guilty = list(dict.fromkeys(source for one in found for source in one.guilty))  # ranks that share documents name the same ones
    named = guilty or list(dict.fromkeys(source for one in found for source in one.records))
    listed = ", ".join(named[:MAX_NAMED]) + (f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else "")
    return TrainingDiverged(
        f"step {step}: the loss is {means.total:g} and the gradient norm is {grad_norm:g}; the weights were not changed."
        f" {'Records with a non-finite loss' if guilty else 'Records of this step'}: {listed}."
        " Look at these records or lower train.learning_rate; the same command resumes from the last checkpoint"
    )
