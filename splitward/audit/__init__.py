"""Attacks on what a device releases, and what they are measured against. The rules are in docs/method.md."""
