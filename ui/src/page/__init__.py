"""What the page is made of: where answers come from, genes as people paste them, charts."""
