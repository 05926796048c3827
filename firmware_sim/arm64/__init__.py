"""The edge image and its parts under emulation: qemu-user for programs, qemu-system for whole machines."""
