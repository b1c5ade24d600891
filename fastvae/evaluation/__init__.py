"""Evaluation of a trained VAE: prior holes, mutual information, active units, pictures."""
