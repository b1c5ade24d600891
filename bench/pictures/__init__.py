"""The figures of docs/ and bench/results/."""
