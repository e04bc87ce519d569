"""amfm: in the repository its packages are links to the folders at the root, where it is installed they lie here."""
