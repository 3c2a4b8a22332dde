"""Models as ONNX files, which run without mpidl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import told

if TYPE_CHECKING:
    import os

    from mpidl.nn import Module

__all__ = ["export_onnx"]


def export_onnx(
    model: Module, path: str | os.PathLike[str], example: Any, *, dynamic_batch: bool = True
) -> None:
    """Write `model`, as it is in evaluation mode, to the file `path`: operator set 17.

    `example` is an input (n, ...), an array or a tensor, or a tuple of several; only shapes and
    dtypes matter. In the file they are "input" ("input_0", "input_1", ... of a tuple), the result
    "output" (likewise), and parameters and buffers have their dotted names. The length n of the
    first axis of the (first) input, and of those as long, is free: the file runs for any batch.
    With `dynamic_batch=False` it runs for n only.

    Any `forward` can be exported that computes by operations of tensors and `mpidl.functional`:
    it runs a few times, on batches of several sizes, and what ran is written down. It gets
    boolean inputs as arrays, all others as tensors. The file is written whole or not at all.
    Works without MPI; on several ranks call it on one.

    Raises MpidlError where the extra `onnx` is not installed, and InvalidArgument, which names
    the operation, for what cannot be exported: results that NumPy computed from the input,
    behind the operations' back, random numbers, a path through the code that depends on the
    values, lengths that are no linear function of n; and for a file that cannot be written.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MpidlError("export_onnx needs onnx: pip install 'mpidl[onnx]'") from error
    from mpidl.nn import Module
    from mpidl.onnx.export import export

    if not isinstance(model, Module):
        raise InvalidArgument(f"export_onnx: expected a model, an nn.Module, found {told(model)}")
    if dynamic_batch is not True and dynamic_batch is not False:
        raise InvalidArgument(f"dynamic_batch={told(dynamic_batch)}: expected True or False")
    export(model, path, example, dynamic_batch)
