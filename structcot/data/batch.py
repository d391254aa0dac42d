"""One micro-batch: documents laid end to end as tensors, and the slice of them that one rank works on.

Legend: T packed tokens, M supervised rows, S documents, U ranks that share a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from structcot.data.render import IGNORE, RenderedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Packed documents.

    `tokens_T` and `positions_T` are int64; `cu_seqlens_S1` (int32) are the documents' borders in T, `lengths_S` their tokens; `rows_M` are
    the places in T that have a label, `labels_M` those labels, `kinds_M` what each label is (thought, solution, end, prompt), `documents_M`
    which document each row lies in. `dropout_keys_T` is empty where there is no dropout.

    Where ranks share a micro-batch, `slices_U` are the tokens of each; T and M are then those of this rank's slice, while the borders and
    `lengths_S` describe whole documents. There may be no document at all, on a rank that has nothing left to do.
    """

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens_S1: Tensor
    lengths_S: tuple[int, ...]
    rows_M: Tensor
    labels_M: Tensor
    kinds_M: Tensor
    documents_M: Tensor
    dropout_keys_T: Tensor
    sources_S: tuple[str, ...]
    origins_S: tuple[str, ...]
    slices_U: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, all of them real."""
        return len(self.tokens_T)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths_S, default=0)

    @property
    def num_supervised(self) -> int:
        """Tokens that have a label."""
        return len(self.rows_M)


def pack(
    samples: Sequence[RenderedSample],
    device: torch.device | str = "cpu",
    dropout_keys: Sequence[int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> MicroBatch:
    """Lay samples end to end, and take slice `share[0]` of `share[1]` slices of as equal a size as can be.

    `dropout_keys` holds one number for each sample; a token's key is made of it and the token's position.
    """
    lengths = [len(sample.tokens_T) for sample in samples]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions_T = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
    keys_T = np.empty(0, dtype=np.int64)
    if dropout_keys is not None:
        keys_T = np.repeat(np.asarray(dropout_keys, dtype=np.int64), lengths) + positions_T
    rank, num_ranks = share
    cuts = np.arange(num_ranks + 1) * borders[-1] // num_ranks
    own = slice(cuts[rank], cuts[rank + 1])
    labels_T, kinds_T = (_end_to_end(arrays)[own] for arrays in ([s.labels_T for s in samples], [s.kinds_T for s in samples]))
    rows_M = np.flatnonzero(labels_T != IGNORE)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    return MicroBatch(
        tokens_T=tensor(_end_to_end([sample.tokens_T for sample in samples])[own]),
        positions_T=tensor(positions_T[own]),
        cu_seqlens_S1=tensor(borders).int(),
        lengths_S=tuple(lengths),
        rows_M=tensor(rows_M),
        labels_M=tensor(labels_T[rows_M]),
        kinds_M=tensor(kinds_T[rows_M]),
        documents_M=tensor(np.searchsorted(borders, rows_M + own.start, side="right") - 1),
        dropout_keys_T=tensor(keys_T[own]),
        sources_S=tuple(sample.source for sample in samples),
        origins_S=tuple(sample.origin for sample in samples),
        slices_U=tuple(np.diff(cuts).tolist()) if num_ranks > 1 else (),
    )


def _end_to_end(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """All arrays after one another; an empty one where there is none."""
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
