"""One member or many are trained: settings, loop, Ray Train, ensembles."""
