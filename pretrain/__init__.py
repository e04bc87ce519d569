"""The run: configuration, loop, engine, checkpoints, export."""

if __name__ != "amfm.pretrain":
    raise ImportError("pretrain is imported as amfm.pretrain")
