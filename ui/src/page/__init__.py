"""What the page draws with; what it draws comes from scimlora.page and scimlora.backends."""
