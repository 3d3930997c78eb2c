"""The commands of `detour`, by their subject: each parses, prints, and calls the room that does the work."""
