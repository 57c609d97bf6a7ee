"""Tables that others have published, made again by one command."""
