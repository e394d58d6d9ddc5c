"""Captions -> the formats that other tools read."""
