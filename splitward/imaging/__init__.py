"""From a file or a camera's pixels to the frame a model takes; one path for the device and for training."""
