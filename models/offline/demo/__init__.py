"""The demo model: its tasks, its training and evaluation code, its weights and its profile."""

from pathlib import Path

DEMO_MODEL_DIR = Path(__file__).resolve().parent / "weights"
DEMO_PROFILE_DIR = DEMO_MODEL_DIR.parent / "profile"
