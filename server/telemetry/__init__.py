"""What ran, as series, reports and JSON."""
