"""What is written for readers."""
