"""Images -> features -> captions: encoders, decoders, search, and the model folder."""
