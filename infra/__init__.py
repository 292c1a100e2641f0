"""What runs around the pipeline: container image, Kubernetes manifests, a local object store."""
