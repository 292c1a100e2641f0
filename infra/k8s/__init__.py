"""Kubernetes manifests for KubeRay, and the program that writes them."""
