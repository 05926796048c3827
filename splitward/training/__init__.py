"""The training loop, on one machine; its run folder is what `export` and `audit` take."""
