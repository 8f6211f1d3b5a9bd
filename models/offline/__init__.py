"""Nothing on a request's way: calibration, evaluation, benchmarks, the demo model."""
