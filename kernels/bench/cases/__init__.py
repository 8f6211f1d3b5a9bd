"""What the benchmark times: one module per group of operations."""
