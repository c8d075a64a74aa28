"""The Space: what it says, how it serves, and in a browser."""
