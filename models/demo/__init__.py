"""The demo model: its tasks, its training and evaluation code, and its weights."""

from pathlib import Path

DEMO_MODEL_DIR = Path(__file__).resolve().parent / "weights"
