"""The cloud service: consumes activations, answers with results, keeps them, and shows them."""
