"""`amfm report`: one page of a run."""
