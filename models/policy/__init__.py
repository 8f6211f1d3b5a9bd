"""What a request asks for, as immutable values."""
