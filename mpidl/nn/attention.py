"""Attention, and the block of a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl import functional
from mpidl.errors import InvalidArgument
from mpidl.nn import init
from mpidl.nn.activation import GELU
from mpidl.nn.dropout import Dropout, check_rate, draw_mask
from mpidl.nn.linear import Linear, Sequential
from mpidl.nn.module import Module
from mpidl.nn.norm import LayerNorm
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array
    from mpidl.autograd import Tensor


class MultiHeadAttention(Module):
    """softmax(q k^T / sqrt(width / heads)) v in each of `heads` parts of the width, then a product.

    Vaswani et al. 2017, section 3.2.2. `qkv.weight` (3 width, width) holds the projections to
    queries, keys and values, one below the other; `out.weight` (width, width) the last one.
    `dropout` is the share of probabilities left out in training. `causal`: no place sees a later
    one. Starts as Xavier's uniform distribution, with biases of 0, and `out` as `Linear` does.

    Raises InvalidArgument for sizes below 1, a width that `heads` does not divide, and a dropout
    outside 0 <= dropout < 1.
    """

    @refuses
    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
    ) -> None:
        if min(width, heads) < 1 or width % heads:
            raise InvalidArgument(
                f"MultiHeadAttention({width}, {heads}): expected a width that is a multiple of "
                "the heads"
            )
        check_rate(dropout, "MultiHeadAttention")
        self.width, self.heads, self.dropout, self.causal = width, heads, dropout, causal
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.out = Linear(width, width, bias=bias)
        init.xavier_uniform(self.qkv.weight)
        for layer in (self.qkv, self.out):
            if layer.bias is not None:
                init.zeros(layer.bias)

    @refuses
    def forward(
        self, x: Tensor | Array, mask: Array | None = None, *, other: Tensor | Array | None = None
    ) -> Tensor:
        """Return what x (n, length, width) finds in itself, or in `other` (n, keys, width).

        `mask` (bool, broadcast to (n, heads, length, keys)) tells which keys a query may look at;
        one that may look at none gets 0 before the last product.
        """
        if other is None:
            shape = (x.shape[0], self.heads, x.shape[1], x.shape[1])
            found = functional.self_attention(
                self.qkv(x), self.heads, mask=mask, causal=self.causal, drop=self._drop(shape, x)
            )
            return self.out(found)
        width, bias = self.width, self.qkv.bias
        q = functional.linear(x, self.qkv.weight[:width], None if bias is None else bias[:width])
        kv = functional.linear(
            other, self.qkv.weight[width:], None if bias is None else bias[width:]
        )
        shape = (x.shape[0], self.heads, x.shape[1], other.shape[1])
        found = functional.attention(
            self._split(q),
            self._split(kv[..., :width]),
            self._split(kv[..., width:]),
            mask=mask,
            causal=self.causal,
            drop=self._drop(shape, x),
        )
        return self.out(found.transpose(0, 2, 1, 3).reshape(*q.shape))

    def arguments(self) -> str:
        """Return width, heads and what is unusual."""
        text = f"{self.width}, {self.heads}" + f", dropout={self.dropout}" * (self.dropout > 0)
        return text + ", bias=False" * (self.qkv.bias is None) + ", causal=True" * self.causal

    def _split(self, x: Tensor) -> Tensor:
        """(n, length, width) -> (n, heads, length, width / heads)."""
        n, length, width = x.shape
        return x.reshape(n, length, self.heads, width // self.heads).transpose(0, 2, 1, 3)

    def _drop(self, shape: tuple[int, ...], x: Any) -> Array | None:
        wanted = self.training and self.dropout > 0
        return draw_mask(shape, self.dropout, x) if wanted else None


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), for x (n, length, width).

    The norm stands before each part (Xiong et al. 2020, figure 1b). The mlp is Linear to `hidden`
    (4 width by default), `activation()`, Linear back; `dropout` follows both parts, and works on
    the probabilities of attention too. Raises InvalidArgument as its layers do.
    """

    @refuses
    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        activation: Callable[[], Module] = GELU,
    ) -> None:
        hidden = 4 * width if hidden is None else hidden
        self.norm1 = LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads, dropout=dropout, causal=causal)
        self.norm2 = LayerNorm(width)
        self.mlp = Sequential(Linear(width, hidden), activation(), Linear(hidden, width))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor | Array, mask: Array | None = None) -> Tensor:
        """Return the output, shaped like `x`; `mask` as in `MultiHeadAttention.forward`."""
        y = self.dropout(self.attention(self.norm1(x), mask)) + x
        return y + self.dropout(self.mlp(self.norm2(y)))
