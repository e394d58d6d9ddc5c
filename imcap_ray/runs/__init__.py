"""The state of a run on disk. Knows neither Ray nor torch."""
