"""Weights in and out: other people's layouts read, ours written, in bounded memory and with proof."""
