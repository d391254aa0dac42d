"""The keys and values of a batch that is never padded: a slot for each row, filled from column 0, so that column and position are one.

A row that ends is replaced by the last one, hence the rows at work are always the first slots. A new token is written at the end of its own
row, in place; what lies behind it in the row is old and masked. The buffers grow by half when a row reaches their end.

B: rows at work. S: slots. H: heads of keys and values. C: columns. d: width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_COLUMNS = 256
"""Buffers hold a multiple of this."""


class SlotCache:
    """Keys and values of all layers, (S, H, C, d) each: `num_slots` rows at most, each of at most `max_columns` tokens.

    Has what a model of transformers asks of a cache in a step of one token a row.
    """

    is_compileable = False

    def __init__(self, num_slots: int, max_columns: int):
        self.num_slots = num_slots
        self.max_columns = max_columns
        self._capacity = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []
        # Of the step that was announced; the buffers of the rows at work are kept as views, since a step makes two in each layer as it is.
        self._num_rows = 0
        self._width = 0
        self._at_work: list[tuple[Tensor, Tensor]] = []
        self._rows_B: Tensor | None = None
        self._columns_B: Tensor | None = None  # where the new token of each row goes; None where all go into one column

    def put(self, first: int, lengths: Sequence[int], filled: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy prompts into the slots from `first` on: `filled` holds keys and values of each layer, (rows, H, at least the length, d)."""
        end, width = first + len(lengths), max(lengths)
        if not self._buffers:
            self._buffers = [(keys[:0], values[:0]) for keys, values in filled]
        self._reserve(width)
        for buffers, tensors in zip(self._buffers, filled, strict=True):
            for buffer_SHCd, new_BHTd in zip(buffers, tensors, strict=True):
                buffer_SHCd[first:end, :, :width] = new_BHTd[:, :, :width]

    def move(self, source: int, target: int, length: int) -> None:
        """Let the row in slot `source`, of `length` tokens, take slot `target`."""
        for buffers in self._buffers:
            for buffer_SHCd in buffers:
                buffer_SHCd[target, :, :length] = buffer_SHCd[source, :, :length]

    def expect(self, positions_B: Tensor, lengths: Sequence[int]) -> None:
        """Announce a step: row b holds `lengths[b]` tokens and gets one more; `positions_B` holds the same numbers."""
        self._width = max(lengths) + 1
        self._reserve(self._width)
        if self._num_rows != len(lengths):
            self._num_rows = len(lengths)
            self._rows_B = torch.arange(self._num_rows, device=positions_B.device)
            self._at_work = [(keys[: self._num_rows], values[: self._num_rows]) for keys, values in self._buffers]
        self._columns_B = None if min(lengths) == max(lengths) else positions_B

    def update(self, keys_BH1d: Tensor, values_BH1d: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new token of each row; returns keys and values of all rows up to the longest (B, H, C, d)."""
        keys, values = self._at_work[layer_idx]
        return self._write(keys, keys_BH1d), self._write(values, values_BH1d)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this step."""
        return self._width - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the first query, were all rows as long as the longest."""
        return self._width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a query may see, and where they start."""
        return self._width, 0

    def _write(self, buffer_BHCd: Tensor, new_BH1d: Tensor) -> Tensor:
        if self._columns_B is None:
            buffer_BHCd.narrow(2, self._width - 1, 1).copy_(new_BH1d)
        else:  # not scatter_, which on a CPU copies a whole bf16 buffer into fp32 and back
            buffer_BHCd[self._rows_B, :, self._columns_B] = new_BH1d[:, :, 0]
        return buffer_BHCd.narrow(2, 0, self._width)

    def _reserve(self, num_columns: int) -> None:
        """Make room for rows of so many tokens. Layers are copied one after the other, so that only one lies in memory twice."""
        old, wanted = self._capacity, max(num_columns, min(self._capacity + self._capacity // 2, self.max_columns))
        if num_columns <= old:
            return
        self._capacity = -(-wanted // BLOCK_COLUMNS) * BLOCK_COLUMNS
        self._num_rows, self._at_work = 0, []
        for layer, buffers in enumerate(self._buffers):
            self._buffers[layer] = (self._larger(buffers[0], old), self._larger(buffers[1], old))

    def _larger(self, buffer_SHCd: Tensor, num_columns: int) -> Tensor:
        """A copy that has columns to spare: zeros, since what is masked still enters a product and so must be finite."""
        new_SHCd = buffer_SHCd.new_zeros((self.num_slots, buffer_SHCd.shape[1], self._capacity, buffer_SHCd.shape[3]))
        if num_columns:
            new_SHCd[:, :, :num_columns] = buffer_SHCd
        return new_SHCd
