"""What the adapters of vLLM's two model runners have in common."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sluice.models.engine.core import RoutingCore
from sluice.models.engine.startup import RoutedModel
from sluice.models.vllm_adapter.patching import SeamMovedError
from sluice.models.vllm_adapter.seams import Seam, moved

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object


class RoutedRunner(_Runner):
    """Mixin for model runners of vLLM.

    Attributes:
        core: routes the runner's requests.
    """

    seams: ClassVar[tuple[Seam, ...]]
    """What the adapter uses of vLLM's runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_seams(self.seams)
        super().__init__(*args, **kwargs)
        self.core = RoutingCore(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as vLLM does, then build what routes requests."""
        self.core.prepare_load()
        super().load_model(*args, **kwargs)
        self.core.load(self.get_model())

    @property
    def routed(self) -> RoutedModel | None:
        """The core's."""
        return self.core.routed

    @property
    def expert_answer(self) -> dict[str, Any]:
        """The core's."""
        return self.core.expert_answer


@cache
def check_seams(seams: tuple[Seam, ...]) -> None:
    """Check that the running vLLM has what an adapter uses.

    Raises:
        SeamMovedError: it has not.
    """
    import vllm

    gone = moved(Path(vllm.__file__).parent, seams)
    if gone:
        raise SeamMovedError(", no ".join(gone))
