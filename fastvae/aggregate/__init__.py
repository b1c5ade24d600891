"""Estimators of the aggregate posterior q(z): from a batch or a whole data set of posteriors. Knows no VAE."""
