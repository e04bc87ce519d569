"""The recurrence with a decay of each key channel, as GLA and HGRN2 use it."""
