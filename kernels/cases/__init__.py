"""What a case of an operation is made of: problems, launches, trials."""
