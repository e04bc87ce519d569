"""How ranks talk about small things: objects exchanged by all, over a tree of nodes."""
