"""`amfm plan`: memory, traffic and time of a layout, by formulas."""
