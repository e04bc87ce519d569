"""Writing: text from sources to tokens in a store, by Ray actors."""
