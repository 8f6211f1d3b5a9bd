"""What is said when vLLM has moved a part."""

from __future__ import annotations


class SeamMovedError(RuntimeError):
    """vLLM no longer has a part that Sluice calls; names the part and the vLLM version."""

    def __init__(self, what: str) -> None:
        import vllm

        super().__init__(
            f"vLLM {vllm.__version__} has no {what}: Sluice was written against 0.32.0 and its "
            "seam has moved; use the pinned version."
        )
