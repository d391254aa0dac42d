"""Sequence parallelism for attention: tokens of few ranks become heads of few ranks, and back (Jacobs et al. 2023, arXiv 2309.14509).

Packed tokens are cut into as many slices as a group has ranks; everything but attention works on the rank's own slice. Attention needs
whole documents, so ranks trade: each gives away its tokens of other ranks' heads and gets its own heads of all tokens, by one all-to-all.
Slices need not be equal, so nothing is padded. Where there are fewer key-value heads than ranks, each is sent to all that need it.

Legend: T packed tokens of all ranks, t those of this rank, U ranks, H query heads, G key-value heads (repeated, if need be), h and g those
of one rank, N heads of any kind, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class HeadExchange(NamedTuple):
    """The ranks that share packed tokens, in the order of their slices, and the tokens in the slice of each."""

    group: dist.ProcessGroup
    tokens_U: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Place of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank."""
        return self.tokens_U[self.rank]


def need_exchange(operation: str, exchange: HeadExchange, num_tokens: int, num_heads: int) -> None:
    """Refuse slices that are not those of the group, and heads that ranks cannot share evenly.

    Raises:
        ValueError: naming the operation and what does not fit.
    """
    num_ranks = dist.get_world_size(exchange.group)
    if len(exchange.tokens_U) != num_ranks:
        raise ValueError(f"{operation}: the exchange has {len(exchange.tokens_U)} slices for {num_ranks} ranks; give one each")
    if exchange.num_tokens != num_tokens:
        raise ValueError(f"{operation}: got {num_tokens} tokens; the slice of rank {exchange.rank} has {exchange.num_tokens}")
    if num_heads % num_ranks:
        raise ValueError(f"{operation}: {num_heads} heads cannot be shared evenly by {num_ranks} ranks; use a degree that divides them")


def heads_of_all_tokens(parts: Sequence[Tensor], exchange: HeadExchange) -> list[Tensor]:
    """Heads of this rank (T, n, d) of every part (t, N, d), of which N is a multiple of the ranks: one collective for all parts."""
    num_ranks = len(exchange.tokens_U)
    sent_UtNd = torch.cat([part.unflatten(1, (num_ranks, -1)).transpose(0, 1) for part in parts], dim=2)
    received_TNd = parts[0].new_empty((sum(exchange.tokens_U), *sent_UtNd.shape[2:]))
    _all_to_all(received_TNd, sent_UtNd.flatten(0, 1), exchange, gives_tokens=True)
    return list(received_TNd.split([part.shape[1] // num_ranks for part in parts], dim=1))


def all_heads_of_tokens(parts: Sequence[Tensor], exchange: HeadExchange) -> list[Tensor]:
    """Every head (t, N, d) of this rank's tokens, from the ranks' own heads (T, n, d): the inverse of `heads_of_all_tokens`."""
    num_ranks, sizes = len(exchange.tokens_U), [part.shape[1] for part in parts]
    sent_TNd = torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0].contiguous()
    received_UtNd = sent_TNd.new_empty((num_ranks, exchange.num_tokens, *sent_TNd.shape[1:]))
    _all_to_all(received_UtNd.flatten(0, 1), sent_TNd, exchange, gives_tokens=False)
    return [part_UtNd.transpose(0, 1).flatten(1, 2).contiguous() for part_UtNd in received_UtNd.split(sizes, dim=2)]


def repeats_for(num_kv_heads: int, num_ranks: int) -> int:
    """Copies of each key-value head with which every rank gets the same number of them."""
    return math.lcm(num_kv_heads, num_ranks) // num_kv_heads


def repeated(heads_TGd: Tensor, num_ranks: int) -> Tensor:
    """Key-value heads, each as often as ranks need it."""
    repeats = repeats_for(heads_TGd.shape[1], num_ranks)
    return heads_TGd if repeats == 1 else heads_TGd.repeat_interleave(repeats, dim=1)


def summed(grad_TGd: Tensor, num_kv_heads: int) -> Tensor:
    """Gradient of key-value heads from that of their copies."""
    if grad_TGd.shape[1] == num_kv_heads:
        return grad_TGd
    return grad_TGd.unflatten(1, (num_kv_heads, -1)).sum(2)


def _all_to_all(received: Tensor, sent: Tensor, exchange: HeadExchange, *, gives_tokens: bool) -> None:
    """Rows of `sent` are this rank's tokens once for each rank, or everybody's tokens; those of `received` are the other."""
    own, everybody = [exchange.num_tokens] * len(exchange.tokens_U), list(exchange.tokens_U)
    sizes = (everybody, own) if gives_tokens else (own, everybody)
    dist.all_to_all_single(received, sent, *sizes, group=exchange.group)
