"""A training's processes: their place among the ranks, how they meet, stop and end."""
