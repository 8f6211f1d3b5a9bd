"""Where Sluice meets vLLM 0.32.0.

A seam is a place inside vLLM that Sluice calls, reads or replaces although it is no public
interface: a later version may move it. All seams are in this package and, for the model runner,
the attention metadata and the workers, in `sluice.models.engine`. Each module says which functions
of vLLM it touches. A seam that has moved stops the start with `patching.SeamMovedError`.
"""
