"""What models and doubt are worth on real images and in simulation."""
