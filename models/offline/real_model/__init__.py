"""A small real model and real questions, built from pinned wheels, and what policies do to it."""
