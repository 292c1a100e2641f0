"""What Prometheus and Grafana need to watch a cluster: dashboard, alerts, an example of a configuration."""
