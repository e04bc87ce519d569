"""What a case of an operation is made of: problems and trials."""
