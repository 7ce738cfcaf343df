"""What is written for other libraries."""
