"""A loader of small rows, and what comes out of one."""

from amfm.data_pipeline.loader.loader import PretrainLoader

LENGTH = 32


def load(config, **changes):
    settings = {"sequence_length": LENGTH, "micro_batch_size": 2, "seed": 7} | changes
    return PretrainLoader(config, **settings)


def stream(loader, steps, global_batch):
    """Rows by global sample number."""
    rows = {}
    for _ in range(steps):
        for batch in loader.take(global_batch):
            for number, sample in enumerate(batch.sample_ids):
                rows[sample] = (
                    batch.source_ids[number],
                    batch.tokens_BT[number].tolist(),
                    batch.labels_BT[number].tolist(),
                )
    loader.close()
    return rows
