"""Images through every member of a bundle, each once: predict, evaluate, calibrate."""
