"""From a store to samples: mixture, order, packing."""
