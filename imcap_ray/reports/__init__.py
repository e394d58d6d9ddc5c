"""Captions, scores and thumbnails -> one HTML file."""
