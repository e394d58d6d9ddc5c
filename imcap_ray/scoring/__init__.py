"""Captions and references -> scores, intervals and baselines."""
