"""The plug-in by which vLLM serves our own modelling file; `amfm export` copies it next to the weights, see
plugin_files.py.
"""
