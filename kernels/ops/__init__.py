"""Each operation's name, arguments and plain PyTorch reference."""
