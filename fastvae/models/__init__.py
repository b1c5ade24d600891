"""The VAE and its parts: likelihoods, priors, bounds, objectives."""
