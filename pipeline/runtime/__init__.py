"""What a job says and asks for while it runs: resources, progress, logs, metrics."""
