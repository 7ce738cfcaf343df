"""Files that are whole, typed and sealed."""
