"""One case an operation: its inputs, call, references, least traffic, launches and public peers."""
