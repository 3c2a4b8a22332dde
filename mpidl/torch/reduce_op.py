"""How tensors of several ranks become one."""

from __future__ import annotations

from mpidl.errors import InvalidArgument
from mpidl.refuse import told
from mpidl.torch.arguments import flag


class ReduceOp(int):
    """How tensors are combined; numbered as Horovod does."""

    name: str

    def __new__(cls, number: int, name: str) -> ReduceOp:
        """Return the operation of this number, and with the engine's name for it."""
        made = super().__new__(cls, number)
        made.name = name
        return made

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        """Return what makes a copy, for pickle."""
        return int(self), self.name

    def __repr__(self) -> str:
        return self.name.capitalize()


Average = ReduceOp(0, "average")
Sum = ReduceOp(1, "sum")
Adasum = ReduceOp(2, "adasum")
Min = ReduceOp(3, "min")
Max = ReduceOp(4, "max")
Product = ReduceOp(5, "product")

OPERATIONS = (Average, Sum, Adasum, Min, Max, Product)  # by number


def reduction(op: int | None, average: bool | None) -> ReduceOp:
    """Return the operation that is meant. Raises InvalidArgument if there is none."""
    if average is not None:
        if op is not None:
            raise InvalidArgument("expected `op` or `average`, not both")
        return Average if flag("average", average) else Sum
    if op is None:
        return Average
    if not isinstance(op, int) or isinstance(op, bool) or not 0 <= op < len(OPERATIONS):
        raise InvalidArgument(f"op={told(op)}: expected one of {list(OPERATIONS)}")
    return OPERATIONS[op]
