"""What is wrong where an object store is asked without credentials; apart, for those that judge errors without reading stores."""


class NoCredentialsError(RuntimeError):
    """This machine has no credentials for an object store: for its user to set where a command starts."""
