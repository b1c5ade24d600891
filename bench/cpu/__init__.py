"""Races on CPUs, their report, and comparisons of revisions."""
