"""With compilation on, stock steps run vLLM's compiled model and routed ones the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine import engine
from support.tiny import make_model

from sluice.models.policy.policy import SkipSet


def test_compiled_forward_serves_steps_without_depth_control(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compilation on, stock steps run vLLM's compiled model and routed ones the loop."""
    from sluice.models.engine.loop import LayerLoop

    loops = []
    run = LayerLoop.run
    monkeypatch.setattr(LayerLoop, "run", lambda *args: (loops.append(1), run(*args))[1])
    folder = make_model("llama", models_folder / "compiled")
    prompts = [[1, 2, 3, 4], list(range(40))]
    skip = SkipSet.of(blocks=(3,))
    with engine(folder) as eager:
        expected = eager.generate(prompts, [None, None]), eager.generate(prompts, [skip, skip])
    loops.clear()
    with engine(folder, enforce_eager=False) as compiled:
        compiled_calls = []
        decoder = compiled.runner.get_model().model
        assert not decoder.do_not_compile
        stock = type(decoder).__call__
        monkeypatch.setattr(
            type(decoder),
            "__call__",
            lambda self, *a, **k: (compiled_calls.append(1), stock(self, *a, **k))[1],
        )
        assert compiled.generate(prompts, [None, None]) == expected[0]
        assert compiled_calls
        assert not loops
        compiled_calls.clear()
        assert compiled.generate(prompts, [skip, skip]) == expected[1]
        assert loops
        assert not compiled_calls
        mixed = compiled.generate(prompts, [None, skip])
        assert mixed == [expected[0][0], expected[1][1]]
