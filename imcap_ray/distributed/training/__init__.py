"""Ray Train over captioned images: plan, inputs, workers, checkpoints."""
