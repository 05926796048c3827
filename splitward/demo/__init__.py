"""`splitward demo`: the whole product, small, on real images."""
