"""What a user writes: option syntax, ranges, paths."""
