"""Whole trajectories of samplers, beside the libraries they stand in for."""
