"""What crosses the network. numpy, msgspec and cryptography only; see docs/wire.md."""
