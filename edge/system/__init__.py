"""What the edge image runs around the agent: site settings, boot slots, check-in and system update."""
