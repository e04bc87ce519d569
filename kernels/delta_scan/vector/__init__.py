"""The delta rule with a decay of each key channel, as Kimi Delta Attention uses it."""
