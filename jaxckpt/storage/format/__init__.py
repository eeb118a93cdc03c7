"""The documents of a checkpoint as bytes and back: pure, without reading or writing a file."""
