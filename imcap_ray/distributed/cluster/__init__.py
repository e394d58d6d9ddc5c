"""Connecting to Ray: a private one or a cluster's, its versions, its messages, and jobs submitted to it."""
