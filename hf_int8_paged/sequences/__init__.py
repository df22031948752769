"""Which tokens of which sequence lie where, and how more find room: in blocks handed out as a cache grows, or in memory
that was allocated at once."""
