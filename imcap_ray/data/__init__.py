"""Images and captions as people store them -> manifests, bytes and pixels. Knows no model."""
