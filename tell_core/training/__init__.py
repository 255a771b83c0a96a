"""Training: base models, label masks, one loop for all arms, checkpoints, probes."""
