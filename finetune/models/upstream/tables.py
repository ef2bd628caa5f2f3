"""What a table of another program's names is made of: rows that say from which of its tensors one of ours is made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.models.upstream.layouts import same


def joined(*parts: Tensor) -> Tensor:
    """Query, key and value, or the two halves of a gated layer, one below the other."""
    return torch.cat(parts)


def transposed(weight: Tensor) -> Tensor:
    """The weight of a linear layer as open_clip multiplies by it."""
    return weight.T


def with_batch(table: Tensor) -> Tensor:
    """A token or a table of positions with the axis of the batch in front. (..., width) -> (1, tokens, width)."""
    return table.reshape(1, -1, table.shape[-1])


def first_third(weight: Tensor) -> Tensor:
    """The rows of the query in a joined weight."""
    return weight[: len(weight) // 3]


def other_thirds(weight: Tensor) -> Tensor:
    """The rows of key and value in a joined weight."""
    return weight[len(weight) // 3 :]


def placed(token: Tensor, positions: Tensor) -> Tensor:
    """The class token with its position, which timm adds to no other than the patches where there are registers."""
    return token + positions[:, :1]


def of_patches(positions: Tensor) -> Tensor:
    """The positions without that of the class token."""
    return positions[:, 1:]


Row = tuple[str, tuple[str, ...], Callable[..., Tensor]]


@dataclass(frozen=True)
class Table:
    """The names of one of transformers' models."""

    program: str
    rows: tuple[Row, ...]
    activation: str  # transformers' default, which a config.json may leave out
    norm_eps: float  # likewise; 0: its configuration does not say that of most norms, and all keep their own
    live: tuple[tuple[str, str], ...] = ()  # replacements that turn a name in a file into the name in memory
    has: str = ""  # one of our names that the network must have


def row(ours: str, *theirs: str, make: Callable[..., Tensor] | None = None) -> Row:
    """The row of our names that match the pattern `ours`, made of the tensors `theirs`; several are joined."""
    return ours, theirs, make or (joined if len(theirs) > 1 else same)


def qkv(ours: str, theirs: str, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"), end: str = r"\2") -> Row:
    """The row of our joined query, key and value, which lie in three tensors there."""
    return row(ours, *(f"{theirs}.{name}.{end}" for name in names))
