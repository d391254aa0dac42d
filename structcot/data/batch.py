"""One micro-batch: documents laid end to end as tensors.

Legend: T packed tokens, M supervised rows, S documents.
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

    @property
    def num_tokens(self) -> int:
        """Tokens, all of them real."""
        return len(self.tokens_T)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths_S)

    @property
    def num_supervised(self) -> int:
        """Tokens that have a label."""
        return len(self.rows_M)


def pack(samples: Sequence[RenderedSample], device: torch.device | str = "cpu", dropout_keys: Sequence[int] | None = None) -> MicroBatch:
    """Lay samples end to end. `dropout_keys` holds one number for each sample; a token's key is made of it and the token's position."""
    lengths = [len(sample.tokens_T) for sample in samples]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels_T = np.concatenate([sample.labels_T for sample in samples])
    rows_M = np.flatnonzero(labels_T != IGNORE)
    positions_T = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
    keys_T = np.empty(0, dtype=np.int64)
    if dropout_keys is not None:
        keys_T = np.repeat(np.asarray(dropout_keys, dtype=np.int64), lengths) + positions_T

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    return MicroBatch(
        tokens_T=tensor(np.concatenate([sample.tokens_T for sample in samples])),
        positions_T=tensor(positions_T),
        cu_seqlens_S1=tensor(borders).int(),
        lengths_S=tuple(lengths),
        rows_M=tensor(rows_M),
        labels_M=tensor(labels_T[rows_M]),
        kinds_M=tensor(np.concatenate([sample.kinds_T for sample in samples])[rows_M]),
        documents_M=tensor(np.searchsorted(borders, rows_M, side="right") - 1),
        dropout_keys_T=tensor(keys_T),
        sources_S=tuple(sample.source for sample in samples),
        origins_S=tuple(sample.origin for sample in samples),
    )
