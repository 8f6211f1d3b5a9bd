"""From the wire form of `routing` to a policy: one control a module."""
