"""`python -m sluice.models.offline.bench.gpu`: prints figures and writes them as JSON.

It needs PyTorch and transformers, and no vLLM. On a CPU, launches are plain calls: what is shown
there is that the script runs, and that both ways agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sluice.models.offline.bench.gpu.decoder import StaticDecoder
from sluice.models.offline.bench.gpu.figures import Bench

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.bench.gpu", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="size of the decoder")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64], help="batch sizes")
    parser.add_argument("--context", type=int, default=512, help="positions of a row")
    parser.add_argument("--repeats", type=int, default=20, help="of every timing")
    args = parser.parse_args()
    from transformers import LlamaConfig

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=args.context)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        decoder = StaticDecoder(config, max(args.rows), args.context, dtype, device)
        figures = Bench(decoder, args.rows, args.context, args.repeats).run()
    for name, value in figures.items():
        print(f"{name}: {value}")
    args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
