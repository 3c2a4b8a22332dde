"""A record of where the time goes, on all ranks: `mpidl run --trace`, `mpidl.range`.

Chrome's trace event format, for ui.perfetto.dev, chrome://tracing and `mpidl trace summary`. Each
rank writes what it records into a part of its own beside the file, every second (`recorder`); at a
good end rank 0 merges the parts (`session`), after a bad one `mpidl trace merge` does (`merge`).
"""

from mpidl.trace.ranges import range  # noqa: A004  # as users call it

__all__ = ["range"]
