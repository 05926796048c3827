"""Splitward: split inference for medical devices. Importing this package is cheap and never loads torch."""

__version__ = "0.1.0"
