"""Makes the demo model's profile: ``python -m sluice.models.demo.profile --out DIR --seed 5``.

Measures the importance of its layers and trains FiRST's routers, CALM's classifier and PALBERT's
halting head on the frozen model, and collects the references that C3PO re-mixes towards, with plain
transformers, in fp32 and on the training split alone. Then it measures the heads on held-out items
and prints that. The same seed, machine and number of threads give the same profile.
`--references-only` leaves all else in the folder as it is.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sluice.models.demo import DEMO_MODEL_DIR
from sluice.models.demo.head_report import report
from sluice.models.demo.heads import (
    DecodeStates,
    HeadConfig,
    decode_states,
    train_classifier,
    train_q_exit,
)
from sluice.models.demo.references import PER_TASK, find_references, write_references
from sluice.models.demo.routers import RouterConfig, train_routers
from sluice.models.demo.traces import Model, draw, importance, load_model
from sluice.models.fingerprint import fingerprint
from sluice.models.profile import Profile
from sluice.models.profile_writer import write_profile

IMPORTANCE_ROWS = 256
"""Rows of 128 tokens that importance is measured on."""
RUN_ROWS = 64
"""Rows of 128 tokens that the model runs at a time for the exit heads' data."""


def make_profile(
    model: Model,
    out: Path,
    seed: int,
    heads: HeadConfig,
    routers: RouterConfig,
    importance_rows: int = IMPORTANCE_ROWS,
) -> Profile:
    """Measure and train everything but references, into a folder, made where it is missing.

    Args:
        model: as `load_model` gives it.
        out: the folder.
        seed: decides the data and the initial weights.
        heads: how the exit heads are trained.
        routers: how the routers are trained.
        importance_rows: rows of 128 tokens that importance is measured on.

    Raises:
        ProfileError: what was written cannot be read back.
    """
    seeds = torch.Generator().manual_seed(seed)
    first, second, third = torch.randint(2**31, (3,), generator=seeds).tolist()
    measured = importance(model, draw(first, importance_rows).batch)
    data = DecodeStates.joined(
        [decode_states(model, draw(second + part, RUN_ROWS)) for part in range(heads.runs)]
    )
    trained = {
        "first": train_routers(model, routers, third),
        "classifier": train_classifier(data, heads, third),
        "q_exit": train_q_exit(data, heads, third),
    }
    _write(out, model, measured, trained)
    return Profile.load(out)


def _write(
    out: Path,
    model: Model,
    measured: Mapping[str, list[float]],
    trained: Mapping[str, Mapping[str, Tensor]],
) -> None:
    fields = {
        "model": {
            "layers": model.config.num_hidden_layers,
            "hidden": model.config.hidden_size,
            "fingerprint": fingerprint(Path(model.config.name_or_path)),
        },
        "importance": {
            unit: [round(value, 6) for value in values] for unit, values in measured.items()
        },
    }
    tensors = {
        f"{method}.{name}": tensor
        for method, parts in trained.items()
        for name, tensor in parts.items()
    }
    write_profile(out, fields, tensors, {})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.demo.profile", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the profile")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_DIR, help="weights folder")
    parser.add_argument("--items", type=int, default=200, help="held-out items per task to measure")
    parser.add_argument(
        "--references", type=int, default=PER_TASK, help="re-mix references of each task"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--measure-only", action="store_true", help="read the profile in --out")
    part.add_argument(
        "--references-only",
        action="store_true",
        help="collect the references again and leave the rest of the profile in --out",
    )
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    if not arguments.measure_only:
        if not arguments.references_only:
            make_profile(model, arguments.out, arguments.seed, HeadConfig(), RouterConfig())
        references = find_references(model, arguments.seed, arguments.references)
        write_references(arguments.out, references)
    if arguments.references_only:
        print(f"{len(references.items)} references of layers {list(references.layers)}")
        return
    profile = Profile.load(arguments.out)
    print(report(model, profile, arguments.items, arguments.seed))


if __name__ == "__main__":
    main()
