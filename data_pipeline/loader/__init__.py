"""Reading: batches for a rank, read ahead in a process, fetched ahead from object stores."""
