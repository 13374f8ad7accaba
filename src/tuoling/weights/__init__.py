"""Weights in and out: every old layout read, the ones that matter written, each step proven."""
