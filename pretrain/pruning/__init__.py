"""Groups of weights that go to zero while a model trains, and are then taken out of it."""
