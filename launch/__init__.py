"""The command line, local processes, and what stands around a run."""

if __name__ != "amfm.launch":
    raise ImportError("launch is imported as amfm.launch")
