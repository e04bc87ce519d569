"""Where the time of a traced step of amfm went: the verb `amfm profile`."""
