"""Files that `amfm export` copies beside the weights of a model that no native transformers class can hold."""
