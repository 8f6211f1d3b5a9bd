"""Counters in shared memory, one request's record, and the report made of it."""
