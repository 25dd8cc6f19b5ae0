"""What a run measures and shows: records, progress, pictures, trackers."""
