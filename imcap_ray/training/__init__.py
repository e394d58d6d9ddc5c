"""Features and captions -> weights. Knows nothing of Ray."""
