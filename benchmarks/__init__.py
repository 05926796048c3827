"""Speed and memory, as JSON: medians over repeated runs, ratios against a peer measured in the same run."""
