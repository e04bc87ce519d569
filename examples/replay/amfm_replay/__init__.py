"""Steps of a run, looked at afterwards: computed again and compared bitwise, or read again for the documents of a spike."""
