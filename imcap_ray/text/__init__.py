"""Text: tokens, vocabularies, encodings, escaping. Knows no images."""
