"""Runs compared on one web page: `runs` reads and groups them, `charts` draws, `page` puts it together."""
