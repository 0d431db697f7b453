"""Ranks in groups, and layers that are spread over a group; on a group of one they are the plain layers."""
