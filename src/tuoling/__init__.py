"""Tuoling 驼铃: make a Chinese-capable language model your own."""
