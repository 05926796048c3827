"""A trained run becomes a signed bundle for devices and a server half for the cloud."""
