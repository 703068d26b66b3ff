"""The operations for an NVIDIA GPU, in Triton: built for a captured decode step, checked in Triton's interpreter.

Every launch has a grid that does not depend on what the batch holds; counts and tables are read on the device from
buffers that stay where they are, so a captured graph is replayed with other adapters, pages and lengths. No kernel
adds with atomics: an answer does not depend on the order in which programs finish.
"""
