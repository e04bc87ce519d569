"""Files that `amfm export` copies next to the weights of a model that no native transformers class can hold."""
