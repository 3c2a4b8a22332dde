"""Benchmarks: `mpidl bench NAME`. Each measures against others in one run, in turns."""
