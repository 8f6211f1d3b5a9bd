"""Measures the quality of policies on tasks, and the work they take: served or in process."""
