"""What is refused, and what is derived, before any training time is spent."""
