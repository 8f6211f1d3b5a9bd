"""Methods that decide after which layer a generated token leaves."""
