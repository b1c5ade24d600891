"""The VAE and what it is put together from: likelihoods, priors, bounds, objectives."""
