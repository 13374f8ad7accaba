"""Rows in: read any format, check every row, find duplicates, split, convert."""
