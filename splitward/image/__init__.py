"""The edge image: from Debian packages and wheels to a card that boots, without root's loop mounts or emulation."""
